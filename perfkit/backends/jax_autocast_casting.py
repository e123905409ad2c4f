"""Moving values between float32 and the low dtype, with derivatives that do the same."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from perfkit.backends.jax_autocast_rules import FLOAT32, is_castable


class Operand(NamedTuple):
    """A value on its way into an equation, with what the original program knew about it."""

    value: Any
    aval: Any
    constant: float | None = None

    @property
    def castable(self) -> bool:
        return is_castable(self.aval)


def cast(operand: Operand, dtype: np.dtype) -> Any:
    """The operand in another dtype."""
    if operand.constant is not None and operand.aval.shape == ():
        return np.asarray(operand.constant, dtype)  # a literal stays a literal
    return to(operand.value, dtype)


def to(value: Any, dtype: Any) -> Any:
    return value if value.dtype == dtype else lax.convert_element_type(value, dtype)


def restore(value: Any, aval: Any) -> Any:
    """The value back in the dtype that the original program had it in."""
    return to(value, aval.dtype) if is_castable(aval) else value


def restore_all(values: Sequence[Any], avals: Sequence[Any]) -> list[Any]:
    return [restore(value, aval) for value, aval in zip(values, avals, strict=True)]


def bind(eqn: Any, values: Iterable[Any], **changes: Any) -> Sequence[Any]:
    """The results of an equation on new values, with some of its parameters changed."""
    params = eqn.primitive.get_bind_params({**eqn.params, **changes})
    results = eqn.primitive.bind(*values, **params)
    return results if eqn.primitive.multiple_results else [results]


def low_dot(eqn: Any, low: np.dtype) -> Callable[[Any, Any], Any]:
    """A matrix product of low operands, accumulated in float32 and rounded once.

    The derivative is JAX's own, except that it asks for low tangents: transposed, it multiplies two low operands, where
    the product itself, transposed, would meet its low operand with a float32 cotangent.

    Args:
        eqn: the dot_general equation to run.
        low: the dtype of the operands and of the result.

    Returns:
        A function of the two operands.
    """

    @jax.custom_jvp
    def dot(lhs: Any, rhs: Any) -> Any:
        return to(bind(eqn, [lhs, rhs], preferred_element_type=FLOAT32)[0], low)

    @functools.partial(dot.defjvp, symbolic_zeros=True)
    def rule(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[Any, Any]:
        (lhs, rhs), (d_lhs, d_rhs) = primals, tangents
        pairs = [(d_lhs, rhs)] if not isinstance(d_lhs, SymbolicZero) else []
        pairs += [(lhs, d_rhs)] if not isinstance(d_rhs, SymbolicZero) else []
        terms = [bind(eqn, pair, preferred_element_type=low)[0] for pair in pairs]
        return dot(lhs, rhs), functools.reduce(lax.add, terms)

    return dot


@jax.custom_jvp
def low_copy(wide: Any, low: Any) -> Any:  # noqa: ARG001 (only the tangent comes from the float32 original)
    """The low copy of a float32 value, whose derivative is that of the original."""
    return low


@functools.partial(low_copy.defjvp, symbolic_zeros=True)
def _low_copy_jvp(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[Any, Any]:
    low, d_wide = primals[1], tangents[0]
    zero = isinstance(d_wide, SymbolicZero)
    return low, lax.full_like(low, 0) if zero else to(d_wide, low.dtype)
