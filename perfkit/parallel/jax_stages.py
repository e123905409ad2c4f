"""A JAX model cut into stages: the operations of its jaxpr in order, what they cost, each stage as a function."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from perfkit.backends.jax_autocast_casting import bind
from perfkit.backends.jax_autocast_rewrite import context_of
from perfkit.parallel.balance import Costs
from perfkit.parallel.jax_inlined import Part

REPEATS = 3
BACKWARD = 2
"""A backward takes twice as long as its forward: a product for each of a product's two operands."""

BESIDES_WEIGHT = 3
"""Gradient, and what an optimizer such as Adam keeps of each weight."""


@dataclass(frozen=True)
class Operations:
    """The operations of a model on one micro-batch, in order.

    Args:
        closed: the jaxpr; its inputs are the parameters, and then all others.
        parts: of which parameter each of the first inputs is, and its row where a stack of blocks was taken apart.
        outputs: how many of its outputs are the model's; behind them is its new state.
        layers: of each part the layer, whose parameters stay together; empty for each by itself.
    """

    closed: Any
    parts: tuple[Part, ...]
    outputs: int
    layers: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        return len(self.parts)

    @cached_property
    def _made(self) -> dict[Any, tuple[Any, bool, bool]]:
        """By variable: its equation; whether it is made of parameters, and of other inputs."""
        jaxpr, made = self.closed.jaxpr, {}
        for index, var in enumerate(jaxpr.invars):
            made[var] = None, index < self.parameters, index >= self.parameters
        made |= dict.fromkeys(jaxpr.constvars, (None, False, False))
        for eqn in jaxpr.eqns:
            of = [made[atom] for atom in eqn.invars if not isinstance(atom, Literal)]
            made |= {var: (eqn, any(each[1] for each in of), any(each[2] for each in of)) for var in eqn.outvars}
        return made

    def _anywhere(self, var: Any) -> bool:
        """Whether any stage computes it for itself: what is made of weights or inputs alone, the latter no floats."""
        _, weights, inputs = self._made[var]
        return not inputs or (not weights and not jnp.issubdtype(var.aval.dtype, jnp.floating))

    @cached_property
    def eqns(self) -> tuple[Any, ...]:
        """The equations that belong to one stage each."""
        return tuple(eqn for eqn in self.closed.jaxpr.eqns if not all(map(self._anywhere, eqn.outvars)))

    def weights(self, eqn: Any) -> set[int]:
        """The parameters that an equation reads, also through what is made of them alone."""
        found: set[int] = set()
        waiting = [atom for atom in eqn.invars if not isinstance(atom, Literal)]
        numbers = {var: index for index, var in enumerate(self.closed.jaxpr.invars[: self.parameters])}
        while waiting:
            var = waiting.pop()
            if var in numbers:
                found.add(numbers[var])
            elif self._anywhere(var) and (maker := self._made[var][0]) is not None:
                waiting += [atom for atom in maker.invars if not isinstance(atom, Literal)]
        return found

    def crossing(self, place: int) -> list[Any]:
        """What is computed before a place and needed behind it."""
        behind: dict[Any, None] = {}
        needed = [atom for eqn in self.eqns[place:] for atom in eqn.invars]
        for atom in [*needed, *self.closed.jaxpr.outvars[: self.outputs]]:
            if not isinstance(atom, Literal):
                behind[atom] = None
        before = {var for eqn in self.eqns[:place] for var in eqn.outvars}
        return [var for var in behind if var in before and not self._anywhere(var)]

    def places(self) -> dict[int, int]:
        """Where it can be cut, with the bytes that are sent there."""
        first: dict[Any, int] = {}
        last: dict[Any, int] = {}
        for index, eqn in enumerate(self.eqns):
            for weight in (self.layers[each] if self.layers else each for each in self.weights(eqn)):
                first.setdefault(weight, index)
                last[weight] = index
        found = {}
        for place in range(1, len(self.eqns)):
            crossing = self.crossing(place)
            floats = all(jnp.issubdtype(var.aval.dtype, jnp.floating) for var in crossing)
            if crossing and floats and not any(first[each] < place <= last[each] for each in first):
                found[place] = sum(_bytes(var.aval) for var in crossing)
        return found

    def costs(self, args: Sequence[Any], trains: bool) -> Costs:
        """Times of the equations, each run by itself, and what they keep."""
        took: dict[int, float] = {}
        programs: dict[str, Callable] = {}  # equations that look alike are compiled once
        jaxpr, consts = self.closed.jaxpr, self.closed.consts
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
        for eqn in jaxpr.eqns:
            given = [atom.val if isinstance(atom, Literal) else values[atom] for atom in eqn.invars]
            alike = f"{eqn.primitive} {eqn.params} {[(jnp.shape(each), jnp.result_type(each)) for each in given]}"
            program = programs.setdefault(alike, jax.jit(lambda *given, eqn=eqn: bind(eqn, given)))
            times = []
            for _ in range(1 + REPEATS):
                began = time.perf_counter()
                found = jax.block_until_ready(program(*given))
                times.append(time.perf_counter() - began)
            took[id(eqn)] = min(times[1:])
            values.update(zip(eqn.outvars, found, strict=True))
        counted: set[int] = set()
        held = []
        for eqn in self.eqns:
            own = self.weights(eqn) - counted
            counted |= own
            weights = sum(_bytes(jaxpr.invars[index].aval) for index in own)
            held.append((1 + BESIDES_WEIGHT * trains) * weights + sum(_bytes(var.aval) for var in eqn.outvars))
        seconds = [(1 + BACKWARD * trains) * took[id(eqn)] for eqn in self.eqns]
        return Costs(seconds, held, self.places())

    def stage(self, start: int, end: int) -> Callable[[dict[int, Any], Sequence[Any], Sequence[Any]], list[Any]]:
        """`stage(weights by number, received, other inputs)`: what goes on, or of the last stage the outputs."""
        jaxpr, consts = self.closed.jaxpr, self.closed.consts
        received = self.crossing(start) if start else []
        last = end == len(self.eqns)
        sent = list(jaxpr.outvars[: self.outputs]) if last else self.crossing(end)

        def run(weights: dict[int, Any], arrived: Sequence[Any], others: Sequence[Any]) -> list[Any]:
            values = dict(zip(jaxpr.constvars, consts, strict=True))
            values |= {jaxpr.invars[index]: weight for index, weight in weights.items()}
            values |= dict(zip(jaxpr.invars[self.parameters :], others, strict=True))
            values |= dict(zip(received, arrived, strict=True))

            def value(atom: Any) -> Any:
                if isinstance(atom, Literal):
                    return atom.val
                if atom not in values:
                    assert self._anywhere(atom), atom
                    compute(self._made[atom][0])
                return values[atom]

            def compute(eqn: Any) -> None:
                given = list(map(value, eqn.invars))
                with context_of(eqn):
                    values.update(zip(eqn.outvars, bind(eqn, given), strict=True))

            for eqn in self.eqns[start:end]:
                compute(eqn)
            return list(map(value, sent))

        return run

    def layout(self, place: int) -> list[Any]:
        """The forms of what is sent at a place."""
        return [var.aval for var in self.crossing(place)]


def _bytes(aval: Any) -> int:
    return math.prod(aval.shape) * aval.dtype.itemsize
