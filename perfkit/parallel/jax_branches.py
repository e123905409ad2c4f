"""The stages of a pipeline as branches of a `lax.switch`: one turn of each, forwards and backwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from perfkit.parallel.balance import spans
from perfkit.parallel.jax_packing import Packing
from perfkit.parallel.jax_stages import Operations

State = dict[int, jax.Array]
"""Leaves of a model's state by their numbers."""

Slots = list[jax.Array]
"""A stage's parameters, one in each, filled up to the size of the largest that any stage has there."""

Turn = tuple[jax.Array, State, list[jax.Array]]
"""What a stage makes of a micro-batch: what goes on, the state that it carries, the model's outputs."""


class Branches:
    """A branch for each stage, and one behind them for turns in which there is nothing to work on.

    What goes from stage to stage is one flat array, as large as the largest cut needs.
    """

    def __init__(self, operations: Operations, packing: Packing, places: Sequence[int]):
        self.packing, self.stages = packing, len(places) + 1
        self.keepers = operations.keepers(places)
        self.outputs = [var.aval for var in operations.closed.jaxpr.outvars[: operations.outputs]]
        self.sent = [operations.layout(place) for place in places]
        self.runs = [
            operations.stage(start, end, [number for number, keeper in self.keepers.items() if keeper == stage])
            for stage, (start, end) in enumerate(spans(places, len(operations.eqns)))
        ]

    def nothing(self) -> jax.Array:
        """What goes from stage to stage where there is nothing yet."""
        dtype = jnp.result_type(*(form.dtype for forms in self.sent for form in forms))
        return jnp.zeros(max(sum(math.prod(form.shape) for form in forms) for forms in self.sent), dtype)

    @cached_property
    def forth(self) -> list[Callable]:
        """`(slots, what arrived, carried state, state, inputs) -> Turn`."""

        def of(stage: int) -> Callable:
            def forth(slots: Slots, arrived: jax.Array, carried: State, state: list, inputs: list) -> Turn:
                sent, new, found = self._turn(stage, self.packing.in_slots(stage, slots), arrived, state, inputs)
                return sent, carried | new, found

            return forth

        def idle(_: Slots, _arrived: jax.Array, carried: State, *_others: Any) -> Turn:
            return self.nothing(), carried, _zeros(self.outputs)

        return [*map(of, range(self.stages)), idle]

    def back(
        self, stage: int, totals: Slots, sent: jax.Array, slots: Slots, arrived: jax.Array, state: list, given: tuple
    ) -> tuple[Slots, jax.Array]:
        """A stage's turn backwards. Activations are computed again.

        Args:
            totals: the gradients of the weights so far.
            sent: the gradient of what the stage sent.
            arrived: what had arrived.
            given: the inputs, and the gradients of the outputs that have some.

        Returns:
            The totals with this turn's gradients, and the gradient of what arrived.
        """
        inputs, outputs = given

        def turn(weights: dict, arrived: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
            sent, _, found = self._turn(stage, weights, arrived, state, inputs)
            return sent, [leaf for leaf in found if jnp.issubdtype(leaf.dtype, jnp.inexact)]

        _, pull = jax.vjp(turn, self.packing.in_slots(stage, slots), arrived)
        gradients, arrived = pull((sent, outputs))
        return self.packing.added(stage, totals, gradients), arrived

    def _turn(self, stage: int, weights: dict, arrived: jax.Array, state: list, inputs: list) -> Turn:
        received = _unflattened(arrived, self.sent[stage - 1]) if stage else []
        found, new = self.runs[stage](weights, received, [*state, *inputs])
        if stage == self.stages - 1:
            return self.nothing(), new, found
        return _flattened(found, self.nothing()), new, _zeros(self.outputs)


def _flattened(arrays: Sequence[jax.Array], like: jax.Array) -> jax.Array:
    flat = jnp.concatenate([array.astype(like.dtype).ravel() for array in arrays])
    return jnp.pad(flat, (0, like.size - flat.size))


def _unflattened(buffer: jax.Array, forms: Sequence[Any]) -> list[jax.Array]:
    sizes = [math.prod(form.shape) for form in forms]
    parts = lax.split(buffer, [*sizes, buffer.size - sum(sizes)])
    return [part.reshape(form.shape).astype(form.dtype) for part, form in zip(parts, forms, strict=False)]


def _zeros(forms: Sequence[Any]) -> list[jax.Array]:
    return [jnp.zeros(form.shape, form.dtype) for form in forms]
