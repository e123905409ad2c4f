"""The stages of a JAX model on the devices of a mesh: one program, in which activations go from device to device.

Stages differ, and so do their weights: each device has its own in one row of an array for each dtype, and takes its
branch of a `lax.switch`. JAX differentiates the whole: gradients go back the way that activations came.

Source: https://docs.jax.dev/en/latest/notebooks/shard_map.html (pipeline parallelism)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from perfkit._errors import InvalidInputError, UnsupportedError
from perfkit.parallel.balance import spans
from perfkit.parallel.batch import axis_of
from perfkit.parallel.jax_mesh import OnMesh, local, put
from perfkit.parallel.jax_stages import Operations, Part, inlined

if TYPE_CHECKING:
    from perfkit.backends.jax_model import Function, JaxModel

AXIS = "pipeline"


@dataclass(frozen=True)
class Cuts:
    """Where a model is cut, and how batches go through it.

    Args:
        places: before which operations.
        operations: how many there are.
        parts: what parameters were taken apart into: number and row of each part.
        owned: numbers of the parts that each stage has.
        micro_batches: into how many parts the rows of a device are divided.
        batch_dim: the dimension of the inputs that is divided.
        output_dims: of each output the dimension of the rows.
    """

    places: tuple[int, ...]
    operations: int
    parts: tuple[Part, ...]
    owned: tuple[tuple[int, ...], ...]
    micro_batches: int
    batch_dim: int
    output_dims: tuple[int, ...]


def operations_of(function: Function, params: Any, rest: Any, args: Any, kwargs: Any) -> Operations:
    """What a model computes of one micro-batch.

    Raises:
        UnsupportedError: it changes its other state.
    """
    weights, structure = jax.tree.flatten(params)
    others, around = jax.tree.flatten((rest, args, kwargs))
    found: list[int] = []

    def call(*given: Any) -> list[Any]:
        params = jax.tree.unflatten(structure, given[: len(weights)])
        rest, args, kwargs = jax.tree.unflatten(around, given[len(weights) :])
        outputs, new = function(params, rest, *args, **kwargs)
        leaves = jax.tree.leaves(outputs)
        found[:] = [len(leaves)]
        return [*leaves, *jax.tree.leaves(new)]

    closed, parts = inlined(call, weights, others)
    count, state = len(parts), len(jax.tree.leaves(rest))
    if list(closed.jaxpr.outvars[found[0] :]) != list(closed.jaxpr.invars[count : count + state]):
        raise UnsupportedError(
            "the model changes state as it runs (running statistics, or the counter of its random numbers), which "
            "every micro-batch would do: train it with data_parallel, or without batch norm and dropout"
        )
    return Operations(closed, parts, found[0])


class Piped(OnMesh):
    """Each device has one stage; batches are shared out along "data" where there is such an axis.

    Args:
        model: whose parameters are whole, and lie where they were.
    """

    scattered = True

    def __init__(self, mesh: Mesh, model: JaxModel, cuts: Cuts, batch_dim: int | None = None):
        super().__init__(mesh, batch_dim)
        self.model, self.cuts = model, cuts
        leaves, self.structure = jax.tree.flatten(model.params)
        self.whole = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
        self.forms = [
            jax.ShapeDtypeStruct(leaves[index].shape[row is not None :], leaves[index].dtype)
            for index, row in cuts.parts
        ]
        self._gathered = jax.jit(self._unpacked, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def along_data(self, batch_dim: int) -> Piped:
        """The same with the batch shared out along "data"."""
        return Piped(self.mesh, self.model, self.cuts, batch_dim)

    def slices(self, stage: int) -> dict[int, tuple[str, int, int]]:
        """Where in its row each parameter of a stage is: dtype, start and end."""
        found, ends = {}, dict.fromkeys({str(form.dtype) for form in self.forms}, 0)
        for index in self.cuts.owned[stage]:
            name, size = str(self.forms[index].dtype), math.prod(self.forms[index].shape)
            found[index] = name, ends[name], ends[name] + size
            ends[name] += size
        return found

    def rows(self, params: Any) -> dict[str, np.ndarray]:
        """Parameters, or what is shaped like them, packed: by dtype one row for each stage."""
        whole = [np.asarray(leaf) for leaf in jax.tree.leaves(params)]
        parts = [whole[index] if row is None else whole[index][row] for index, row in self.cuts.parts]
        where = [self.slices(stage) for stage in range(len(self.cuts.owned))]
        packed = {}
        for dtype in dict.fromkeys(str(form.dtype) for form in self.forms):
            width = max(end for each in where for name, _, end in each.values() if name == dtype)
            rows = np.zeros((len(where), width), jnp.dtype(dtype))
            for stage, each in enumerate(where):
                for index, (name, start, end) in each.items():
                    if name == dtype:
                        rows[stage, start:end] = parts[index].ravel()
            packed[dtype] = rows
        return packed

    def trained(self, params: Any) -> dict[str, jax.Array]:
        sharding = NamedSharding(self.mesh, PartitionSpec(AXIS))
        return {dtype: put(rows, sharding) for dtype, rows in self.rows(params).items()}

    def held(self, tree: Any) -> Any:
        """Whole parameters, gathered from all devices: every process calls it."""
        packed, rest = tree
        with jax.ensure_compile_time_eval():  # also where the model is called in a program of the caller's
            return local(self._gathered(packed)), local(rest)

    def _unpacked(self, packed: dict[str, jax.Array]) -> Any:
        parts: dict[int, Any] = {}
        for stage in range(len(self.cuts.owned)):
            parts |= self._weights(stage, {dtype: rows[stage] for dtype, rows in packed.items()})
        leaves: dict[int, Any] = {}
        for number, (index, row) in enumerate(self.cuts.parts):
            if row is None:
                leaves[index] = parts[number]
            else:
                leaves.setdefault(index, []).append(parts[number])
        whole = [jnp.stack(leaf) if isinstance(leaf, list) else leaf for leaf in leaves.values()]
        return jax.tree.unflatten(self.structure, whole)

    def _weights(self, stage: int, row: dict[str, Any]) -> dict[int, Any]:
        return {
            index: row[dtype][start:end].reshape(self.forms[index].shape)
            for index, (dtype, start, end) in self.slices(stage).items()
        }

    def pieces(self, tree: Any) -> Any:
        """Each parameter on the device that has its stage, without sending anything; stacks of several are gathered."""
        packed, rest = tree
        if any(row is not None for _, row in self.cuts.parts):
            return self.held(tree)
        leaves: dict[int, Any] = {}
        for stage, owned in enumerate(self.cuts.owned):
            device = self.mesh.devices.reshape(len(self.cuts.owned), -1)[stage, 0]
            if device.process_index == jax.process_index():
                leaves |= self._weights(stage, {dtype: _row(rows, device) for dtype, rows in packed.items()})
                continue
            for index in owned:
                about = self.forms[index].shape, SingleDeviceSharding(device), []
                leaves[index] = jax.make_array_from_single_device_arrays(*about, dtype=self.forms[index].dtype)
        return jax.tree.unflatten(self.structure, [leaves[index] for index in range(len(self.forms))]), local(rest)

    def bytes_of(self, params: Any) -> int:
        return sum(rows[0].nbytes for rows in self.rows(params).values())

    def stored(self, state: Any) -> list[jax.Array]:
        return [each for leaf in jax.tree.leaves(state) for each in self._whole(leaf)]

    def loaded(self, state: Any, leaves: list[jax.Array]) -> Any:
        given, found = iter(leaves), []
        for leaf in jax.tree.leaves(state):
            whole = [next(given) for _ in self._whole(leaf)]
            packed = self.trained(jax.tree.unflatten(self.structure, map(local, whole))) if self._packs(leaf) else {}
            found.append(next(iter(packed.values()), whole[0]))
        return jax.tree.unflatten(jax.tree.structure(state), found)

    def _whole(self, leaf: jax.Array) -> list[jax.Array]:
        """What is packed in a leaf of the state; a leaf that is not packed, by itself."""
        if not self._packs(leaf):
            return [leaf]
        (dtype,) = {str(form.dtype) for form in self.forms}  # as `_packs` saw to
        return jax.tree.leaves(self._gathered({dtype: leaf}))

    def _packs(self, leaf: jax.Array) -> bool:
        if len({str(form.dtype) for form in self.forms}) > 1:
            raise UnsupportedError("checkpoints of stages are there for parameters of one dtype: train without them")
        width = max(end for stage in range(len(self.cuts.owned)) for *_, end in self.slices(stage).values())
        return leaf.shape == (len(self.cuts.owned), width) and leaf.sharding.spec[:1] == (AXIS,)

    def function(self, function: Function) -> Function:
        """The model on packed parameters, by the stages of all devices."""

        def run(packed: dict[str, jax.Array], rest: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            return self._run(function, packed, rest, args, kwargs), rest

        return run

    def _run(self, function: Function, packed: Any, rest: Any, args: Any, kwargs: Any) -> Any:
        cuts, parts = self.cuts, self.mesh.shape.get("data", 1) if self.batch_dim is not None else 1
        inputs, structure = jax.tree.flatten((args, kwargs))
        count = next(leaf for leaf in inputs if hasattr(leaf, "shape")).shape[cuts.batch_dim]
        if count % (cuts.micro_batches * parts):
            raise InvalidInputError(
                f"a batch of {count} rows (dimension {cuts.batch_dim}) cannot be shared by {cuts.micro_batches * parts} "
                "micro-batches evenly: drop the last batch of an epoch where it is smaller, or fill it up"
            )
        dims = [axis_of(jnp.shape(leaf), count, cuts.batch_dim) for leaf in inputs]
        rows = count // (cuts.micro_batches * parts)

        def one(leaf: Any, dim: int | None) -> Any:
            shape = list(jnp.shape(leaf))
            if dim is not None:
                shape[dim] = rows
            return jax.ShapeDtypeStruct(tuple(shape), jnp.result_type(leaf))

        forms = jax.tree.unflatten(self.structure, self.whole)
        micro = jax.tree.unflatten(structure, map(one, inputs, dims))
        operations = operations_of(function, forms, rest, *micro)
        if len(operations.eqns) != cuts.operations:
            raise UnsupportedError(
                f"the model was cut into stages at {cuts.operations} operations, and has {len(operations.eqns)} for "
                "these inputs: call optimize with such ones"
            )
        data = "data" if parts > 1 else None
        given = [PartitionSpec() if dim is None else PartitionSpec(*(None,) * dim, data) for dim in dims]
        made = [PartitionSpec(AXIS, *(None,) * dim, data) for dim in cuts.output_dims]
        body = jax.shard_map(
            partial(self._on_one, operations, dims),
            mesh=self.mesh,
            in_specs=(PartitionSpec(AXIS), PartitionSpec(), given),
            out_specs=made,
            check_vma=False,
        )
        leaves = [stages[-1] for stages in body(packed, jax.tree.leaves(rest), inputs)]
        outputs, _ = jax.eval_shape(function, forms, rest, *args, **kwargs)
        return jax.tree.unflatten(jax.tree.structure(outputs), leaves)

    def _on_one(self, operations: Operations, dims: list, packed: dict, rest: list, inputs: list) -> list[jax.Array]:
        """One device's part: its stage for each micro-batch, as these arrive.

        Returns:
            Of each output of the model its rows, behind a dimension of 1; what counts is the last stage's.
        """
        cuts = self.cuts
        stages, count = len(cuts.owned), cuts.micro_batches
        here, row = lax.axis_index(AXIS), {dtype: rows[0] for dtype, rows in packed.items()}
        parted = [leaf if dim is None else _parted(leaf, dim, count) for leaf, dim in zip(inputs, dims, strict=True)]
        outputs = [var.aval for var in operations.closed.jaxpr.outvars[: operations.outputs]]
        sent = [operations.layout(place) for place in cuts.places]
        dtype = jnp.result_type(*(form.dtype for forms in sent for form in forms))
        nothing = jnp.zeros(max(sum(math.prod(form.shape) for form in forms) for forms in sent), dtype)

        def branch(stage: int, start: int, end: int) -> Callable:
            run = operations.stage(start, end)

            def on_rows(row: dict, buffer: jax.Array, mine: list) -> tuple[jax.Array, list[jax.Array]]:
                received = _unflattened(buffer, sent[stage - 1]) if stage else []
                found = run(self._weights(stage, row), received, [*rest, *mine])
                if stage == stages - 1:
                    return nothing, found
                return _flattened(found, nothing), _zeros(outputs)

            return on_rows

        places = spans(cuts.places, len(operations.eqns))
        branches = [branch(stage, *place) for stage, place in enumerate(places)]
        branches.append(lambda row, buffer, mine: (nothing, _zeros(outputs)))  # while nothing is there to work on

        def turn(buffer: jax.Array, time: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
            number = time - here
            at = jnp.clip(number, 0, count - 1)
            mine = [
                leaf if dim is None else lax.dynamic_index_in_dim(leaf, at, keepdims=False)
                for leaf, dim in zip(parted, dims, strict=True)
            ]
            stage = jnp.where(at == number, here, stages)
            work = jax.checkpoint(lambda *given: lax.switch(stage, branches, *given), prevent_cse=False)
            onwards, found = work(row, buffer, mine)
            return lax.ppermute(onwards, AXIS, [(each, each + 1) for each in range(stages - 1)]), found

        _, made = lax.scan(turn, nothing, jnp.arange(count + stages - 1))
        return [_joined(leaf[stages - 1 :], dim)[None] for leaf, dim in zip(made, cuts.output_dims, strict=True)]


def _row(rows: jax.Array, device: Any) -> jax.Array:
    """The row of an array that a device of this process holds."""
    return next(shard.data for shard in rows.addressable_shards if shard.device == device)[0]


def _parted(leaf: jax.Array, dim: int, count: int) -> jax.Array:
    """Rows in micro-batches, these along a new first dimension."""
    return jnp.moveaxis(leaf.reshape(*leaf.shape[:dim], count, -1, *leaf.shape[dim + 1 :]), dim, 0)


def _joined(leaf: jax.Array, dim: int) -> jax.Array:
    """Micro-batches along the first dimension as rows again."""
    leaf = jnp.moveaxis(leaf, 0, dim)
    return leaf.reshape(*leaf.shape[:dim], -1, *leaf.shape[dim + 2 :])


def _flattened(arrays: Sequence[jax.Array], like: jax.Array) -> jax.Array:
    flat = jnp.concatenate([array.astype(like.dtype).ravel() for array in arrays])
    return jnp.pad(flat, (0, like.size - flat.size))


def _unflattened(buffer: jax.Array, forms: Sequence[Any]) -> list[jax.Array]:
    ends = np.cumsum([math.prod(form.shape) for form in forms])
    parts = [buffer[end - math.prod(form.shape) : end] for form, end in zip(forms, ends, strict=True)]
    return [part.reshape(form.shape).astype(form.dtype) for part, form in zip(parts, forms, strict=True)]


def _zeros(forms: Sequence[Any]) -> list[jax.Array]:
    return [jnp.zeros(form.shape, form.dtype) for form in forms]
