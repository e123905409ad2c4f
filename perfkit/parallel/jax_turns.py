"""What each device of a pipeline does: its stage of one micro-batch after the other, as they arrive."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from perfkit.parallel.balance import spans
from perfkit.parallel.jax_inlined import Part
from perfkit.parallel.jax_packing import Packing
from perfkit.parallel.jax_stages import Operations

AXIS = "pipeline"

State = dict[int, jax.Array]
"""Leaves of a model's state by their numbers."""

Turn = tuple[jax.Array, State, list[jax.Array]]
"""What a stage makes of a micro-batch: what goes on, the state that it carries, the model's outputs."""


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


def turns(
    operations: Operations,
    packing: Packing,
    cuts: Cuts,
    dims: Sequence[int | None],
    data: tuple[str, int] | None,
    packed: dict[str, jax.Array],
    rest: list[jax.Array],
    inputs: list[Any],
) -> tuple[list[jax.Array], list[jax.Array]]:
    """One device's part of a batch: as many turns as it takes until the last stage has had the last micro-batch.

    State that changes by itself is in each micro-batch what it were if all of them, those of other pipelines too, came
    one after the other: so each draws random numbers of its own. Other state goes from one micro-batch of this pipeline
    to the next, and is averaged over the pipelines.

    Args:
        dims: of each input the dimension of the rows; None where each micro-batch takes all of it.
        data: the axis along which pipelines share the batch, and their number.
        packed: this device's row of the parameters.
        rest: leaves of the model's state.

    Returns:
        Of each output of the model its rows, behind a dimension of 1; what counts is the last stage's. And the leaves
        of the new state.
    """
    stages, count = len(cuts.owned), cuts.micro_batches
    axis, pipelines = data or ("", 1)
    first = count * lax.axis_index(axis) if data else 0
    after, series = _series(operations, rest, count * pipelines)
    keepers = operations.keepers(cuts.places)
    here, row = lax.axis_index(AXIS), {dtype: rows[0] for dtype, rows in packed.items()}
    parted = [leaf if dim is None else _parted(leaf, dim, count) for leaf, dim in zip(inputs, dims, strict=True)]
    outputs = [var.aval for var in operations.closed.jaxpr.outvars[: operations.outputs]]
    sent = [operations.layout(place) for place in cuts.places]
    dtype = jnp.result_type(*(form.dtype for forms in sent for form in forms))
    nothing = jnp.zeros(max(sum(math.prod(form.shape) for form in forms) for forms in sent), dtype)

    def branch(stage: int, start: int, end: int) -> Callable:
        keeps = [number for number, keeper in keepers.items() if keeper == stage]
        run = operations.stage(start, end, keeps)

        def on_rows(row: dict, buffer: jax.Array, carried: State, state: list, mine: list) -> Turn:
            received = _unflattened(buffer, sent[stage - 1]) if stage else []
            found, new = run(packing.weights(stage, row), received, [*state, *mine])
            if stage == stages - 1:
                return nothing, carried | new, found
            return _flattened(found, nothing), carried | new, _zeros(outputs)

        return on_rows

    places = spans(cuts.places, len(operations.eqns))
    branches = [branch(stage, *place) for stage, place in enumerate(places)]
    branches.append(lambda _row, _buffer, carried, *_: (nothing, carried, _zeros(outputs)))  # nothing to work on yet

    def turn(carry: tuple[jax.Array, State], time: jax.Array) -> tuple[tuple[jax.Array, State], list[jax.Array]]:
        buffer, carried = carry
        number = time - here
        at = jnp.clip(number, 0, count - 1)
        mine = [
            leaf if dim is None else lax.dynamic_index_in_dim(leaf, at, keepdims=False)
            for leaf, dim in zip(parted, dims, strict=True)
        ]
        stage = jnp.where(at == number, here, stages)
        known = {index: lax.dynamic_index_in_dim(leaf, first + at, keepdims=False) for index, leaf in series.items()}
        carried = lax.stop_gradient(carried)
        state = [(known | carried).get(index, leaf) for index, leaf in enumerate(rest)]
        work = jax.checkpoint(lambda *given: lax.switch(stage, branches, *given), prevent_cse=False)
        onwards, carried, found = work(row, buffer, carried, state, mine)
        return (lax.ppermute(onwards, AXIS, [(each, each + 1) for each in range(stages - 1)]), carried), found

    begun = {index: rest[index] for index in keepers}
    (_, carried), made = lax.scan(turn, (nothing, begun), jnp.arange(count + stages - 1))
    for index, leaf in carried.items():
        leaf = lax.psum(jnp.where(here == keepers[index], lax.stop_gradient(leaf), 0), AXIS)
        after[index] = lax.pmean(leaf, axis) if data else leaf
    rows = [_joined(leaf[stages - 1 :], dim)[None] for leaf, dim in zip(made, cuts.output_dims, strict=True)]
    return rows, after


def _series(operations: Operations, rest: list[jax.Array], count: int) -> tuple[list[jax.Array], State]:
    """The state after so many micro-batches, as far as it changes by itself; and those leaves before each of them."""
    if not operations.alone:
        return list(rest), {}

    def one(state: list[jax.Array], _: None) -> tuple[list[jax.Array], State]:
        return operations.advanced(state), {index: state[index] for index in operations.alone}

    return lax.scan(one, list(rest), length=count)


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
    sizes = [math.prod(form.shape) for form in forms]
    parts = lax.split(buffer, [*sizes, buffer.size - sum(sizes)])
    return [part.reshape(form.shape).astype(form.dtype) for part, form in zip(parts, forms, strict=False)]


def _zeros(forms: Sequence[Any]) -> list[jax.Array]:
    return [jnp.zeros(form.shape, form.dtype) for form in forms]
