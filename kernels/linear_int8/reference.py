"""`linear_int8` in plain operations that torch and JAX have alike: what the other implementations are tested against.

Integer products are exact: in float64 in torch, which has no integer product on a GPU, in int32 in JAX, which has no
float64 unless asked. float32 operations after them are in the order of the formula, each rounded once.
"""

from __future__ import annotations

import importlib
from typing import Any

from perfkit.kernels.linear_int8.problem import Problem

LEAST = 1e-30
"""A row whose largest magnitude is not above this is taken for zero: 127 / largest would not fit into float32."""


def quantize(xp: Any, x_MK: Any) -> tuple[Any, Any]:
    """Each row as integers in [-127, 127], still float32, and its scale: (M, K), (M, 1); see the package's head.

    Args:
        xp: torch or jax.numpy.
        x_MK: float32.
    """
    largest = xp.amax(xp.abs(x_MK), -1)[..., None]
    usable = (largest > LEAST) & (largest < float("inf"))
    divisor = xp.where(usable, largest, 1.0)
    # not 127 / divisor: torch computes that as 127 times the reciprocal, rounded twice
    inverse = xp.where(usable, xp.full_like(divisor, 127.0) / divisor, 0.0)
    scale = xp.where(usable, largest / 127, xp.where(largest <= LEAST, 0.0, float("nan")))
    return xp.where(usable, xp.round(x_MK * inverse), 0.0), scale


def sums(problem: Problem, q_MK: Any, weight_NK: Any) -> Any:
    """The integer products, exact: (M, N)."""
    if problem.framework == "torch":
        return q_MK.double() @ weight_NK.double().t()
    return q_MK.astype("int32") @ weight_NK.astype("int32").T


def finish(problem: Problem, xp: Any, sums_MN: Any, x_scale: Any, weight_scale: Any, bias: Any) -> Any:
    """What is done with the sums: scales, bias, activation; (M, N) in float32.

    Args:
        x_scale: (M, 1) or (1, 1).
    """
    y = sums_MN * x_scale * weight_scale
    if bias is not None:
        y = y + bias
    return xp.where(y < 0, 0.0, y) if problem.activation == "relu" else y  # which keeps NaN


def linear_int8(problem: Problem, x_MK: Any, weight: Any, weight_scale: Any, bias: Any, x_scale: Any) -> Any:
    """(M, N) in float32.

    Args:
        x_MK: int8, or any float dtype.
        weight, weight_scale: (N, K) and (N,).
        bias: (N,) in float32, or None.
        x_scale: (M, 1) or (1, 1); None of a float x.
    """
    torch = problem.framework == "torch"
    xp = importlib.import_module("torch" if torch else "jax.numpy")
    if x_scale is None:
        x_MK, x_scale = quantize(xp, x_MK.float() if torch else x_MK.astype("float32"))
    exact = sums(problem, x_MK, weight)
    return finish(problem, xp, exact.float() if torch else exact.astype("float32"), x_scale, weight_scale, bias)
