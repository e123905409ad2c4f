"""The jaxpr of a model in one piece: calls that only give a name are opened, and stacks of like blocks taken apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend.core import Literal

from perfkit.backends.jax_autocast_casting import bind
from perfkit.backends.jax_autocast_rules import scan_sizes
from perfkit.backends.jax_rewriting import context_of

Part = tuple[int, int | None]
"""Which weight a part is of; and its row, where the weight is a stack that was taken apart."""

INLINED = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr"}
"""Equations that only give an inner function a name, and the parameter that holds it."""


class Stack(list):
    """The rows of an array, one by one."""

    def whole(self) -> Any:
        return lax.concatenate([lax.expand_dims(row, (0,)) for row in self], 0)


def inlined(function: Callable, weights: Sequence[Any], others: Sequence[Any]) -> tuple[Any, tuple[Part, ...]]:
    """The closed jaxpr of `function(*weights, *others)` without calls that only give a name.

    A scan over weights, which is a stack of like blocks, is taken apart into its blocks.

    Returns:
        The jaxpr; and of which weight each of its first inputs is, with its row where a stack was taken apart.
    """
    closed = jax.make_jaxpr(function)(*weights, *others)
    stacked = _scanned(closed.jaxpr, dict(zip(closed.jaxpr.invars, range(len(weights)), strict=False)))
    parts: list[Part] = []
    for index, weight in enumerate(weights):
        parts += [(index, row) for row in range(weight.shape[0])] if index in stacked else [(index, None)]
    forms = [jax.ShapeDtypeStruct(weights[at].shape[row is not None :], weights[at].dtype) for at, row in parts]

    def run(*given: Any) -> list[Any]:
        whole: dict[int, Any] = {}
        for (index, row), part in zip(parts, given[: len(parts)], strict=True):
            if row is None:
                whole[index] = part
            else:
                whole.setdefault(index, Stack()).append(part)
        return _evaluated(closed.jaxpr, closed.consts, [*whole.values(), *given[len(parts) :]])

    return jax.make_jaxpr(run)(*forms, *others), tuple(parts)


def _scanned(jaxpr: Any, weights: dict[Any, int]) -> set[int]:
    """The weights over whose rows a scan goes."""
    found: set[int] = set()
    for eqn in jaxpr.eqns:
        given = [None if isinstance(atom, Literal) else weights.get(atom) for atom in eqn.invars]
        if eqn.primitive.name == "scan":
            consts, carry = scan_sizes(eqn.params)
            found |= {index for index in given[consts + carry :] if index is not None}
        elif (inner := _inner(eqn)) is not None:
            found |= _scanned(inner, {var: at for var, at in zip(inner.invars, given, strict=True) if at is not None})
    return found


def _inner(eqn: Any) -> Any:
    """The open jaxpr of an equation that only gives it a name; None for others."""
    inner = eqn.params.get(INLINED.get(eqn.primitive.name, ""))
    return getattr(inner, "jaxpr", inner)


def _evaluated(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    for eqn in jaxpr.eqns:
        given = [atom.val if isinstance(atom, Literal) else values[atom] for atom in eqn.invars]
        if (inner := _inner(eqn)) is not None:
            found: Sequence[Any] = _evaluated(
                inner, getattr(eqn.params[INLINED[eqn.primitive.name]], "consts", ()), given
            )
        elif eqn.primitive.name == "scan" and any(isinstance(each, Stack) for each in given):
            found = _unrolled(eqn, given)
        else:
            with context_of(eqn):
                found = bind(eqn, [each.whole() if isinstance(each, Stack) else each for each in given])
        values.update(zip(eqn.outvars, found, strict=True))
    outputs = [atom.val if isinstance(atom, Literal) else values[atom] for atom in jaxpr.outvars]
    return [each.whole() if isinstance(each, Stack) else each for each in outputs]


def _unrolled(eqn: Any, given: list[Any]) -> list[Any]:
    consts, carry = scan_sizes(eqn.params)
    fixed, carried, rows = given[:consts], given[consts : consts + carry], given[consts + carry :]
    body, made = eqn.params["jaxpr"], {}
    turns = range(eqn.params["length"])
    for turn in reversed(turns) if eqn.params["reverse"] else turns:
        mine = [
            each[turn] if isinstance(each, Stack) else lax.index_in_dim(each, turn, keepdims=False) for each in rows
        ]
        found = _evaluated(body.jaxpr, body.consts, [*fixed, *carried, *mine])
        carried, made[turn] = found[:carry], found[carry:]
    return [*carried, *(Stack(each).whole() for each in zip(*(made[turn] for turn in turns), strict=True))]
