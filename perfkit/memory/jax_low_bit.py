"""optax's optimizers on moments in few bits."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from perfkit._report import Effect
from perfkit._workload import Workload
from perfkit.backends.jax_trees import leaves_with_names
from perfkit.memory.jax_few_bits import Form, Held, held, in_full, zeros
from perfkit.memory.jax_stretches import is_held, updated

LEAST = 4096
"""Moments of fewer numbers stay as they are."""

STRETCH = {"cpu": 2**16}
"""Numbers that are updated at a time, by device: what its caches hold."""

LONG_STRETCH = 2**22
"""The same on other devices, which a short stretch does not keep busy."""

MOMENTS = {
    optax.ScaleByAdamState: {"mu": True, "nu": False},
    optax.ScaleByAmsgradState: {"mu": True, "nu": False, "nu_max": False},
    optax.ScaleByLionState: {"mu": True},
    optax.TraceState: {"trace": True},
}
"""The fields of optax's states that are held in few bits, and whether their numbers have a sign. All begin as zeros."""


def refusal(work: Workload) -> str | None:
    """Why an optimizer's state cannot be held in few bits; None where it can."""
    if work.layout is not None and work.layout.size("pipeline") > 1:
        return "a pipeline's stages hold parameters packed, and blocks of moments would reach across them"
    state = jax.eval_shape(work.training.optimizer.init, work.model.params)
    if any(map(_is_known, jax.tree.leaves(state, is_leaf=_is_known))):
        return None
    names = {type(node).__name__ for node in jax.tree.leaves(state, is_leaf=_is_named) if _is_named(node)}
    told = f"made of {', '.join(sorted(names))}" if names else "none"
    return (
        "what can be held in few bits are the moments of Adam, AMSGrad and Lion and the momentum of SGD, as optax has "
        f"them, and the optimizer's state is {told}"
    )


def low_bit(work: Workload, bits: int) -> tuple[Workload, Effect]:
    """The caller's optimizer around moments in few bits."""
    training, params = work.training, work.model.params
    state = jax.eval_shape(training.optimizer.init, params)
    nodes = [node for node in jax.tree.leaves(state, is_leaf=_is_known) if _is_known(node)]
    trees = [getattr(node, field) for node in nodes for field in MOMENTS[type(node)]]
    moments = {name: leaf for tree in trees for name, leaf in leaves_with_names(tree)[0]}
    large = [name for name, leaf in moments.items() if _is_large(leaf)]
    if not large:
        told = f"no parameter that it keeps moments of, of 32 bits or fewer, has {LEAST} numbers or more"
        return work, Effect(notes=(told,))
    fields = sorted({field for node in nodes for field in MOMENTS[type(node)]})
    share = sum(moments[name].size for name in large) / sum(leaf.size for leaf in moments.values())
    notes = [f"{', '.join(fields)} of {len(large)} of {len(moments)} parameters, {share:.1%} of the numbers"]
    others = _numbers(state) - _numbers(trees)
    if others >= LEAST:
        notes.append(f"{others} other numbers in the optimizer's state stay as they are")
    stretch = STRETCH.get(work.device, LONG_STRETCH)
    work = work.replace(training=replace(training, optimizer=wrapped(training.optimizer, bits, stretch)))
    return work, Effect(tuple(large), notes=tuple(notes))


def wrapped(optimizer: optax.GradientTransformation, bits: int, stretch: int) -> optax.GradientTransformationExtraArgs:
    """The optimizer with its state in few bits between two steps; a step computes in full and rounds at its end."""
    inner = optax.with_extra_args_support(optimizer)

    def init(params: Any) -> Any:
        """Compiled, so that moments are never there in full; they lie as their parameters do."""
        placed = _placed(params)

        def made(params: Any) -> Any:
            return _in_few_bits(inner.init(params), bits, placed)

        lies = _shardings(jax.eval_shape(made, params), placed) if placed else None
        return jax.jit(made, out_shardings=lies)(params)

    def update(gradients: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        def full(gradients: Any, state: Any, params: Any, extra: dict[str, Any]) -> tuple[Any, Any]:
            return inner.update(gradients, state, params, **extra)

        return updated(full, gradients, state, (params, extra), stretch)

    return optax.GradientTransformationExtraArgs(init, update)


def state_in_full(tree: Any) -> Any:
    """A state with all moments as optax has them."""
    return jax.tree.map(lambda leaf: in_full(leaf) if is_held(leaf) else leaf, tree, is_leaf=is_held)


def state_held_as(tree: Any, like: Any) -> Any:
    """What `state_in_full` told of `like`, held as there again."""
    return jax.tree.map(lambda old, new: held(new, old.form) if is_held(old) else new, like, tree, is_leaf=is_held)


def _in_few_bits(state: Any, bits: int, placed: dict[tuple, Any]) -> Any:
    """A state at the beginning, its moments in few bits."""

    def of(node: Any) -> Any:
        if not _is_known(node):
            return node
        return node._replace(
            **{field: moments(getattr(node, field), sign) for field, sign in MOMENTS[type(node)].items()}
        )

    def moments(tree: Any, signed: bool) -> Any:
        def moment(path: tuple, leaf: Any) -> Any:
            parameter = placed.get(path)
            spread = parameter is not None and not parameter.sharding.is_fully_replicated
            return zeros(Form(leaf.shape, leaf.dtype, signed, bits, spread)) if _is_large(leaf) else leaf

        return jax.tree_util.tree_map_with_path(moment, tree)

    return jax.tree.map(of, state, is_leaf=_is_known)


def _placed(params: Any) -> dict[tuple, Any]:
    """The parameters on a mesh of devices, by their paths."""
    return {
        path: leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
        if isinstance(leaf.sharding, NamedSharding)
    }


def _shardings(state: Any, placed: dict[tuple, Any]) -> Any:
    """Where a state's arrays lie: as the parameters of the same path and shape do, and all others on every device."""
    mesh = next(iter(placed.values())).sharding.mesh

    def of(path: tuple, leaf: Any) -> Any:
        shape = leaf.form.shape if is_held(leaf) else leaf.shape
        parameter = next((placed[path[at:]] for at in range(len(path) + 1) if path[at:] in placed), None)
        spec: tuple = ()
        if parameter is not None and parameter.shape == shape:
            spec = (*parameter.sharding.spec, *(None,) * len(shape))[: len(shape)]
        if not is_held(leaf):
            return NamedSharding(mesh, PartitionSpec(*spec))
        outer, blocks = len(leaf.form.outer), leaf.scales.shape[-1]
        spec = spec[: outer + 1]
        if blocks % _parts(mesh, spec[outer:]):
            spec = spec[:outer]
        lies = NamedSharding(mesh, PartitionSpec(*spec))
        return Held(lies, lies, leaf.form)

    return jax.tree_util.tree_map_with_path(of, state, is_leaf=is_held)


def _parts(mesh: Mesh, spec: tuple) -> int:
    """In how many parts the dimensions of a spec are cut."""
    return math.prod(mesh.shape[axis] for axis in jax.tree.leaves(spec))


def _numbers(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _is_large(leaf: Any) -> bool:
    """Of 32 bits at most: updates in float64 are not to be rounded in float32."""
    return leaf.size >= LEAST and jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize <= 4


def _is_known(node: Any) -> bool:
    return type(node) in MOMENTS


def _is_named(node: Any) -> bool:
    return isinstance(node, tuple) and hasattr(node, "_fields")
