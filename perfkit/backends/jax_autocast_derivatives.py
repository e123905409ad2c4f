"""Functions with derivative rules of their own (`jax.custom_jvp`, `jax.custom_vjp`) under autocast.

The caller's rules are reached by differentiating the original call, and rewritten like anything else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import jaxpr_as_fun

from perfkit.backends.jax_autocast_casting import Operand, bind, to
from perfkit.backends.jax_autocast_rules import runs

if TYPE_CHECKING:
    from perfkit.backends.jax_autocast_rewrite import Rewriter


def custom_jvp(rewriter: Rewriter, eqn: Any, operands: list[Operand]) -> Sequence[Any]:
    inner = eqn.params["call_jaxpr"]
    rewritten = rewriter.rewrite(inner, operands)
    call = jax.custom_jvp(jaxpr_as_fun(rewritten))

    @functools.partial(call.defjvp, symbolic_zeros=True)
    def rule(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        moving = [at for at, tangent in enumerate(tangents) if not isinstance(tangent, SymbolicZero)]

        def pushforward(primals: Sequence[Any], directions: Sequence[Any]) -> list[Any]:
            along, start = _along(eqn, primals, moving)
            _, moved, outputs = jax.jvp(along, start, list(directions), has_aux=True)
            return [*outputs, *moved]

        traced = jax.make_jaxpr(pushforward)(inner.in_avals, [inner.in_avals[at] for at in moving])
        results = rewriter.of_derivatives.evaluate(traced, [*primals, *(tangents[at] for at in moving)])
        outputs, moved = runs(results, len(rewritten.out_avals))
        outputs = [to(value, aval.dtype) for value, aval in zip(outputs, rewritten.out_avals, strict=True)]
        rest = iter(moved)
        return outputs, [to(next(rest), o.dtype) if _is_real(o) else _no_tangent(o) for o in outputs]

    return call(*(operand.value for operand in operands))


def custom_vjp(rewriter: Rewriter, eqn: Any, operands: list[Operand]) -> Sequence[Any]:
    inner, closed_over = eqn.params["call_jaxpr"], eqn.params["num_consts"]
    rewritten = rewriter.rewrite(inner, operands)
    # Values that the caller's function closed over stay closed over, so that differentiating them raises as before.
    outer, values = runs([operand.value for operand in operands], closed_over)
    call = jax.custom_vjp(lambda *args: jaxpr_as_fun(rewritten)(*outer, *args))
    moving = [at for at in range(closed_over, len(operands)) if _is_real(operands[at].aval)]
    real_outputs = [at for at, aval in enumerate(inner.out_avals) if _is_real(aval)]

    @functools.cache
    def rules_as_written() -> tuple[Any, Any]:
        """The jaxprs of the caller's forward and backward rules, at the dtypes they were written for."""

        def forward(*primals: Any) -> tuple[list[Any], Any]:
            along, start = _along(eqn, primals, moving)
            _, pullback, outputs = jax.vjp(along, *start, has_aux=True)
            return outputs, pullback

        going, (_, pullback) = jax.make_jaxpr(forward, return_shape=True)(*inner.in_avals)
        structure = jax.tree.structure(pullback)
        residuals = going.out_avals[len(inner.out_avals) :]
        cotangents = [inner.out_avals[at] for at in real_outputs]
        backward = jax.make_jaxpr(lambda leaves, cts: jax.tree.unflatten(structure, leaves)(cts))
        return going, backward(residuals, cotangents)

    def forward(*args: Any) -> tuple[list[Any], list[Any]]:
        results = rewriter.evaluate(rules_as_written()[0], [*outer, *args])
        outputs, residuals = runs(results, len(inner.out_avals))
        return [to(value, aval.dtype) for value, aval in zip(outputs, rewritten.out_avals, strict=True)], residuals

    def backward(residuals: list[Any], cotangents: Sequence[Any]) -> tuple[Any, ...]:
        given = [*residuals, *(cotangents[at] for at in real_outputs)]
        gradients = dict(zip(moving, rewriter.evaluate(rules_as_written()[1], given), strict=True))
        wanted = range(closed_over, len(operands))
        return tuple(to(gradients[at], operands[at].value.dtype) if at in gradients else None for at in wanted)

    call.defvjp(forward, backward)
    return call(*values)


def _along(eqn: Any, primals: Sequence[Any], moving: Sequence[int]) -> tuple[Callable, list[Any]]:
    """An equation as a function of the operands at `moving` alone, and their values.

    The function returns the outputs that have a derivative, and all outputs beside them.
    """

    def along(*moved: Any) -> tuple[list[Any], list[Any]]:
        full = list(primals)
        for at, value in zip(moving, moved, strict=True):
            full[at] = value
        outputs = list(bind(eqn, full))
        return [output for output in outputs if _is_real(output)], outputs

    return along, [primals[at] for at in moving]


def _is_real(value: Any) -> bool:
    """Whether the value has a derivative."""
    return jax.numpy.issubdtype(value.dtype, jax.numpy.inexact)


def _no_tangent(value: Any) -> np.ndarray:
    return np.zeros(value.shape, jax.dtypes.float0)
