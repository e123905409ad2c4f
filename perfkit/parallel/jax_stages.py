"""A JAX model cut into stages: the operations of its jaxpr in order, what they cost, each stage as a function."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from perfkit.backends.jax_autocast_casting import bind
from perfkit.backends.jax_rewriting import context_of
from perfkit.parallel.balance import Costs, spans
from perfkit.parallel.jax_inlined import Part

REPEATS = 3
BACKWARD = 2
"""A backward takes twice as long as its forward: a product for each of a product's two operands."""

BESIDES_WEIGHT = 3
"""Gradient, and what an optimizer such as Adam keeps of each weight."""


DRAWS = "random_bits"
"""The primitive that draws random numbers: it takes time, which counts as its stage's."""


class Made(NamedTuple):
    """What a variable is made of: its equation; parameters; the batch; which leaves of the state."""

    eqn: Any
    weights: bool = False
    batch: bool = False
    state: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Operations:
    """The operations of a model on one micro-batch, in order.

    Leaves of its state that change are of two kinds. Those that change by themselves, such as the counters of random
    numbers, are known for every micro-batch beforehand. Those that change with the batch, such as running statistics,
    belong to one stage, which carries them from micro-batch to micro-batch.

    Args:
        closed: the jaxpr; its inputs are the parameters, then the state, then the batch.
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

    @property
    def state(self) -> list[tuple[Any, Any]]:
        """The variables of the leaves of the state, before and after."""
        jaxpr = self.closed.jaxpr
        new = jaxpr.outvars[self.outputs :]
        return list(zip(jaxpr.invars[self.parameters : self.parameters + len(new)], new, strict=True))

    @cached_property
    def alone(self) -> tuple[int, ...]:
        """The leaves of the state that change by themselves."""
        found = {number: new for number, (old, new) in enumerate(self.state) if new is not old}
        found = {number: self._of(new) for number, new in found.items()}
        found = {number: made for number, made in found.items() if not made.weights and not made.batch}
        while True:
            fixed = {number for number, (old, new) in enumerate(self.state) if new is old} | found.keys()
            kept = {number: made for number, made in found.items() if made.state <= fixed}
            if len(kept) == len(found):
                return tuple(found)
            found = kept

    @cached_property
    def carried(self) -> tuple[int, ...]:
        """The leaves of the state that change with the batch."""
        state = enumerate(self.state)
        return tuple(number for number, (old, new) in state if new is not old and number not in self.alone)

    @property
    def draws(self) -> bool:
        """Whether it draws random numbers."""
        return any(eqn.primitive.name == DRAWS for eqn in self.closed.jaxpr.eqns)

    @cached_property
    def _made(self) -> dict[Any, Made]:
        jaxpr, made = self.closed.jaxpr, {}
        behind = self.parameters + len(self.state)
        for index, var in enumerate(jaxpr.invars):
            number = frozenset([index - self.parameters]) if self.parameters <= index < behind else frozenset()
            made[var] = Made(None, index < self.parameters, index >= behind, number)
        made |= dict.fromkeys(jaxpr.constvars, Made(None))
        for eqn in jaxpr.eqns:
            of = [made[atom] for atom in eqn.invars if not isinstance(atom, Literal)]
            about = any(each.weights for each in of), any(each.batch for each in of)
            made |= dict.fromkeys(eqn.outvars, Made(eqn, *about, frozenset().union(*(each.state for each in of))))
        return made

    def _of(self, atom: Any) -> Made:
        return Made(None) if isinstance(atom, Literal) else self._made[atom]

    @cached_property
    def _everywhere(self) -> set[Any]:
        """The variables that any stage computes for itself: made of weights alone, or of inputs alone and no floats."""
        jaxpr = self.closed.jaxpr
        carried = {self.state[number][0] for number in self.carried}
        found = {*jaxpr.constvars, *jaxpr.invars} - carried
        for eqn in jaxpr.eqns:
            known = all(isinstance(atom, Literal) or atom in found for atom in eqn.invars)
            if not known or eqn.primitive.name == DRAWS:
                continue
            for var in eqn.outvars:
                _, weights, batch, state = self._made[var]
                floats = jnp.issubdtype(var.aval.dtype, jnp.floating)
                if not (batch or state) or not (weights or floats):
                    found.add(var)
        return found

    def _anywhere(self, var: Any) -> bool:
        return var in self._everywhere

    def maker(self, var: Any) -> Any:
        """The equation of a variable that any stage may compute."""
        eqn, weights, batch, state = self._made[var]
        assert self._anywhere(var) or not (weights or batch or state & set(self.carried)), var
        return eqn

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
            elif self._anywhere(var) and (maker := self._made[var].eqn) is not None:
                waiting += [atom for atom in maker.invars if not isinstance(atom, Literal)]
        return found

    def _kept(self, eqn: Any) -> Iterator[Any]:
        """What must be in one stage of that which an equation reads or makes: layers' weights, and carried state."""
        yield from (self.layers[each] if self.layers else each for each in self.weights(eqn))
        for number in self.carried:
            old, new = self.state[number]
            if any(atom is old for atom in eqn.invars) or any(var is new for var in eqn.outvars):
                yield "state", number

    def keepers(self, places: Sequence[int]) -> dict[int, int]:
        """By leaf of the carried state the stage that has it."""
        found = dict.fromkeys(self.carried, 0)  # what only the batch tells, any stage may have
        for stage, (start, end) in enumerate(spans(places, len(self.eqns))):
            kept = [each for eqn in self.eqns[start:end] for each in self._kept(eqn)]
            found |= {number: stage for number in self.carried if ("state", number) in kept}
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

    def reach(self) -> dict[Any, tuple[int, int]]:
        """Of what must be in one stage, such as a layer's weights, the first and the last operation that it is for."""
        found: dict[Any, tuple[int, int]] = {}
        for index, eqn in enumerate(self.eqns):
            for kept in self._kept(eqn):
                found[kept] = found.get(kept, (index,))[0], index
        return found

    def places(self) -> dict[int, int]:
        """Where it can be cut, with the bytes that are sent there."""
        reach, found = self.reach().values(), {}
        for place in range(1, len(self.eqns)):
            crossing = self.crossing(place)
            floats = all(jnp.issubdtype(var.aval.dtype, jnp.floating) for var in crossing)
            if crossing and floats and not any(first < place <= last for first, last in reach):
                found[place] = sum(_bytes(var.aval) for var in crossing)
        return found

    def costs(self, args: Sequence[Any], trains: bool) -> Costs:
        """Times of the equations, each run by itself, and what they keep."""
        took: dict[int, float] = {}
        jaxpr, consts = self.closed.jaxpr, self.closed.consts
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
        for eqn in jaxpr.eqns:
            given = [atom.val if isinstance(atom, Literal) else values[atom] for atom in eqn.invars]
            alike = f"{eqn.primitive} {eqn.params} {[(jnp.shape(each), jnp.result_type(each)) for each in given]}"
            took[id(eqn)], found = quickest(_program(Form(alike, eqn)), given)
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

    def stage(
        self, start: int, end: int, keeps: Sequence[int] = ()
    ) -> Callable[[dict[int, Any], Sequence[Any], Sequence[Any]], tuple[list[Any], dict[int, Any]]]:
        """`stage(weights by number, received, state and batch)`.

        Args:
            keeps: the leaves of the carried state that are this stage's.

        Returns:
            What goes on, or of the last stage the outputs; and the new state that is this stage's, by number.
        """
        received = self.crossing(start) if start else []
        last = end == len(self.eqns)
        sent = list(self.closed.jaxpr.outvars[: self.outputs]) if last else self.crossing(end)

        def run(
            weights: dict[int, Any], arrived: Sequence[Any], others: Sequence[Any]
        ) -> tuple[list[Any], dict[int, Any]]:
            invars = self.closed.jaxpr.invars
            values = {invars[index]: weight for index, weight in weights.items()}
            values |= dict(zip(invars[self.parameters :], others, strict=True))
            values |= dict(zip(received, arrived, strict=True))
            found = Values(self, values)
            for eqn in self.eqns[start:end]:
                found.compute(eqn)
            return list(map(found, sent)), {number: found(self.state[number][1]) for number in keeps}

        return run

    def advanced(self, state: Sequence[Any]) -> list[Any]:
        """The state after one micro-batch, as far as it changes by itself."""
        found = Values(self, dict(zip((old for old, _ in self.state), state, strict=True)))
        return [found(new) if number in self.alone else state[number] for number, (_, new) in enumerate(self.state)]

    def layout(self, place: int) -> list[Any]:
        """The forms of what is sent at a place."""
        return [var.aval for var in self.crossing(place)]


class Values:
    """The numbers of variables; what any stage may compute, it computes when it is asked for.

    Args:
        operations: whose variables they are.
        values: those that are known.
    """

    def __init__(self, operations: Operations, values: dict[Any, Any]):
        self.operations = operations
        self.values = dict(zip(operations.closed.jaxpr.constvars, operations.closed.consts, strict=True)) | values

    def __call__(self, atom: Any) -> Any:
        if isinstance(atom, Literal):
            return atom.val
        if atom not in self.values:
            self.compute(self.operations.maker(atom))
        return self.values[atom]

    def compute(self, eqn: Any) -> None:
        given = list(map(self, eqn.invars))
        with context_of(eqn):
            self.values.update(zip(eqn.outvars, bind(eqn, given), strict=True))


@dataclass(frozen=True)
class Form:
    """An equation by what it looks like."""

    alike: str
    eqn: Any = field(compare=False)


@lru_cache(maxsize=256)
def _program(form: Form) -> Callable:
    """Equations that look alike are compiled once, also for the next way of cutting a model."""
    return jax.jit(lambda *given: bind(form.eqn, given))


def quickest(program: Callable, given: Sequence[Any]) -> tuple[float, Any]:
    """The least time of some calls, in seconds, the first one left out; and what they give."""
    times = []
    for _ in range(1 + REPEATS):
        began = time.perf_counter()
        found = jax.block_until_ready(program(*given))
        times.append(time.perf_counter() - began)
    return min(times[1:]), found


def _bytes(aval: Any) -> int:
    return math.prod(aval.shape) * aval.dtype.itemsize
