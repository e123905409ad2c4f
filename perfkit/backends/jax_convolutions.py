"""Convolutions in the one order of dimensions that XLA's CPU compiler knows a quick way for.

In a program's outermost part it brings others into that order by itself; inside of loops and branches it does not, and
computes them number by number, ten times as slowly (https://github.com/jax-ml/jax/issues/12868). Those of a backward
pass are in another order always.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from perfkit.backends.jax_autocast_casting import bind
from perfkit.backends.jax_autocast_rewrite import context_of


def channels_last(function: Callable) -> Callable:
    """`function` with every convolution as one of (batch, *space, channels) by (*space, in, out)."""

    @functools.wraps(function, updated=())
    def ordered(*args: Any) -> Any:
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        found = _evaluated(closed.jaxpr, closed.consts, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), found)

    return ordered


def _evaluated(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    for eqn in jaxpr.eqns:
        given = [atom.val if isinstance(atom, Literal) else values[atom] for atom in eqn.invars]
        with context_of(eqn):
            if eqn.primitive.name == "conv_general_dilated":
                results = [_in_order(eqn, *given)]
            else:
                results = bind(
                    eqn, given, **{name: _within(value) for name, value in eqn.params.items() if _has(value)}
                )
        values.update(zip(eqn.outvars, results, strict=True))
    return [atom.val if isinstance(atom, Literal) else values[atom] for atom in jaxpr.outvars]


def _in_order(eqn: Any, lhs: Any, rhs: Any) -> Any:
    numbers = eqn.params["dimension_numbers"]
    space = range(len(numbers.lhs_spec) - 2)
    last = len(space) + 1
    given, kernel, made = (
        (numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1]),
        (*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0]),
        (numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1]),
    )
    outer = (0, last, *(at + 1 for at in space))
    order = lax.ConvDimensionNumbers(outer, (last, last - 1, *space), outer)
    (found,) = bind(eqn, [lax.transpose(lhs, given), lax.transpose(rhs, kernel)], dimension_numbers=order)
    return lax.transpose(found, [made.index(dim) for dim in range(last + 1)])


def _has(value: Any) -> bool:
    """Whether a parameter of an equation holds a convolution."""
    if isinstance(value, (tuple, list)):
        return any(map(_has, value))
    inner = getattr(value, "jaxpr", value)
    return isinstance(inner, Jaxpr) and any(
        eqn.primitive.name == "conv_general_dilated" or any(map(_has, eqn.params.values())) for eqn in inner.eqns
    )


def _within(value: Any) -> Any:
    """The same parameter, with the convolutions of its jaxprs in order."""
    if isinstance(value, (tuple, list)):
        return type(value)(_within(each) if _has(each) else each for each in value)
    inner, consts = (value.jaxpr, value.consts) if isinstance(value, ClosedJaxpr) else (value, ())
    closed = jax.make_jaxpr(lambda *args: _evaluated(inner, consts, args))(*(var.aval for var in inner.invars))
    return closed if isinstance(value, ClosedJaxpr) else closed.jaxpr
