"""`conv2d_int8` in JAX: the C++ kernel as a custom call, or XLA's integer convolution.

    q = clip(round(x / s_x), -127, 127)
    y = the largest in each window of act(float(sum of q w) (s_w s_x) + bias)

Numbers are those of `perfkit.kernels.linear_int8_static.jax_op`.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from perfkit._errors import InvalidInputError
from perfkit.kernels import _int8_jax as shared
from perfkit.kernels._int8 import IN_JAX
from perfkit.kernels._jax import device_of
from perfkit.kernels.conv2d.problem import Options, options
from perfkit.kernels.conv2d.problem import problem as sizes_of
from perfkit.kernels.conv2d_int8.cpu_shape import OP, SOURCE, told
from perfkit.kernels.conv2d_int8.problem import Problem

BINDING = Path(__file__).with_name("cpu_ffi.cpp")
HANDLER, PACK = HANDLERS = ("perfkit_conv2d_int8_xla", "perfkit_conv2d_int8_xla_pack")
FUNCTIONS = ("perfkit_conv2d_int8", "perfkit_conv2d_int8_pack")


def conv2d_int8(
    x: Array,
    weight: Array,
    weight_scale: Array,
    x_scale: Array,
    bias: Array | None = None,
    *,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    activation: str | None = None,
    pool: int | None = None,
    y_scale: Array | None = None,
    out_dtype: Any = jnp.float32,
    implementation: str | None = None,
) -> Array:
    """The largest of each pool x pool window of act(conv(x) + bias), x rounded to the grid of `x_scale`.

    There is no derivative, and asking for one is an error.

    Args:
        x: (N, H, W, I), float32; or uint8, 127 above the grid's integers.
        weight: (height, width, I / groups, O), int8.
        weight_scale: (O,), float32, positive.
        x_scale: (), float32, positive.
        bias: (O,), float32, or None.
        stride, padding, dilation, groups, activation, pool: as in `perfkit.kernels.conv2d.conv2d`.
        y_scale: (), float32, of y's grid, which is uint8 then; None for floats.
        out_dtype: of y without a grid: float32 or bfloat16.
        implementation: "cpu" or "library"; None for the fastest known.

    Returns:
        y: (N, H', W', O).

    Raises:
        InvalidInputError: sizes, dtypes or options that do not go together.
        UnsupportedError: `implementation` cannot take the call, or a derivative is asked for.
    """
    y = "uint8" if y_scale is not None else str(jnp.dtype(out_dtype))
    given = options(stride, padding, dilation, groups, activation, pool)
    made = problem(device_of(x), x.shape, str(x.dtype), weight.shape, given, y)
    shared.check(x, weight, weight_scale, bias, weight.shape[-1])
    ours = OP.choose(made, implementation).implementation == "cpu"
    return by_choice(made, ours, x, weight, weight_scale, x_scale, bias, y_scale)


def problem(device: str, x: tuple[int, ...], dtype: str, weight: tuple[int, ...], given: Options, y: str) -> Problem:
    """The call's problem, of shapes and dtypes. Of one channel x lies NCHW as well, and lanes can be places.

    Raises:
        InvalidInputError: sizes or dtypes that do not go together.
    """
    if y not in ("float32", "bfloat16", "uint8"):
        raise InvalidInputError(f"out_dtype is {y}: expected float32 or bfloat16")
    if len(x) != 4 or len(weight) != 4:
        raise InvalidInputError(
            f"x has {len(x)} dimensions and weight {len(weight)}: expected (N, H, W, C) and (H, W, I, O)"
        )
    sizes = sizes_of(
        given,
        framework="jax",
        device=device,
        dtypes={"x": "float32"},
        image=(x[0], x[3], x[1], x[2]),
        kernel=(weight[3], weight[2], weight[0], weight[1]),
        bias=None,
        channels_last=True,
        needs_grad=False,
    )
    return Problem(sizes, IN_JAX, dtype, sizes.inputs > 1, y, True, IN_JAX if y == "uint8" else None)


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
    sizes = made.sizes
    top, bottom, left, right = sizes.padding
    sums = lax.conv_general_dilated(
        shared.from_bytes(x) if x.dtype == jnp.uint8 else shared.rounded(x, x_scale),
        weight,
        sizes.stride,
        ((top, bottom), (left, right)),
        rhs_dilation=sizes.dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=sizes.groups,
        preferred_element_type=jnp.int32,
    )
    y = shared.finished(sums, weight_scale * x_scale, bias, sizes.activation)
    if sizes.pool > 1:
        window = (1, sizes.pool, sizes.pool, 1)
        y = lax.reduce_window(y, np.array(-np.inf, y.dtype), lax.max, window, window, "VALID")
    return shared.put(y, y_scale, made.y)


def _by_kernel(made: Problem, x, weight, weight_scale, x_scale, bias, y_scale) -> Array:
    numbers = told(made)
    size = library().perfkit_conv2d_int8_packed_bytes(numbers)
    oihw = weight.transpose(3, 2, 0, 1)
    kept = shared.packed(PACK, size, oihw, weight_scale * x_scale, shape=np.array(list(numbers), np.int64))
    bias, scales = shared.numbers(bias, x_scale, y_scale)
    return _call(made)(x, kept, bias, scales)[0]


@functools.lru_cache(maxsize=1024)
def _call(made: Problem):
    """Of however many images."""

    def of(images: int) -> Problem:
        return replace(made, sizes=replace(made.sizes, batch=images))

    size = (*made.sizes.out_size, made.sizes.outputs)
    return shared.called(HANDLER, lambda images: told(of(images)), lambda images: ((images, *size), made.y))


def library() -> ctypes.CDLL:
    """The kernel, known to XLA.

    Raises:
        UnsupportedError: there is no C++ compiler, or it fails.
    """
    found = shared.library(SOURCE, BINDING, HANDLERS, FUNCTIONS)
    found.perfkit_conv2d_int8_packed_bytes.argtypes = (ctypes.c_void_p,)
    found.perfkit_conv2d_int8_packed_bytes.restype = ctypes.c_int64
    return found
