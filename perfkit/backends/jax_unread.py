"""Loops of which single steps of single rows are read, in jaxprs: up to where each row is needed.

A model that pads its texts to one length picks each row's output at its last real step, by a gather. Where nothing else
reads what a loop computes, a kernel for it may leave out the steps behind. So may one that feeds such a loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from perfkit.backends.jax_autocast_casting import bind
from perfkit.backends.jax_autocast_rules import scan_sizes

_CALLS = ("jit", "pjit")
_SAME = ("convert_element_type", "copy", "copy_p")


class _Scope:
    """A jaxpr, and the call that it is of in the one around it.

    Args:
        jaxpr: open.
        consts: of its constvars; None of the outermost one, whose values are given.
        call: the equation that calls it; None for the outermost one.
        outer: the jaxpr around it.
    """

    def __init__(self, jaxpr: Any, consts: Sequence[Any] | None = None, call: Any = None, outer: _Scope | None = None):
        self.jaxpr, self.call, self.outer = jaxpr, call, outer
        self.consts = dict(zip(jaxpr.constvars, consts or (), strict=False))
        self.made_by = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}
        self._cheap: dict[Any, bool] = {}
        self.uses: dict[Any, list[tuple[Any, int]]] = {}
        for eqn in jaxpr.eqns:
            for at, atom in enumerate(eqn.invars):
                if not isinstance(atom, Literal):
                    self.uses.setdefault(atom, []).append((eqn, at))

    def called(self, eqn: Any) -> _Scope:
        """The jaxpr that a call is of."""
        closed = eqn.params["jaxpr"]
        return _Scope(closed.jaxpr, closed.consts, eqn, self)

    def entering(self, var: Any) -> Any:
        """The variable around it that one of its inputs is; None for other variables."""
        inputs = self.jaxpr.invars
        return self.call.invars[inputs.index(var)] if self.call is not None and var in inputs else None

    def is_cheap(self, atom: Any) -> bool:
        """Whether whole numbers, and nothing else, make it of the outermost jaxpr's inputs."""
        if isinstance(atom, Literal) or atom in self.consts:
            return True
        if not (jnp.issubdtype(atom.aval.dtype, jnp.integer) or atom.aval.dtype == jnp.bool_):
            return False
        if (around := self.entering(atom)) is not None:
            assert self.outer is not None
            return self.outer.is_cheap(around)
        if atom not in self._cheap:  # what is read twice, step after step, would be looked through again and again
            eqn = self.made_by.get(atom)
            self._cheap[atom] = eqn is None or (not eqn.effects and all(map(self.is_cheap, eqn.invars)))
        return self._cheap[atom]

    def value(self, atom: Any, given: Mapping[Any, Any], made: dict[Any, Any]) -> Any:
        """Its value, from those of the outermost jaxpr's variables that are known; what is computed goes to `made`."""
        if isinstance(atom, Literal):
            return atom.val
        if self.outer is None and atom in given:
            return given[atom]
        if atom in self.consts:
            return self.consts[atom]
        if (around := self.entering(atom)) is not None:
            assert self.outer is not None
            return self.outer.value(around, given, made)
        if (self, atom) not in made:  # calls that are alike share their variables
            eqn = self.made_by[atom]
            operands = [self.value(each, given, made) for each in eqn.invars]
            made.update(zip([(self, var) for var in eqn.outvars], bind(eqn, operands), strict=True))
        return made[self, atom]


@dataclass(frozen=True, eq=False)
class _Gather:
    """One read of steps: the equation, where it stands, and which dimensions of what it reads are time and batch."""

    scope: _Scope
    eqn: Any
    time: int
    batch: int

    def ends(self, given: Mapping[Any, Any], made: dict[Any, Any]) -> jax.Array:
        """(B,), int32: one more than the last step of each row that it reads."""
        numbers, (operand, indices) = self.eqn.params["dimension_numbers"], self.eqn.invars
        steps, rows = operand.aval.shape[self.time], operand.aval.shape[self.batch]
        at = self.scope.value(indices, given, made)
        last = jnp.clip(at[..., numbers.start_index_map.index(self.time)], 0, steps - 1).astype(jnp.int32) + 1
        if self.batch in numbers.operand_batching_dims:
            place = numbers.start_indices_batching_dims[numbers.operand_batching_dims.index(self.batch)]
            return jnp.moveaxis(last, place, 0).reshape(rows, -1).max(1)
        of_row = jnp.clip(at[..., numbers.start_index_map.index(self.batch)], 0, rows - 1)
        return jnp.ones(rows, jnp.int32).at[of_row.ravel()].max(last.ravel())


class Unread:
    """What is read of the loops in a jaxpr.

    Args:
        jaxpr: open.
    """

    def __init__(self, jaxpr: Any):
        self._scope = _Scope(jaxpr)
        self._reads: dict[Any, list[_Gather]] = {}
        for eqn in reversed(jaxpr.eqns):
            if eqn.primitive.name == "scan" and (reads := self._of(eqn)):
                self._reads[id(eqn)] = reads

    def ends(self, eqn: Any, given: Mapping[Any, Any]) -> jax.Array | None:
        """(B,), int32: how many steps of each row of a scan (T, B, features) are needed; None where all are.

        Args:
            eqn: the scan.
            given: the values of the jaxpr's variables that are known so far.
        """
        found: jax.Array | None = None
        made: dict[Any, Any] = {}
        for read in self._reads.get(id(eqn), ()):
            ends = read.ends(given, made)
            found = ends if found is None else jnp.maximum(found, ends)
        return found

    def _of(self, eqn: Any) -> list[_Gather] | None:
        """The reads of a scan's outputs; None where something else is read of it."""
        _, n_carry = scan_sizes(eqn.params)
        states, outputs = eqn.outvars[:n_carry], eqn.outvars[n_carry:]
        if eqn.params["reverse"] or any(self._is_read(var) for var in states):
            return None
        found: list[_Gather] = []
        for var in filter(self._is_read, outputs):
            reads = self._walk(self._scope, var, 0, 1) if var.aval.ndim == 3 else None
            if reads is None:
                return None
            found += reads
        return found

    def _is_read(self, var: Any) -> bool:
        return var in self._scope.uses or var in self._scope.jaxpr.outvars

    def _walk(self, scope: _Scope, var: Any, time: int, batch: int) -> list[_Gather] | None:
        """The gathers that read steps of a variable; None where something else reads it."""
        if var in scope.jaxpr.outvars:
            return None
        found: list[_Gather] = []
        for eqn, at in scope.uses.get(var, ()):
            name = eqn.primitive.name
            if name in _SAME:
                reads = self._walk(scope, eqn.outvars[0], time, batch)
            elif name == "transpose":
                order = eqn.params["permutation"]
                reads = self._walk(scope, eqn.outvars[0], order.index(time), order.index(batch))
            elif name in _CALLS:
                inner = scope.called(eqn)
                reads = self._walk(inner, inner.jaxpr.invars[at], time, batch)
            elif name == "gather":
                reads = (
                    [_Gather(scope, eqn, time, batch)] if at == 0 and _is_of_steps(eqn, time, batch, scope) else None
                )
            elif name == "scan" and at >= sum(scan_sizes(eqn.params)) and (time, batch) == (0, 1):
                reads = self._reads.get(id(eqn))
            else:
                reads = None
            if reads is None:
                return None
            found += reads
        return found


def _is_of_steps(eqn: Any, time: int, batch: int, scope: _Scope) -> bool:
    """Whether a gather reads whole features of single steps of single rows, at indices known beforehand."""
    numbers, sizes, shape = eqn.params["dimension_numbers"], eqn.params["slice_sizes"], eqn.invars[0].aval.shape
    (features,) = {0, 1, 2} - {time, batch}
    if sizes[time] != 1 or sizes[batch] != 1 or sizes[features] != shape[features]:
        return False
    by_index = set(numbers.start_index_map) - {features}  # of which all are read, from the first on
    in_turn = numbers.operand_batching_dims == (batch,) and by_index == {time}
    return (in_turn or by_index == {time, batch}) and scope.is_cheap(eqn.invars[1])
