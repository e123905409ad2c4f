"""What ops on 8-bit activations share in JAX: rounding to a grid, calls of kernels, and that there is no derivative.

A grid here is `_int8.IN_JAX` with a scale, float32, that is an array: q = clip(round(x / scale), -127, 127), in the
kernels with 127 on top. XLA divides by one number by multiplying with its inverse, and so do the kernels. What a
layer's weights and scales are packed into depends on parameters alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from perfkit._errors import InvalidInputError, UnsupportedError
from perfkit.kernels._int8 import IN_JAX
from perfkit.kernels._jax import alike, by_rows, processors


def rounded(x: Array, scale: Array) -> Array:
    """The q of x, int8."""
    return jnp.round(jnp.clip(x * (1 / scale), -IN_JAX.zero, IN_JAX.zero)).astype(jnp.int8)


def from_bytes(x: Array) -> Array:
    """int8 of what a kernel has made, uint8."""
    return (x.astype(jnp.int16) - IN_JAX.zero).astype(jnp.int8)


def to_bytes(q: Array) -> Array:
    """uint8, as kernels read it, of int8."""
    return (q.astype(jnp.int16) + IN_JAX.zero).astype(jnp.uint8)


def finished(sums: Array, factor: Array, bias: Array | None, activation: str | None) -> Array:
    """What is done with sums whose last dimension is the outputs', before the pool."""
    y = sums.astype(jnp.float32) * factor
    y = y if bias is None else y + bias
    return jax.nn.relu(y) if activation == "relu" else y


def put(y: Array, y_scale: Array | None, dtype: str) -> Array:
    """y as it is asked for: on a grid, or in a float dtype."""
    return y.astype(dtype) if y_scale is None else to_bytes(rounded(y, y_scale))


def check(x: Array, weight: Array, weight_scale: Array, bias: Array | None, outputs: int) -> None:
    """What kernels rely on.

    Raises:
        InvalidInputError: arrays of other dtypes or sizes.
    """
    if weight.dtype != jnp.int8 or x.dtype not in (jnp.float32, jnp.uint8):
        raise InvalidInputError(
            f"x is {x.dtype} and weight {weight.dtype}: expected float32, or uint8 on the grid, and int8"
        )
    for name, array in (("weight_scale", weight_scale), ("bias", bias)):
        if array is not None and (array.dtype != jnp.float32 or array.shape != (outputs,)):
            raise InvalidInputError(
                f"{name} is {array.dtype} {list(array.shape)}: expected float32 [{outputs}], one for each output"
            )


def inference_only(function: Callable[..., Array]) -> Callable[..., Array]:
    """`function`, of arrays, of which asking for a derivative is an error: it would come out as zero."""
    once = jax.custom_jvp(function)

    @once.defjvp
    def _(_primals: Any, _tangents: Any) -> Any:
        raise UnsupportedError(
            "a layer on 8-bit integers is for inference: rounding has no gradient. Wrap its inputs in "
            "jax.lax.stop_gradient, or train with the qat recipe"
        )

    return once


def packed(handler: str, size: int, weight: Array, scale: Array, **told: Any) -> Array:
    """A weight as a kernel reads it, `size` bytes, with the outputs' scales times that of x."""

    @inference_only
    def run(weight: Array, scale: Array) -> Array:
        call = jax.ffi.ffi_call(handler, jax.ShapeDtypeStruct((size,), jnp.uint8), vmap_method="sequential")
        return alike((weight, call(weight, scale, **told)))[1]

    return run(weight, scale)


def called(handler: str, told: Callable[[int], Any], result: Callable[[int], tuple[tuple[int, ...], str]]):
    """y of (x, packed weight, bias or nothing, scales of x and y), however many rows x has: (y,).

    Args:
        told: by x's rows, what the kernel is told, a struct of 64-bit integers.
        result: by them, y's shape and dtype.
    """

    def run(x: Array, weight: Array, bias: Array, scales: Array) -> tuple[Array]:
        shape, dtype = result(x.shape[0])
        call = jax.ffi.ffi_call(handler, jax.ShapeDtypeStruct(shape, dtype))
        numbers = np.array(list(told(x.shape[0])), np.int64)
        return (alike((x, call(x, weight, bias, scales, shape=numbers, threads=np.int64(processors()))))[1],)

    return inference_only(by_rows(run, (0, None, None, None), (0,)))


def numbers(bias: Array | None, x_scale: Array, y_scale: Array | None) -> tuple[Array, Array]:
    """Bias and scales as the kernels take them."""
    y_scale = x_scale if y_scale is None else y_scale
    return jnp.zeros(0, jnp.float32) if bias is None else bias, jnp.stack([x_scale, y_scale]).astype(jnp.float32)


@functools.cache
def library(source: Any, binding: Any, handlers: tuple[str, ...], functions: tuple[str, ...]) -> Any:
    """A kernel, built at the first use, and known to XLA.

    Raises:
        UnsupportedError: there is no C++ compiler, or it fails.
    """
    from perfkit.kernels import _ffi, _native

    kernel = _native.load(source)
    _ffi.register(binding, handlers, kernel, functions)
    return kernel
