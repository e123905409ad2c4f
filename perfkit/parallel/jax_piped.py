"""The stages of a JAX model on the devices of a mesh: one program, in which activations go from device to device.

Stages differ, and so do their weights: each device has its own in one row of an array for each dtype, and takes its
branch of a `lax.switch`. JAX differentiates the whole: gradients go back the way that activations came.

Source: https://docs.jax.dev/en/latest/notebooks/shard_map.html (pipeline parallelism)
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from perfkit._batch import axis_of
from perfkit._errors import InvalidInputError, UnsupportedError
from perfkit.backends.jax_trees import leaves_with_names
from perfkit.parallel.jax_inlined import inlined
from perfkit.parallel.jax_mesh import OnMesh, local, put
from perfkit.parallel.jax_packing import Packing
from perfkit.parallel.jax_stages import Operations
from perfkit.parallel.jax_turns import AXIS, Cuts, turns

if TYPE_CHECKING:
    from perfkit.backends.jax_model import Function, JaxModel


def operations_of(function: Function, params: Any, rest: Any, args: Any, kwargs: Any) -> Operations:
    """What a model computes of one micro-batch.

    Raises:
        UnsupportedError: its state changes in a way that cannot go from micro-batch to micro-batch.
    """
    weights, structure = jax.tree.flatten(params)
    others, around = jax.tree.flatten((rest, args, kwargs))
    found: list[int] = []
    made: list[Any] = []

    def call(*given: Any) -> list[Any]:
        params = jax.tree.unflatten(structure, given[: len(weights)])
        rest, args, kwargs = jax.tree.unflatten(around, given[len(weights) :])
        outputs, new = function(params, rest, *args, **kwargs)
        leaves = jax.tree.leaves(outputs)
        found[:] = [len(leaves)]
        made[:] = [
            (jax.tree.structure(state), [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state)])
            for state in (rest, new)
        ]
        return [*leaves, *jax.tree.leaves(new)]

    closed, parts = inlined(call, weights, others)
    if made[0] != made[1]:
        raise UnsupportedError(
            "the model adds state as it runs, or changes its shape or dtype: a micro-batch could not begin with what "
            "the one before left; train it with data_parallel"
        )
    operations = Operations(closed, parts, found[0])
    names = [name for name, _ in leaves_with_names(rest)[0]]
    handed = {old for number, (old, _) in enumerate(operations.state) if number in operations.carried}
    for number in operations.carried:
        old, new = operations.state[number]
        if not jnp.issubdtype(old.aval.dtype, jnp.floating) or new in handed:
            raise UnsupportedError(
                f"{names[number]} changes with the batch and is no floating-point array of its own, such as a running "
                "statistic: micro-batches could not be averaged; train the model with data_parallel"
            )
    if any(atom is old for atom in closed.jaxpr.outvars[: found[0]] for old in handed):
        raise UnsupportedError("the model returns state that changes with the batch: train it with data_parallel")
    return operations


class Piped(OnMesh):
    """Each device has one stage; batches are shared out along "data" where there is such an axis.

    Args:
        model: whose parameters are whole, and lie where they were.
        shard: devices along "data" each hold a share of their stage's parameters, and gather them for a step.
    """

    scattered = True

    def __init__(self, mesh: Mesh, model: JaxModel, cuts: Cuts, batch_dim: int | None = None, shard: bool = False):
        super().__init__(mesh, batch_dim)
        self.model, self.cuts = model, cuts
        whole = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), model.params)
        self.packing = Packing(whole, cuts.parts, cuts.owned, mesh.shape["data"] if shard else 1)
        self.rows = NamedSharding(mesh, PartitionSpec(AXIS, "data") if shard else PartitionSpec(AXIS))
        self._gathered = jax.jit(self.packing.unpacked, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._whole_rows = jax.jit(lambda packed: packed, out_shardings=NamedSharding(mesh, PartitionSpec(AXIS)))

    def along_data(self, batch_dim: int, shard: bool) -> Piped:
        """The same with the batch shared out along "data"; with `shard` the stages' parameters too."""
        return Piped(self.mesh, self.model, self.cuts, batch_dim, shard)

    def trained(self, params: Any) -> dict[str, jax.Array]:
        return {dtype: put(rows, self.rows) for dtype, rows in self.packing.rows(params).items()}

    def held(self, tree: Any) -> Any:
        """Whole parameters, gathered from all devices: every process calls it."""
        packed, rest = tree
        with jax.ensure_compile_time_eval():  # also where the model is called in a program of the caller's
            return local(self._gathered(packed)), local(rest)

    def pieces(self, tree: Any) -> Any:
        """Each parameter on the device that has its stage, without sending anything; stacks of several are gathered."""
        packed, rest = tree
        if any(row is not None for _, row in self.cuts.parts):
            return self.held(tree)
        leaves: dict[int, Any] = {}
        if self.packing.shares > 1:
            packed = self._whole_rows(packed)
        for stage, owned in enumerate(self.cuts.owned):
            device = self.mesh.devices.reshape(len(self.cuts.owned), -1)[stage, 0]
            if device.process_index == jax.process_index():
                leaves |= self.packing.weights(stage, {dtype: _row(rows, device) for dtype, rows in packed.items()})
                continue
            for index in owned:
                about = self.packing.forms[index].shape, SingleDeviceSharding(device), []
                leaves[index] = jax.make_array_from_single_device_arrays(*about, dtype=self.packing.forms[index].dtype)
        return self._tree([leaves[index] for index in range(len(self.packing.forms))]), local(rest)

    def _tree(self, leaves: Any) -> Any:
        return jax.tree.unflatten(jax.tree.structure(self.packing.whole), list(leaves))

    def bytes_of(self, params: Any) -> int:
        return sum(rows[0].nbytes for rows in self.packing.rows(params).values()) // self.packing.shares

    def stored(self, state: Any) -> list[jax.Array]:
        return [each for leaf in jax.tree.leaves(state) for each in self._whole(leaf)]

    def loaded(self, state: Any, leaves: list[jax.Array]) -> Any:
        given, found = iter(leaves), []
        for leaf in jax.tree.leaves(state):
            whole = [next(given) for _ in self._whole(leaf)]
            packed = self.trained(self._tree(map(local, whole))) if self._packs(leaf) else {}
            found.append(next(iter(packed.values()), whole[0]))
        return jax.tree.unflatten(jax.tree.structure(state), found)

    def _whole(self, leaf: jax.Array) -> list[jax.Array]:
        """What is packed in a leaf of the state; a leaf that is not packed, by itself."""
        if not self._packs(leaf):
            return [leaf]
        (dtype,) = self.packing.dtypes  # as `_packs` saw to
        return jax.tree.leaves(self._gathered({dtype: leaf}))

    def _packs(self, leaf: jax.Array) -> bool:
        if len(self.packing.dtypes) > 1:
            raise UnsupportedError("checkpoints of stages are there for parameters of one dtype: train without them")
        form = len(self.cuts.owned), self.packing.width(*self.packing.dtypes)
        return leaf.shape == form and getattr(leaf.sharding, "spec", ())[:1] == (AXIS,)

    def function(self, function: Function) -> Function:
        """The model on packed parameters, by the stages of all devices."""

        def run(packed: dict[str, jax.Array], rest: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            return self._run(function, packed, rest, args, kwargs)

        return run

    def _run(self, function: Function, packed: Any, rest: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        cuts, parts = self.cuts, self.mesh.shape.get("data", 1) if self.batch_dim is not None else 1
        micro_batches = cuts.micro_batches * parts
        inputs, structure = jax.tree.flatten((args, kwargs))
        count = inputs[cuts.batched].shape[cuts.batch_dim]
        if count % micro_batches:
            raise InvalidInputError(
                f"a batch of {count} rows (dimension {cuts.batch_dim}) cannot be shared by {micro_batches} "
                "micro-batches evenly: drop the last batch of an epoch where it is smaller, or fill it up"
            )
        dims = [axis_of(jnp.shape(leaf), count, cuts.batch_dim) for leaf in inputs]
        rows = count // micro_batches

        def one(leaf: Any, dim: int | None) -> Any:
            shape = list(jnp.shape(leaf))
            if dim is not None:
                shape[dim] = rows
            return jax.ShapeDtypeStruct(tuple(shape), jnp.result_type(leaf))

        forms = self.packing.whole
        micro = jax.tree.unflatten(structure, map(one, inputs, dims))
        state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), rest)  # of no mesh
        operations = operations_of(function, forms, state, *micro)
        if len(operations.eqns) != cuts.operations:
            raise UnsupportedError(
                f"the model was cut into stages at {cuts.operations} operations, and has {len(operations.eqns)} for "
                "these inputs: call optimize with such ones"
            )
        data = "data" if parts > 1 else None
        given = [PartitionSpec() if dim is None else PartitionSpec(*(None,) * dim, data) for dim in dims]
        made = [PartitionSpec(AXIS, *(None,) * dim, data) for dim in cuts.output_dims]
        leaves, around = jax.tree.flatten(rest)
        body = jax.shard_map(
            partial(turns, operations, self.packing, cuts, dims, (data, parts) if data else None),
            mesh=self.mesh,
            in_specs=(PartitionSpec(AXIS), PartitionSpec(), given),
            out_specs=(made, PartitionSpec()),
            check_vma=False,
        )
        found, new = body(packed, leaves, inputs)
        changed = {*operations.alone, *operations.carried}
        new = [new[number] if number in changed else leaf for number, leaf in enumerate(leaves)]
        outputs, _ = jax.eval_shape(function, forms, rest, *args, **kwargs)
        outputs = jax.tree.unflatten(jax.tree.structure(outputs), [stages[-1] for stages in found])
        return outputs, jax.tree.unflatten(around, new)


def _row(rows: jax.Array, device: Any) -> jax.Array:
    """The row of an array that a device of this process holds."""
    return next(shard.data for shard in rows.addressable_shards if shard.device == device)[0]
