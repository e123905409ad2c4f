"""The C++ kernel of `cpu_core.hpp`, called by XLA on a CPU: one custom call for a whole stack, one for its gradients.

It computes in float32. bfloat16 arrays are read and written as they are, and multiplied so where the processor can;
float16 ones are converted here. The weights' gradients are matrix products over all steps, left to XLA.

Letters: T time steps, B batch rows, H hidden units, D directions, W = layers * D, S values saved of each unit and step.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import Array

from perfkit.kernels import _ffi, _native
from perfkit.kernels.rnn.jax_batch import by_rows
from perfkit.kernels.rnn.jax_layer import Weights
from perfkit.kernels.rnn.problem import GATES, SAVED, Problem

SOURCE = Path(__file__).with_name("cpu_ffi.cpp")
HANDLERS = ("perfkit_rnn_xla_forward", "perfkit_rnn_xla_backward")
MODES = tuple(GATES)
DTYPES = ("float32", "bfloat16", "float16")
FLAGS = ("-ffp-contract=fast",)
"""Products and sums may round once: there is no reference in other operations to be equal to bit for bit."""


def refusal(problem: Problem) -> str | None:
    """Why the kernel cannot take `problem`; None where it can."""
    if problem.dtype not in DTYPES:
        return f"it computes in float32, and the arrays are {problem.dtype}"
    if _native.find_compiler() is None:
        return "there is no C++ compiler to build it with (Debian, Ubuntu: apt install g++), or CXX does not name one"
    return None


@dataclass(frozen=True)
class Stack:
    """What is fixed when a call is traced.

    Args:
        mode: "LSTM", "GRU", "RNN_TANH" or "RNN_RELU".
        directions: of each layer.
        batch_first: x and y are (B, T, features).
        recompute: save only the inputs for the backward pass, and run the forward pass again in it.
        threads: how many work, 0 for one on each processor that this process may use.
    """

    mode: str
    directions: int
    batch_first: bool
    recompute: bool
    threads: int = 0

    @property
    def attributes(self) -> dict[str, int | bool]:
        """What both custom calls are told besides arrays."""
        return {
            "cell": MODES.index(self.mode),
            "directions": self.directions,
            "batch_first": self.batch_first,
            "threads": self.threads or processors(),
        }


def processors() -> int:
    """How many processors this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(affinity(0)) if affinity else os.cpu_count() or 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def layers(
    of: Stack, x: Array, weights: Sequence[Weights], h0: Array, c0: Array, lengths: Array | None
) -> tuple[Array, Array, Array]:
    """All layers and directions.

    Args:
        x: (T, B, I), or (B, T, I) if `batch_first`.
        weights: of each layer and direction.
        h0, c0: (W, B, H); c0 is not used but for LSTM.
        lengths: (B,), int32; None for all steps.

    Returns:
        y, as x, with H * D features, zero past a row's length; hn and cn (W, B, H), cn as it was but for LSTM. In x's
        dtype.
    """
    y, hn, cn, _ = _forward(of, False)(x, weights, h0, c0, lengths)
    return y, hn, cn


def _layers_forward(of: Stack, x, weights, h0, c0, lengths):
    y, hn, cn, saved = _forward(of, not of.recompute)(x, weights, h0, c0, lengths)
    return (y, hn, cn), (x, weights, h0, c0, lengths, None if of.recompute else (y, saved))


def _layers_backward(of: Stack, kept, gradients):
    x, weights, h0, c0, lengths, done = kept
    if done is None:
        y, _, _, saved = _forward(of, True)(x, weights, h0, c0, lengths)
    else:
        y, saved = done
    d_x, d_h0, d_c0, d_gates, previous = _backward(of, x.shape[-1])(y, weights, h0, c0, lengths, saved, *gradients)
    layer_x = jnp.swapaxes(x, 0, 1) if of.batch_first else x
    if lengths is not None:  # zero times what x may hold there, a NaN for instance, is no zero
        layer_x = jnp.where(jnp.arange(len(layer_x))[:, None, None] < lengths[:, None], layer_x, 0)
    d_weights = []
    for i in range(len(weights)):
        if i >= of.directions and i % of.directions == 0:
            layer_x = saved[2][i // of.directions - 1]
        found = _of_weights(of.mode, d_gates[i], layer_x, previous[i])
        d_weights.append(tuple(gradient.astype(x.dtype) for gradient in found))
    return d_x, type(weights)(d_weights), d_h0, d_c0, None  # lengths are integers: they have no gradient


layers.defvjp(_layers_forward, _layers_backward)


def _of_weights(mode: str, d_gates: Array, x: Array, previous: Array) -> Weights:
    """The gradients of a direction's weights, in float32, from those of its gates (T, B, S, H)."""
    hidden = previous.shape[-1]
    flat = d_gates.reshape(-1, d_gates.shape[-2] * hidden)
    product = functools.partial(jnp.einsum, "rg,ri->gi", preferred_element_type=jnp.float32)
    of_x, of_h = (product(flat, each.reshape(-1, each.shape[-1])) for each in (x, previous))
    bias = jnp.sum(flat, 0, dtype=jnp.float32)
    if mode != "GRU":
        return of_x, of_h, bias, bias
    # The kernel's order is n r z m, m being n's hidden part.
    of_x, of_x_bias = (jnp.concatenate((each[hidden : 3 * hidden], each[:hidden])) for each in (of_x, bias))
    return of_x, of_h[hidden:], of_x_bias, bias[hidden:]


@functools.cache
def _forward(of: Stack, save: bool):
    """(x, weights, h0, c0, lengths) -> y, hn, cn, what is saved: gates (W, T, B, S, H), cells (W, T, B, H) in float32,
    the outputs between layers (layers - 1, T, B, H D); without `save` None."""

    def forward(x, weights, h0, c0, lengths):
        dtype, kernel_dtype = x.dtype, _kernel_dtype(x)
        (stack, batch, hidden), steps = h0.shape, x.shape[1 if of.batch_first else 0]
        shape = jax.ShapeDtypeStruct
        lstm, kept, width = of.mode == "LSTM", stack if save else 0, hidden * of.directions
        results = (
            shape((*x.shape[:-1], width), kernel_dtype),
            shape(h0.shape, kernel_dtype),
            shape(c0.shape if lstm else (0,), kernel_dtype),
            shape((kept, steps, batch, SAVED[of.mode], hidden), kernel_dtype),
            shape((kept if lstm else 0, steps, batch, hidden), jnp.float32),
            shape((stack // of.directions - 1 if save else 0, steps, batch, width), kernel_dtype),
        )
        given = (*_arrays(kernel_dtype, x, h0, c0 if lstm else None), _lengths(lengths))
        out = _call(HANDLERS[0], results, (*given, *_arrays(kernel_dtype, *_flat(weights))), of)
        y, hn, cn = (each.astype(dtype) for each in (*out[:2], out[2] if lstm else c0))
        return y, hn, cn, out[3:] if save else None

    rows = 0 if of.batch_first else 1
    return by_rows(forward, (rows, None, 1, 1, 0), (rows, 1, 1, 2))


@functools.cache
def _backward(of: Stack, inputs: int):
    """(y, weights, h0, c0, lengths, saved, d_y, d_hn, d_cn) -> d_x, d_h0, d_c0, and for the weights: the gradients of the
    gates (W, T, B, S, H) and the hidden states before each step (W, T, B, H), both zero past a row's length."""

    def backward(y, weights, h0, c0, lengths, saved, d_y, d_hn, d_cn):
        dtype, kernel_dtype = y.dtype, _kernel_dtype(y)
        gates, cells, inner = saved
        shape = jax.ShapeDtypeStruct
        lstm, (stack, steps, batch, values, hidden) = of.mode == "LSTM", gates.shape
        results = (
            shape((*y.shape[:-1], inputs), kernel_dtype),
            shape(h0.shape, kernel_dtype),
            shape(c0.shape if lstm else (0,), kernel_dtype),
            shape(gates.shape, kernel_dtype),
            shape((stack, steps, batch, hidden), kernel_dtype),
            shape((stack, values, hidden), jnp.float32),
        )
        given = (*_arrays(kernel_dtype, y, h0, c0 if lstm else None), _lengths(lengths), gates, cells, inner)
        given += _arrays(kernel_dtype, d_y, d_hn, d_cn if lstm else None)
        out = _call(HANDLERS[1], results, (*given, *_arrays(kernel_dtype, *_flat(weights))), of)
        d_x, d_h0, d_c0 = (each.astype(dtype) for each in (*out[:2], out[2] if lstm else d_cn))
        return d_x, d_h0, d_c0, out[3], out[4]

    rows = 0 if of.batch_first else 1
    return by_rows(backward, (rows, None, 1, 1, 0, 2, rows, 1, 1), (rows, 1, 1, 2, 2))


def _call(handler: str, results: tuple[jax.ShapeDtypeStruct, ...], arguments: tuple[Array, ...], of: Stack):
    _ffi.register(SOURCE, HANDLERS, FLAGS)
    return tuple(jax.ffi.ffi_call(handler, results)(*arguments, **of.attributes))


def _kernel_dtype(x: Array):
    return jnp.dtype("bfloat16" if x.dtype == jnp.bfloat16 else "float32")


def _arrays(dtype, *arrays: Array | None) -> tuple[Array, ...]:
    """Arrays in `dtype`; what is not there as one without elements."""
    return tuple(jnp.zeros(0, dtype) if x is None else x.astype(dtype) for x in arrays)


def _lengths(lengths: Array | None) -> Array:
    return jnp.zeros(0, jnp.int32) if lengths is None else lengths


def _flat(weights: Sequence[Weights]) -> list[Array]:
    return [part for group in weights for part in group]
