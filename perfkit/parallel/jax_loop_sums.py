"""Sums over the steps of a loop: each device adds up its own, and they meet after the loop.

The gradient of a weight that a `lax.scan` reads at every step is added up step by step in the backward pass. Where the
devices of a mesh have a part of the batch each, XLA's CPU compiler makes every step's sum whole before it goes on: a
text classifier of 128 steps exchanged its gradients 256 times in one training step. Sums with a dimension for the
devices need that once. They are the same sums, in another order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Jaxpr, Literal, Var, jaxpr_as_fun
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from perfkit.backends.jax_autocast_casting import bind
from perfkit.backends.jax_autocast_rules import scan_sizes
from perfkit.backends.jax_rewriting import Rules, bound, evaluated, rewritten
from perfkit.parallel.jax_inlined import inlined

ADDITIONS = ("add", "add_any")
LINEAR = ("broadcast_in_dim", "convert_element_type", "neg", "reduce_sum", "reshape", "squeeze", "transpose")
"""What may stand between a sum over the batch and the one over steps: of a sum it is the sum of its terms'."""


def summed_apart(function: Callable, mesh: Mesh, rows: int) -> Callable:
    """`function` with the sums of its loops over a batch of so many rows apart for each device along "data"."""
    return rewritten(function, _Apart(mesh, rows).rules)


class _Apart:
    """Loops whose sums over the batch have a first dimension for the devices that share it.

    Args:
        mesh: the devices; those along "data" have an equal part of the batch each.
        rows: of the whole batch. A dimension of that length that is summed over is taken for it: another one of the
            same length gives the same sums, with more to send.
    """

    def __init__(self, mesh: Mesh, rows: int):
        self.mesh, self.rows, self.parts = mesh, rows, mesh.shape["data"]
        # What is inside of a shard_map is one device's own already.
        self.rules: Rules = {"scan": self.scanned, "shard_map": bind}

    def scanned(self, eqn: Any, given: list[Any]) -> Sequence[Any]:
        """A loop under the rule; as it is where it adds nothing up over the batch."""
        if eqn.effects:
            return bound(eqn, given, self.rules)
        consts, carry = scan_sizes(eqn.params)
        fixed = [*map(self._gathered, given[:consts])]
        start = [*map(partial(self._by_rows, weights=fixed), given[consts : consts + carry])]
        xs = [self._by_rows(value, first=1) for value in given[consts + carry :]]
        body, _ = inlined(jaxpr_as_fun(eqn.params["jaxpr"]), (), eqn.params["jaxpr"].in_avals)
        sums = _sums(body.jaxpr, consts, carry, self.rows)
        if not sums:
            return bound(eqn, [*fixed, *start, *xs], self.rules)
        kept = list(dict.fromkeys(atom for terms in sums.values() for term in terms for atom in term.made.invars))

        def step(carried: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
            # The body's own sums begin anew at each step, and nobody reads what becomes of them.
            now = [start[at] if at in sums else value for at, value in enumerate(carried)]
            outputs = evaluated(body, [*fixed, *now, *x], self.rules, kept)
            outputs = [*map(partial(self._by_rows, weights=fixed), outputs)]
            ends = len(outputs) - len(kept)
            factors = dict(zip(kept, outputs[ends:], strict=True))
            after = outputs[:carry]
            for at, terms in sums.items():
                after[at] = carried[at]
                for term in terms:
                    operands = [factors[atom] for atom in term.made.invars]
                    after[at] += self._lying(term.apart(operands, self.parts))
            return after, outputs[carry:ends]

        apart = [
            self._lying(jnp.zeros((self.parts, *value.shape), value.dtype)) if at in sums else value
            for at, value in enumerate(start)
        ]
        options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
        carried, ys = lax.scan(step, apart, xs, **options)
        return [start[at] + end.sum(0) if at in sums else end for at, end in enumerate(carried)] + list(ys)

    def _gathered(self, value: Any) -> Any:
        """What every step reads, whole on each device before the loop, unless it is of the batch.

        Left to XLA, a weight that lies in parts is sent at every step. Where there is another axis, that may be meant.
        """
        if self.mesh.size > self.parts or self.rows in jnp.shape(value):
            return value
        return lax.with_sharding_constraint(value, NamedSharding(self.mesh, PartitionSpec()))

    def _by_rows(self, value: Any, first: int = 0, weights: Sequence[Any] = ()) -> Any:
        """Vectors of the rows of the batch, with each device's rows on it; anything else as it lies.

        Left to XLA, what a weight's gradient is made of can lie as the weight does: then it is sent at every step.
        Of a dimension as long as the batch that is another one, the values are the same, with more to send.

        Args:
            first: the first dimension that may be the batch; of what a loop reads step by step, 0 is the step.
            weights: what has the shape of one of these is its gradient.
        """
        shape = jnp.shape(value)[first:]
        if self.rows not in shape or len(shape) < 2 or shape in map(jnp.shape, weights):
            return value
        return self._lying(value, first + shape.index(self.rows))

    def _lying(self, value: Any, axis: int = 0) -> Any:
        """A value in equal parts along "data" by that dimension, and in any along the others."""
        spec: list[Any] = [PartitionSpec.UNCONSTRAINED] * jnp.ndim(value)
        spec[axis] = "data"
        return lax.with_sharding_constraint(value, NamedSharding(self.mesh, PartitionSpec(*spec)))


class Term(NamedTuple):
    """One term of a sum over the steps of a loop.

    Args:
        made: the equation that sums its operands over the batch: a dot_general or a reduce_sum.
        axes: the axis of each operand that is the batch.
        then: the linear equations from there to the sum over steps, in order.
    """

    made: Any
    axes: tuple[int, ...]
    then: tuple[Any, ...]

    def apart(self, operands: Sequence[Any], parts: int) -> Any:
        """The term with a first dimension of so many parts of the batch, each summed by itself."""

        def made(*part: Any) -> Any:
            (value,) = bind(self.made, part)
            for eqn in self.then:
                (value,) = bind(eqn, [value])
            return value

        cut = [
            operand.reshape(*operand.shape[:axis], parts, -1, *operand.shape[axis + 1 :])
            for operand, axis in zip(operands, self.axes, strict=True)
        ]
        return jax.vmap(made, in_axes=self.axes)(*cut)


def _sums(body: Jaxpr, consts: int, carry: int, rows: int) -> dict[int, list[Term]]:
    """The places of the carry to which every step adds sums over so many rows, and which it does not read otherwise."""
    made = {var: eqn for eqn in body.eqns for var in eqn.outvars}
    uses = Counter(atom for eqn in body.eqns for atom in eqn.invars if isinstance(atom, Var))
    uses.update(atom for atom in body.outvars if isinstance(atom, Var))
    pairs = enumerate(zip(body.invars[consts : consts + carry], body.outvars[:carry], strict=True))
    found = {at: _terms(before, after, made, uses, rows) for at, (before, after) in pairs}
    return {at: terms for at, terms in found.items() if terms}


def _terms(before: Var, after: Any, made: dict[Var, Any], uses: Counter, rows: int) -> list[Term]:
    """What is added to `before` to make `after`; nothing where that is not all that happens."""
    if uses[before] != 1 or before is after:
        return []
    waiting, terms, met = [after], [], False
    while waiting:
        atom = waiting.pop()
        eqn = None if isinstance(atom, Literal) else made.get(atom)
        if atom is before:
            met = True
        elif eqn is not None and eqn.primitive.name in ADDITIONS and uses[atom] == 1:
            waiting += eqn.invars
        elif (term := _term(eqn, made, rows)) is not None:
            terms.append(term)
        else:
            return []
    return terms if met else []


def _term(eqn: Any, made: dict[Var, Any], rows: int) -> Term | None:
    """What an equation makes, as linear operations on a sum over so many rows; None where it is no such thing."""
    then: tuple[Any, ...] = ()
    while eqn is not None and not any(isinstance(atom, Literal) for atom in eqn.invars):
        if axes := _summed_axes(eqn, rows):
            return Term(eqn, axes, then)
        if eqn.primitive.name not in LINEAR:
            return None
        then = (eqn, *then)
        eqn = made.get(eqn.invars[0])
    return None


def _summed_axes(eqn: Any, rows: int) -> tuple[int, ...]:
    """Of each operand the axis of so many rows that the equation sums over; () where it does not."""
    if eqn.primitive.name == "reduce_sum":
        summed = [(axis,) for axis in eqn.params["axes"]]
    elif eqn.primitive.name == "dot_general":
        summed = list(zip(*eqn.params["dimension_numbers"][0], strict=True))
    else:
        return ()
    return next((axes for axes in summed if eqn.invars[0].aval.shape[axes[0]] == rows), ())
