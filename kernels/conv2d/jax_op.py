"""`conv2d` in JAX: gradients, and how vmap and sharded programs see the kernels.

A kernel is a black box to JAX: `custom_vjp` gives it gradients, `by_rows` lets vmap fold calls into the batch, and
sharded programs give each device some of the images. The gradient of weights sums over all images: it is computed whole
on each device. The gradients of x and of the weights are calls of their own, so that one that nobody uses is dropped.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from perfkit._errors import InvalidInputError, UnsupportedError
from perfkit.kernels import conv2d as op
from perfkit.kernels._jax import by_rows, device_of, processors
from perfkit.kernels._op import Choice
from perfkit.kernels.conv2d import cpu_shape, reference
from perfkit.kernels.conv2d.problem import Options, Problem, check_ranks, options, problem, resolved

BINDING = Path(__file__).with_name("cpu_ffi.cpp")
HANDLERS = ("perfkit_conv2d_xla_forward", "perfkit_conv2d_xla_image", "perfkit_conv2d_xla_weight")
PASSES = ("perfkit_conv2d_forward", "perfkit_conv2d_backward")


def conv2d(x, weight, bias, stride, padding, dilation, groups, activation, pool, implementation) -> Array:
    """See `perfkit.kernels.conv2d.conv2d`."""
    given = options(stride, padding, dilation, groups, activation, pool)
    for name, array in (("weight", weight), ("bias", bias)):
        if not isinstance(array, (Array, np.ndarray)) and (array is not None or name == "weight"):
            raise InvalidInputError(f"{name} is a {type(array).__name__}: expected a JAX array, as x is")
    made = problem_of(x, weight, bias, given)
    choice = op.OP.choose(made, implementation)
    if choice.implementation == "library":
        return _by_library(made, x, weight, bias)
    if choice.implementation == "reference":
        return reference.conv2d(made, x, weight, bias)
    return _by_kernel(made, choice, x, weight, bias)


def problem_of(x: Array, weight: Array, bias: Array | None, given: Options) -> Problem:
    """The call's problem. That its gradient will be asked for is not known beforehand in JAX."""
    check_ranks("jax", x.ndim, weight.ndim)
    arrays = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    height, width, of_group, outputs = weight.shape
    padding = resolved(given, x.shape[1:3], (height, width))
    return problem(
        replace(given, padding=padding),
        framework="jax",
        device=device_of(x),
        dtypes={name: array.dtype.name for name, array in arrays.items()},
        image=(x.shape[0], x.shape[3], *x.shape[1:3]),
        kernel=(outputs, of_group, height, width),
        bias=None if bias is None else bias.shape,
        channels_last=True,
        needs_grad=False,
    )


def _by_library(made: Problem, x: Array, weight: Array, bias: Array | None) -> Array:
    """XLA's operations. ReLU after the pool is the same in value and gradient, and less work."""
    y = _convolved(made, x, weight)
    y = y if bias is None else y + bias
    if made.pool > 1:
        window = (1, made.pool, made.pool, 1)
        y = lax.reduce_window(y, np.array(-np.inf, y.dtype), lax.max, window, window, "VALID")
    return jax.nn.relu(y) if made.activation == "relu" else y


def _convolved(made: Problem, x: Array, weight: Array) -> Array:
    top, bottom, left, right = made.padding
    return lax.conv_general_dilated(
        x,
        weight,
        made.stride,
        ((top, bottom), (left, right)),
        rhs_dilation=made.dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=made.groups,
    )


# ---- Kernels ---------------------------------------------------------------------------------------------------------


def _no_second_derivative(_made, _choice, _primals, _tangents):
    raise UnsupportedError(
        "perfkit's convolution kernels have no second derivative: pass implementation='library', whose operations JAX "
        "differentiates as often as wanted"
    )


def _once(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, of a problem, a choice and arrays, which is a part of the first derivative and has none itself."""
    opaque = jax.custom_jvp(function, nondiff_argnums=(0, 1))
    opaque.defjvp(_no_second_derivative)
    return opaque


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _by_kernel(made: Problem, choice: Choice, x: Array, weight: Array, bias: Array | None) -> Array:
    return _forward(made, choice)(x, weight, bias)[0]


@_once
def _kept(made: Problem, choice: Choice, x: Array, weight: Array, bias: Array | None):
    y, *argmax = _forward(replace(made, needs_grad=True), choice)(x, weight, bias)
    return y, (x, weight, bias, argmax[0] if argmax else None)


@_once
def _gradients(made: Problem, choice: Choice, kept, d_y: Array):
    x, weight, bias, argmax = kept
    run = _cpu_backward if choice.implementation == "cpu" else _pallas_backward
    return run(replace(made, needs_grad=True), choice, x, weight, bias, argmax, d_y)


_by_kernel.defvjp(_kept, _gradients)


@functools.lru_cache(maxsize=1024)
def _forward(made: Problem, choice: Choice):
    """(y,) or (y, argmax) of (x, weight, bias), whatever x's batch is."""

    def run(x, weight, bias):
        here = replace(made, batch=x.shape[0])
        if choice.implementation == "cpu":
            y, argmax = _cpu_forward(here, x, weight, bias)
        else:
            y, argmax = _pallas().forward(here, x, weight, bias, choice.configuration)
        return (y, argmax) if made.saves_argmax else (y,)

    return by_rows(run, (0, None, None), (0, 0) if made.saves_argmax else (0,))


def _pallas() -> Any:
    return importlib.import_module("perfkit.kernels.conv2d.pallas_kernel")


def _pallas_backward(made, choice, x, weight, bias, argmax, d_y):
    wanted = (True, True, bias is not None)
    return _pallas().backward(made, x, weight, argmax, d_y, wanted, choice.configuration)


# ---- The CPU kernel --------------------------------------------------------------------------------------------------


def _cpu_forward(made: Problem, x: Array, weight: Array, bias: Array | None) -> tuple[Array, Array]:
    size = (made.batch, *made.out_size, made.outputs)
    results = _like(size, x.dtype), _like(size if made.saves_argmax else (0,), jnp.uint8)
    return _call("forward", made, results, x, weight, _there(bias, x.dtype))


def _cpu_backward(made, _choice, x, weight, bias, argmax, d_y):
    if cpu_shape.slower_backward(made):
        return _library_backward(made, x, weight, bias, argmax, d_y)
    arguments = x, weight, _there(argmax, jnp.uint8), d_y
    (d_x,) = _call("image", made, (_like(x.shape, x.dtype),), *arguments)
    results = _like(weight.shape, jnp.float32), _like((0,) if bias is None else bias.shape, jnp.float32)
    d_weight, d_bias = _call("weight", made, results, *arguments)
    return d_x, d_weight.astype(weight.dtype), None if bias is None else d_bias.astype(bias.dtype)


def _library_backward(made, x, weight, bias, argmax, d_y):
    """XLA's gradients of the convolution, of what comes back to the places that won their windows."""
    back = _unpooled(made, argmax, d_y)
    _, pull = jax.vjp(lambda x, weight: _convolved(made, x, weight), x, weight)
    d_bias = None if bias is None else back.sum((0, 1, 2), dtype=jnp.float32).astype(bias.dtype)
    return *pull(back), d_bias


def _unpooled(made: Problem, argmax: Array | None, d_y: Array) -> Array:
    """The gradient of the convolution's output: d_y where `argmax` says that it came from, else 0."""
    if argmax is None:
        return d_y
    windows = jnp.arange(made.pool**2, dtype=jnp.uint8).reshape(made.pool, 1, made.pool, 1)
    at_NHPWPO = argmax[:, :, None, :, None] == windows
    batch, height, width, outputs = d_y.shape
    back = jnp.where(at_NHPWPO, d_y[:, :, None, :, None], 0)
    back = back.reshape(batch, height * made.pool, width * made.pool, outputs)
    over = [size - made_of for size, made_of in zip(made.conv_size, back.shape[1:3], strict=True)]
    return jnp.pad(back, ((0, 0), (0, over[0]), (0, over[1]), (0, 0)))


def _call(handler: str, made: Problem, results: tuple[jax.ShapeDtypeStruct, ...], *arguments: Array) -> tuple:
    from perfkit.kernels import _ffi, _native

    _ffi.register(BINDING, HANDLERS, _native.load(cpu_shape.SOURCE, cpu_shape.FLAGS), PASSES)
    call = jax.ffi.ffi_call(f"perfkit_conv2d_xla_{handler}", results, vmap_method="sequential")
    return call(*arguments, shape=np.array(cpu_shape.shape(made), np.int64), threads=np.int64(processors()))


def _there(array: Array | None, dtype: Any) -> Array:
    return jnp.zeros(0, dtype) if array is None else array


def _like(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)
