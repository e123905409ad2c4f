"""Which weights of a JAX model multiply what, and which other weights made that; read from its jaxpr."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jax.extend.core import Literal

from perfkit.pruning.jax_walk import CALLS


@dataclass(frozen=True)
class Made:
    """What a value of a jaxpr is made of.

    Args:
        weights: indices of weights, if it is made of nothing else.
        products: of a value that depends on inputs: the weights whose products it is made of, since the last ones.
    """

    weights: frozenset[int] = frozenset()
    products: frozenset[int] | None = None


@dataclass(frozen=True)
class Use:
    """How a weight multiplies.

    Args:
        out, contracted: its dimensions that the product has, and those that are summed over.
        of: the weights of whose products that is made what it multiplies.
        convolves: whether it is a convolution.
    """

    out: tuple[int, ...]
    contracted: tuple[int, ...]
    of: frozenset[int]
    convolves: bool = False


@dataclass
class Uses:
    """What is found in a jaxpr.

    Attributes:
        first: by weight, its first use; in the order of the program.
        looped: weights that a loop or a branch reads, and how many rounds it has; None where that is not told.
    """

    shapes: Sequence[tuple[int, ...]]
    first: dict[int, Use] = field(default_factory=dict)
    looped: dict[int, int | None] = field(default_factory=dict)

    def walk(self, jaxpr: Any, inputs: Sequence[Made]) -> list[Made]:
        """What each output of a jaxpr, open or closed, is made of."""
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        constants = [Made()] * len(jaxpr.constvars)
        known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *inputs], strict=True))

        def made(atom: Any) -> Made:
            return Made() if isinstance(atom, Literal) else known[atom]

        for eqn in jaxpr.eqns:
            known.update(zip(eqn.outvars, self._equation(eqn, list(map(made, eqn.invars))), strict=True))
        return list(map(made, jaxpr.outvars))

    def _equation(self, eqn: Any, given: list[Made]) -> list[Made]:
        name = eqn.primitive.name
        if name in CALLS:
            return self.walk(eqn.params[CALLS[name]], given)
        if name in ("scan", "while", "cond"):
            rounds = eqn.params.get("length")
            self.looped.update((index, rounds) for made in given for index in made.weights)
            return [Made(products=frozenset())] * len(eqn.outvars)
        if name in ("dot_general", "conv_general_dilated"):
            for at in (1, 0):
                weight, other = given[at], given[1 - at]
                if len(weight.weights) == 1 and weight.products is None and other.products is not None:
                    (index,) = weight.weights
                    self.first.setdefault(index, self._use(eqn, at, index, other.products))
                    return [Made(products=frozenset([index]))]
        flows = [made.products for made in given if made.products is not None]
        if flows:
            return [Made(products=frozenset().union(*flows))] * len(eqn.outvars)
        return [Made(frozenset().union(*(made.weights for made in given)))] * len(eqn.outvars)

    def _use(self, eqn: Any, at: int, index: int, of: frozenset[int]) -> Use:
        shape, numbers = self.shapes[index], eqn.params["dimension_numbers"]
        convolves = eqn.primitive.name == "conv_general_dilated"
        given, own = tuple(eqn.invars[at].aval.shape), tuple(range(len(shape)))
        if given == tuple(shape)[::-1] != tuple(shape):
            own = own[::-1]  # transposed
        elif given != tuple(shape):  # laid out anew: as flax does, outputs come last
            return Use(own[-1:], own[:-1], of, convolves)
        if convolves:
            out, into, *_ = numbers.rhs_spec
            return Use((own[out],), (own[into],), of, convolves)
        summed, batch = numbers[0][at], numbers[1][at]
        out = tuple(dim for at, dim in enumerate(own) if at not in (*summed, *batch))
        return Use(out, tuple(own[at] for at in summed), of)


def uses(jaxpr: Any, shapes: Sequence[tuple[int, ...]], others: int) -> Uses:
    """What becomes of a closed jaxpr's first inputs, weights of these shapes; behind them are `others` more inputs."""
    found = Uses(shapes)
    weights = [Made(frozenset([index])) for index in range(len(shapes))]
    found.walk(jaxpr, [*weights, *[Made(products=frozenset())] * others])
    return found
