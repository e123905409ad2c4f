"""What each device of a pipeline does: its stage of one micro-batch after the other, as they arrive."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from perfkit.parallel.jax_branches import Branches, Slots, State
from perfkit.parallel.jax_inlined import Part
from perfkit.parallel.jax_packing import Packing
from perfkit.parallel.jax_stages import Operations

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
        batched: the number of an input, as they are flat, that is of the batch: its length there tells the rows.
        output_dims: of each output the dimension of the rows.
    """

    places: tuple[int, ...]
    operations: int
    parts: tuple[Part, ...]
    owned: tuple[tuple[int, ...], ...]
    micro_batches: int
    batch_dim: int
    batched: int
    output_dims: tuple[int, ...]


class Batch(NamedTuple):
    """What a device's micro-batches begin with, beside weights.

    Args:
        inputs: leaves, those with rows with micro-batches along a new first dimension.
        series: state that changes by itself, before each micro-batch.
        rest: the leaves of the model's state.
    """

    inputs: list[Any]
    series: State
    rest: list[jax.Array]


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
    series = {index: lax.dynamic_slice_in_dim(leaf, first, count) for index, leaf in series.items()}
    here, row = lax.axis_index(AXIS), {dtype: rows[0] for dtype, rows in packed.items()}
    parted = [leaf if dim is None else _parted(leaf, dim, count) for leaf, dim in zip(inputs, dims, strict=True)]
    slots = lax.switch(here, [partial(packing.spread, stage) for stage in range(stages)], row)
    branches = Branches(operations, packing, cuts.places)
    made, carried = _along(branches, dims, count)(slots, Batch(parted, series, rest))
    for index, leaf in carried.items():
        leaf = lax.psum(jnp.where(here == branches.keepers[index], lax.stop_gradient(leaf), 0), AXIS)
        after[index] = lax.pmean(leaf, axis) if data else leaf
    rows = [_joined(leaf[stages - 1 :], dim)[None] for leaf, dim in zip(made, cuts.output_dims, strict=True)]
    return rows, after


def _along(
    branches: Branches, dims: Sequence[int | None], count: int
) -> Callable[[Slots, Batch], tuple[list[jax.Array], State]]:
    """All turns of a device: of its weights and batch, what the model's outputs are after each, and the carried state.

    Its derivative is written out: a stage adds the gradients of its weights to those of the micro-batches before where
    they lie, so that a turn touches nothing but what the stage has, and a turn without work nothing at all. JAX's own
    derivative of a loop makes arrays for all that any stage may have in every turn, and adds them to others.
    """
    stages = branches.stages
    onwards = [(each, each + 1) for each in range(stages - 1)]
    backwards = [(each + 1, each) for each in range(stages - 1)]
    times: Any = np.arange(count + stages - 1)

    def at(batch: Batch, carried: State, number: jax.Array) -> tuple[list[jax.Array], list[Any]]:
        """The state and the inputs of a micro-batch."""
        inputs = [leaf if dim is None else _entry(leaf, number) for leaf, dim in zip(batch.inputs, dims, strict=True)]
        known = {index: _entry(leaf, number) for index, leaf in batch.series.items()} | carried
        return [known.get(index, leaf) for index, leaf in enumerate(batch.rest)], inputs

    def forth(slots: Slots, batch: Batch) -> tuple[tuple[list[jax.Array], State], tuple[jax.Array, State]]:
        """Outputs and carried state; and what each turn was given: what arrived, and the carried state."""
        here = lax.axis_index(AXIS)

        def turn(given: tuple[jax.Array, State], time: jax.Array) -> tuple[Any, Any]:
            _, carried = given
            number = jnp.clip(time - here, 0, count - 1)
            stage = jnp.where(number == time - here, here, stages)
            sent, carried, found = lax.switch(stage, branches.forth, slots, *given, *at(batch, carried, number))
            return (lax.ppermute(sent, AXIS, onwards), lax.stop_gradient(carried)), (found, given)

        begun = {index: lax.stop_gradient(batch.rest[index]) for index in branches.keepers}
        (_, carried), (found, given) = lax.scan(turn, (branches.nothing(), begun), times)
        return (found, carried), given

    @jax.custom_vjp
    def along(slots: Slots, batch: Batch) -> tuple[list[jax.Array], State]:
        return forth(slots, batch)[0]

    def kept(slots: Any, batch: Any) -> tuple[Any, Any]:
        others = any(leaf.perturbed for leaf in jax.tree.leaves(batch))
        slots, batch = jax.tree.map(lambda leaf: leaf.value, (slots, batch))
        found, given = forth(slots, batch)
        ours = not others and all(jnp.issubdtype(slot.dtype, jnp.floating) for slot in slots)
        return found, (slots, batch, given if ours else None)

    def back(known: Any, cotangents: Any) -> tuple[Slots, Any]:
        slots, batch, given = known
        found, carried = jax.tree.map(_numbers, cotangents)
        if given is None:  # someone differentiates by the inputs
            return jax.vjp(lambda *of: forth(*of)[0], slots, batch)[1]((found, carried))

        here, given = lax.axis_index(AXIS), (*given, [leaf for leaf in found if leaf.dtype != jax.dtypes.float0])

        def turn(carried: tuple[Slots, jax.Array], time: jax.Array) -> tuple[Any, None]:
            totals, sent = carried
            carried = totals, lax.ppermute(sent, AXIS, backwards)
            number = time - here
            works = (number >= 0) & (number < count)
            for stage in range(stages):

                def back(number: jax.Array, carried: tuple[Slots, jax.Array], stage: int = stage) -> Any:
                    arrived, state, outputs = jax.tree.map(lambda leaf: _entry(leaf, number + stage), given)
                    state, inputs = at(batch, state, number)
                    return branches.back(stage, *carried, slots, arrived, state, (inputs, outputs))

                # A loop that runs once or not at all: XLA adds to what loops carry where it lies, and copies what goes
                # through a conditional. Everything depends on its counter, or it would be computed outside.
                carried = lax.fori_loop(number, number + (works & (here == stage)), back, carried)
            return carried, None

        begun = jax.tree.map(jnp.zeros_like, slots), branches.nothing()
        (totals, _), _ = lax.scan(turn, begun, times, reverse=True)
        return totals, None

    along.defvjp(kept, back, symbolic_zeros=True)
    return along


def _entry(leaf: jax.Array, number: jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(leaf, number, keepdims=False)


def _numbers(cotangent: Any) -> Any:
    return np.zeros(cotangent.shape, cotangent.dtype) if isinstance(cotangent, SymbolicZero) else cotangent


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
