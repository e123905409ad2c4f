"""The linear layer of 8-bit activations on a known grid in JAX: the C++ kernel as a custom call, or XLA's integer dot.

    q = clip(round(x (1 / s_x)), -127, 127),    y = act(float(sum of q w) (s_w s_x) + bias)

Sums are exact int32; what follows is float32, each operation rounded once, in that order: results are equal to those of
the library, run operation by operation, bit for bit.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from perfkit._errors import InvalidInputError
from perfkit.kernels import _int8_jax as shared
from perfkit.kernels._int8 import IN_JAX
from perfkit.kernels._jax import device_of
from perfkit.kernels.linear_int8_static.cpu_shape import OP, SOURCE, told
from perfkit.kernels.linear_int8_static.problem import Problem

BINDING = Path(__file__).with_name("cpu_ffi.cpp")
HANDLER, PACK = HANDLERS = ("perfkit_linear_int8_static_xla", "perfkit_linear_int8_static_xla_pack")
FUNCTIONS = ("perfkit_linear_int8_static", "perfkit_linear_int8_static_pack")


def linear(
    x: Array,
    weight: Array,
    weight_scale: Array,
    x_scale: Array,
    bias: Array | None = None,
    *,
    activation: str | None = None,
    y_scale: Array | None = None,
    out_dtype: Any = jnp.float32,
    implementation: str | None = None,
) -> Array:
    """act(x weight + bias), x rounded to the grid of `x_scale`; there is no derivative, and asking for one is an error.

    Args:
        x: (..., K), float32; or uint8, 127 above the grid's integers.
        weight: (K, N), int8.
        weight_scale: (N,), float32, positive.
        x_scale: (), float32, positive.
        bias: (N,), float32, or None.
        activation: None or "relu".
        y_scale: (), float32, of y's grid, which is uint8 then; None for floats.
        out_dtype: of y without a grid: float32 or bfloat16.
        implementation: "cpu" or "library"; None for the fastest known.

    Returns:
        y: (..., N).

    Raises:
        InvalidInputError: sizes, dtypes or options that do not go together.
        UnsupportedError: `implementation` cannot take the call, or a derivative is asked for.
    """
    if weight.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight.shape[0]:
        raise InvalidInputError(
            f"x has shape {list(x.shape)} and weight {list(weight.shape)}: expected (..., K), (K, N)"
        )
    shared.check(x, weight, weight_scale, bias, weight.shape[1])
    y = "uint8" if y_scale is not None else str(jnp.dtype(out_dtype))
    made = problem(device_of(x), x.shape, str(x.dtype), weight.shape, activation, y)
    ours = OP.choose(made, implementation).implementation == "cpu"
    return by_choice(made, ours, x, weight, weight_scale, x_scale, bias, y_scale)


def problem(
    device: str, x: tuple[int, ...], dtype: str, weight: tuple[int, ...], activation: str | None, y: str
) -> Problem:
    """The call's problem, of shapes and dtypes.

    Raises:
        InvalidInputError: an activation or dtype of y that there is not.
    """
    if activation not in (None, "relu") or y not in ("float32", "bfloat16", "uint8"):
        raise InvalidInputError(f"activation is {activation!r} and y {y}: expected None or 'relu', float32 or bfloat16")
    y_grid = IN_JAX if y == "uint8" else None
    return Problem(prod(x[:-1]), *weight, IN_JAX, activation, dtype, y, y_grid, framework="jax", device=device)


def by_choice(
    made: Problem,
    ours: bool,
    x: Array,
    weight: Array,
    weight_scale: Array,
    x_scale: Array,
    bias: Array | None,
    y_scale: Array | None,
) -> Array:
    """y by the kernel, or by the library."""
    given = x, weight, weight_scale, x_scale, bias, y_scale
    return _by_kernel(made, *given) if ours else shared.inference_only(functools.partial(by_library, made))(*given)


def by_library(made: Problem, x, weight, weight_scale, x_scale, bias, y_scale) -> Array:
    """XLA's operations."""
    q = shared.from_bytes(x) if x.dtype == jnp.uint8 else shared.rounded(x, x_scale)
    sums = lax.dot_general(q, weight, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=jnp.int32)
    return shared.put(shared.finished(sums, weight_scale * x_scale, bias, made.activation), y_scale, made.y)


def _by_kernel(made: Problem, x, weight, weight_scale, x_scale, bias, y_scale) -> Array:
    kernel = library()
    size = kernel.perfkit_linear_int8_static_packed_bytes(made.outputs, made.inputs)
    kept = shared.packed(PACK, size, weight.T, weight_scale * x_scale)
    bias, scales = shared.numbers(bias, x_scale, y_scale)
    (y,) = _call(replace(made, rows=0))(x.reshape(made.rows, made.inputs), kept, bias, scales)
    return y.reshape(*x.shape[:-1], made.outputs)


@functools.lru_cache(maxsize=1024)
def _call(made: Problem):
    """Of whatever rows."""
    return shared.called(
        HANDLER, lambda rows: told(replace(made, rows=rows)), lambda rows: ((rows, made.outputs), made.y)
    )


def library() -> ctypes.CDLL:
    """The kernel, known to XLA.

    Raises:
        UnsupportedError: there is no C++ compiler, or it fails.
    """
    found = shared.library(SOURCE, BINDING, HANDLERS, FUNCTIONS)
    found.perfkit_linear_int8_static_packed_bytes.argtypes = (ctypes.c_int64, ctypes.c_int64)
    found.perfkit_linear_int8_static_packed_bytes.restype = ctypes.c_int64
    return found
