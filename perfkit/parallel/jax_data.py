"""Data parallelism in JAX: one program over a mesh of devices, or `jax.pmap` with gradients averaged by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from perfkit._batch import axis_of
from perfkit._errors import InvalidInputError
from perfkit._report import Effect, Skipped
from perfkit._workload import Workload
from perfkit.backends.jax_compile import Program
from perfkit.backends.jax_keys import is_key
from perfkit.backends.jax_placement import Placement
from perfkit.backends.jax_quantized import is_quantized
from perfkit.backends.jax_trees import leaves_with_names, with_leaves
from perfkit.parallel.jax_mesh import OnMesh, local, mesh_of, put, replicated, shared_rows
from perfkit.parallel.jax_piped import Piped
from perfkit.parallel.spread import Spread

if TYPE_CHECKING:
    from perfkit.backends.jax_model import Function
    from perfkit.recipes.data_parallel import DataParallel

AXIS = "data"


def refusal(work: Workload, recipe: DataParallel) -> str | None:
    """Why these options are not there for JAX; None where they are."""
    if recipe.compress:
        return "compress is torch's: in JAX gradients are sent in their own type (bf16 makes of it what it can)"
    if recipe.precision:
        return "precision is torch's, for the weights that FSDP2 gathers: use 'bf16+data_parallel(shard=True)'"
    if recipe.offload:
        return "offload is torch's: in JAX every array lies on a device of the mesh"
    if recipe.engine == "pmap" and recipe.shard:
        return "jax.pmap keeps whole parameters on each device: use engine='jit' with shard"
    if recipe.engine == "pmap" and work.layout is not None and work.layout.axes != (AXIS,):
        return f"jax.pmap shares a batch among all devices, and these are {work.layout}: use engine='jit'"
    return None


def data_parallel(work: Workload, recipe: DataParallel) -> tuple[Workload, Effect]:
    """Each device takes its part of the batch; parameters lie on every device, or with `shard` a part on each."""
    mesh, model = mesh_of(work.layout), work.model
    named, structure = leaves_with_names(model.params)
    if isinstance(model.placement, Piped):
        touched = tuple(name for name, _ in named)
        return _told(work, model.placement.along_data(recipe.batch_dim, recipe.shard), touched, (), recipe)
    placed, taken, skipped = [], [], []
    for name, leaf in named:
        leaf = replicated(leaf, mesh)
        reason = _share(leaf, mesh) if recipe.shard else None
        if isinstance(reason, str):
            skipped.append(Skipped(name, reason))
        else:
            leaf = leaf if reason is None else put(leaf, reason)
            taken.append(name)
        placed.append(leaf)
    placement = Mapped(mesh, recipe.batch_dim) if recipe.engine == "pmap" else OnMesh(mesh, recipe.batch_dim)
    model = model.with_state(with_leaves(structure, placed), replicated(model.rest, mesh))
    return _told(work.replace(model=model), placement, tuple(taken), tuple(skipped), recipe)


def _told(
    work: Workload,
    placement: OnMesh | Mapped,
    touched: tuple[str, ...],
    skipped: tuple[Skipped, ...],
    recipe: DataParallel,
) -> tuple[Workload, Effect]:
    what = "parameters, gradients and optimizer state in parts" if recipe.shard else "gradients averaged"
    told = f"data: the batch in {placement.mesh.shape[AXIS]} parts, {what}"
    spread = work.spread or Spread()
    notes = [f"one program by jax.{recipe.engine} over {work.layout}, on {work.world.size} process(es)"]
    apart = _about_rest(work.model.rest) if isinstance(placement, Mapped) else []
    model = replace(work.model, placement=placement)
    work = work.replace(model=model, spread=replace(spread, parts=(*spread.parts, told)))
    return work, Effect(touched, skipped, (*notes, *apart), apart=tuple(apart))


def _share(leaf: Any, mesh: Mesh) -> NamedSharding | str:
    """How a parameter is shared out along "data": by its largest free dimension that divides; else why it is not."""
    parts = mesh.shape[AXIS]
    if is_quantized(leaf):
        return "quantized: its numbers and its scales belong together"
    spec = (*leaf.sharding.spec, *(None,) * leaf.ndim)[: leaf.ndim]
    fitting = [dim for dim in range(leaf.ndim) if spec[dim] is None and leaf.shape[dim] % parts == 0]
    if not fitting:
        return f"no dimension of {list(leaf.shape)} can be divided by {parts}: every device holds it whole"
    largest = max(fitting, key=lambda dim: leaf.shape[dim])
    return NamedSharding(mesh, PartitionSpec(*spec[:largest], AXIS, *spec[largest + 1 :]))


def _about_rest(rest: Any) -> list[str]:
    if not any(map(_is_float, jax.tree.leaves(rest))):
        return []
    return [
        "running statistics are of each device's part of the batch, averaged: losses differ from one device's; "
        "engine='jit' takes them over the whole batch"
    ]


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


class Mapped(Placement):
    """`jax.pmap`: each device runs the step on its part, and gradients are averaged.

    Args:
        mesh: the devices.
        batch_dim: the dimension of the inputs that is shared out.
    """

    def __init__(self, mesh: Mesh, batch_dim: int):
        self.mesh, self.batch_dim = mesh, batch_dim

    def state(self, state: Any) -> Any:
        return replicated(state, self.mesh)

    def batch(self, batch: Any) -> Any:
        """Each array with a new first dimension: one entry for each device of this process."""
        devices = self.mesh.devices.ravel()
        rows = shared_rows(batch, self.batch_dim, len(devices))
        mine = [index for index, device in enumerate(devices) if device.process_index == jax.process_index()]

        def of(leaf: Any) -> Any:
            parts: Any
            if not isinstance(leaf, (jax.Array, np.ndarray)):
                raise InvalidInputError(
                    f"a {type(leaf).__name__} among the inputs: jax.pmap takes arrays; engine='jit'"
                )
            dim = axis_of(leaf.shape, rows, self.batch_dim)
            if dim is None:
                parts = jnp.broadcast_to(leaf, (len(devices), *leaf.shape))
            else:
                parts = leaf.reshape(*leaf.shape[:dim], len(devices), -1, *leaf.shape[dim + 1 :])
                parts = parts.transpose(dim, *range(dim), *range(dim + 1, parts.ndim)) if dim else parts
            if len(mine) < len(devices):
                return parts[np.array(mine)]
            return put(parts, NamedSharding(self.mesh, PartitionSpec(AXIS)))

        return jax.tree.map(of, batch)

    def function(self, function: Function) -> Function:
        """The model with random numbers of each device's own."""

        def on_one(params, rest, *args, **kwargs):
            index = jax.lax.axis_index(AXIS)
            own = jax.tree.map(lambda leaf: jax.random.fold_in(leaf, index) if is_key(leaf) else leaf, rest)
            outputs, new_rest = function(params, own, *args, **kwargs)
            return outputs, jax.tree.map(lambda new, old: old if is_key(new) else new, new_rest, rest)

        return on_one

    def averaged(self, found: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.lax.pmean(leaf, AXIS) if _is_float(leaf) else leaf, found)

    def program(self, step: Callable, donate: tuple[int, ...], state: Any) -> Program:
        pmap = partial(jax.pmap, axis_name=AXIS, in_axes=(None, 0, 0, 0), out_axes=None)
        return Program(step, donate, jit=partial(pmap, devices=list(self.mesh.devices.ravel())))

    def held(self, tree: Any) -> Any:
        return local(tree)
