"""A linear layer in JAX: XLA's product, or the kernel as a custom call.

XLA converts bfloat16 to float32 on a CPU to multiply it, weights included, at each call, and multiplies few rows on one
thread. The kernel reads weights in float32 or bfloat16 as they lie; those that are float32 where x is bfloat16 it
rounds. Its gradients are those of XLA's product.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from perfkit.kernels import linear as op
from perfkit.kernels._jax import by_rows, device_of, processors
from perfkit.kernels.linear.cpu_shape import FLAGS, SOURCE, shape
from perfkit.kernels.linear.problem import Problem

HANDLER = "perfkit_linear_xla"


@functools.cache
def library() -> ctypes.CDLL:
    """The kernel, built at the first use, and known to XLA.

    Raises:
        UnsupportedError: there is no C++ compiler, or it fails.
    """
    from perfkit.kernels import _ffi, _native

    kernel = _native.load(SOURCE, FLAGS)
    _ffi.register(Path(__file__).with_name("cpu_ffi.cpp"), (HANDLER,), kernel, ("perfkit_linear_across",))
    return kernel


def linear(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    activation: str | None = None,
    out_dtype: Any = None,
    implementation: str | None = None,
) -> Array:
    """act(x weight + bias), with gradients for x, weight and bias.

    Args:
        x: (..., K), float32 or bfloat16 for the kernel.
        weight: (K, N), of x's dtype, or float32 that is rounded to it.
        bias: (N,), of any float dtype, or None.
        activation: None or "relu".
        out_dtype: of y; x's where it is None.
        implementation: "cpu" or "library"; None for the fastest known.

    Returns:
        y: (..., N). Sums are float32, and rounded once.
    """
    made = Problem(
        device_of(x),
        str(x.dtype),
        *(prod(x.shape[:-1]), *weight.shape, activation),
        framework="jax",
        weight_dtype=str(weight.dtype),
        out_dtype=str(jnp.dtype(out_dtype or x.dtype)),
    )
    if op.OP.choose(made, implementation).implementation == "library":
        return by_library(made, x, weight, bias)
    biases = jnp.zeros(made.outputs, jnp.float32) if bias is None else bias.astype(jnp.float32)
    y = _by_kernel(made, x.reshape(made.rows, made.inputs), weight, biases)
    return y.reshape(*x.shape[:-1], made.outputs)


def by_library(made: Problem, x: Array, weight: Array, bias: Array | None) -> Array:
    """XLA's operations."""
    y = lax.dot_general(
        x, weight.astype(x.dtype), (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )
    y = y if bias is None else y + bias.astype(jnp.float32)
    return (jax.nn.relu(y) if made.activation == "relu" else y).astype(made.out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_kernel(made: Problem, x: Array, weight: Array, bias: Array) -> Array:
    return _forward(made)(x, weight, bias)[0]


def _kept(made: Problem, x: Array, weight: Array, bias: Array):
    return _by_kernel(made, x, weight, bias), (x, weight, bias)


def _gradients(made: Problem, kept: tuple, d_y: Array):
    return jax.vjp(functools.partial(by_library, made), *kept)[1](d_y)


_by_kernel.defvjp(_kept, _gradients)


@functools.lru_cache(maxsize=1024)
def _forward(made: Problem):
    """(y,) of (x, weight, bias), however many rows x has."""

    def run(x, weight, bias):
        here = replace(made, rows=x.shape[0])
        library()
        call = jax.ffi.ffi_call(HANDLER, jax.ShapeDtypeStruct((here.rows, made.outputs), made.out_dtype))
        return (call(x, weight, bias, shape=np.array(shape(here), np.int64), threads=np.int64(processors())),)

    return by_rows(run, (0, None, None), (0,))
