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
    """A value on its way into an equation, with what the original program said about it.

    It bends if it is one number, once or repeated, that the low dtype can hold: it takes the dtype of its company.
    """

    value: Any
    aval: Any
    bends: bool = False

    @property
    def castable(self) -> bool:
        return is_castable(self.aval)


def cast(operand: Operand, dtype: np.dtype) -> Any:
    """The operand in another dtype; a literal stays a literal."""
    is_array = isinstance(operand.value, jax.Array)
    return to(operand.value, dtype) if is_array else np.asarray(operand.value).astype(dtype)


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


def remapped(eqn: Any, body: Callable[..., list[Any]], values: Iterable[Any]) -> Sequence[Any]:
    """The results of a shard_map's equation with another function for each device, of the same operands and results."""
    params = eqn.params
    mapped = jax.shard_map(
        body,
        mesh=params["mesh"],
        in_specs=params["in_specs"],
        out_specs=list(params["out_specs"]),
        axis_names=set(params["newly_manual_axes"]),
        check_vma=params["check_vma"],
    )
    return mapped(*values)


def low_dot(eqn: Any, low: np.dtype) -> Callable[[Any, Any], Any]:
    """A matrix product of low operands, accumulated in float32 and rounded once.

    Under differentiation the product is asked for a low result instead. A float32 one would have a float32 cotangent,
    so that the backward products would be float32 as well, and a checkpoint policy that saves products would save it
    in float32. The sums are the same: XLA accumulates in float32 either way (tested here on the CPU; the program it
    compiles for an H100 says so too).

    Args:
        eqn: the dot_general equation to run.
        low: the dtype of the operands and of the result.

    Returns:
        A function of the two operands.
    """

    @jax.custom_jvp
    def dot(lhs: Any, rhs: Any) -> Any:
        return to(bind(eqn, [lhs, rhs], preferred_element_type=FLOAT32)[0], low)

    def plain(lhs: Any, rhs: Any) -> Any:
        return bind(eqn, [lhs, rhs], preferred_element_type=low)[0]

    @functools.partial(dot.defjvp, symbolic_zeros=True)
    def rule(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[Any, Any]:
        (lhs, rhs), (d_lhs, d_rhs) = primals, tangents
        terms = [] if isinstance(d_lhs, SymbolicZero) else [plain(d_lhs, rhs)]
        terms += [] if isinstance(d_rhs, SymbolicZero) else [plain(lhs, d_rhs)]
        return plain(lhs, rhs), functools.reduce(lax.add, terms)

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
