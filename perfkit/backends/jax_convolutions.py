"""Convolutions in the one order of dimensions that XLA's CPU compiler knows a quick way for.

In a program's outermost part it brings others into that order by itself; inside of loops and branches it does not, and
computes them number by number, ten times as slowly (https://github.com/jax-ml/jax/issues/12868). Those of a backward
pass are in another order always.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax import lax

from perfkit.backends.jax_autocast_casting import bind
from perfkit.backends.jax_rewriting import rewritten


def channels_last(function: Callable) -> Callable:
    """`function` with every convolution as one of (batch, *space, channels) by (*space, in, out)."""
    return rewritten(function, {"conv_general_dilated": _in_order})


def _in_order(eqn: Any, given: list[Any]) -> list[Any]:
    lhs, rhs = given
    numbers = eqn.params["dimension_numbers"]
    space = range(len(numbers.lhs_spec) - 2)
    last = len(space) + 1
    features, kernel, made = (
        (numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1]),
        (*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0]),
        (numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1]),
    )
    outer = (0, last, *(at + 1 for at in space))
    order = lax.ConvDimensionNumbers(outer, (last, last - 1, *space), outer)
    (found,) = bind(eqn, [lax.transpose(lhs, features), lax.transpose(rhs, kernel)], dimension_numbers=order)
    return [lax.transpose(found, [made.index(dim) for dim in range(last + 1)])]
