"""The C++ kernel of `cpu_core.hpp`, called by XLA on a CPU: one custom call for a whole stack, one for its gradients.

It computes in float32. bfloat16 arrays are read and written as they are, and multiplied so where the processor can;
float16 ones are converted here.

Letters: T time steps, B batch rows, H hidden units, D directions, W = layers * D, S values saved of each unit and step.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import Array

from perfkit.kernels import _ffi, _native
from perfkit.kernels._jax import alike, by_rows, processors
from perfkit.kernels.rnn.cpu_source import FLAGS, MODES, SOURCE
from perfkit.kernels.rnn.jax_layer import Weights
from perfkit.kernels.rnn.problem import SAVED

BINDING = Path(__file__).with_name("cpu_ffi.cpp")
HANDLERS = ("perfkit_rnn_xla_forward", "perfkit_rnn_xla_backward")
PASSES = ("perfkit_rnn_forward", "perfkit_rnn_backward")


@dataclass(frozen=True)
class Stack:
    """What is fixed when a call is traced.

    Args:
        mode: "LSTM", "GRU", "RNN_TANH" or "RNN_RELU".
        directions: of each layer.
        batch_first: x and y are (B, T, features).
        recompute: save only the inputs for the backward pass, and run the forward pass again in it.
    """

    mode: str
    directions: int
    batch_first: bool
    recompute: bool

    @property
    def attributes(self) -> dict[str, int | bool]:
        """What both custom calls are told besides arrays."""
        return {
            "cell": MODES.index(self.mode),
            "directions": self.directions,
            "batch_first": self.batch_first,
            "threads": processors(),
        }


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
    d_x, d_h0, d_c0, d_weights = _backward(of)(x, y, weights, h0, c0, lengths, saved, *gradients)
    d_weights = jax.tree.map(lambda gradient: gradient.astype(x.dtype), d_weights)
    return d_x, d_weights, d_h0, d_c0, None  # lengths are integers: they have no gradient


layers.defvjp(_layers_forward, _layers_backward)


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
        out = _call(HANDLERS[0], results, (*given, *_arrays(kernel_dtype, *jax.tree.leaves(weights))), of)
        y, hn, cn = (each.astype(dtype) for each in (*out[:2], out[2] if lstm else c0))
        return y, hn, cn, out[3:] if save else None

    rows = 0 if of.batch_first else 1
    return by_rows(forward, (rows, None, 1, 1, 0), (rows, 1, 1, 2))


@functools.cache
def _backward(of: Stack):
    """(x, y, weights, h0, c0, lengths, saved, d_y, d_hn, d_cn) -> d_x, d_h0, d_c0, d_weights, the last in float32."""

    def backward(x, y, weights, h0, c0, lengths, saved, d_y, d_hn, d_cn):
        dtype, kernel_dtype, lstm = y.dtype, _kernel_dtype(y), of.mode == "LSTM"
        flat, structure = jax.tree.flatten(weights)
        shape = jax.ShapeDtypeStruct
        results = (shape(x.shape, kernel_dtype), shape(h0.shape, kernel_dtype))
        results += (shape(c0.shape if lstm else (0,), kernel_dtype), *(shape(w.shape, jnp.float32) for w in flat))
        given = (*_arrays(kernel_dtype, x, y, h0, c0 if lstm else None), _lengths(lengths), *saved)
        given += _arrays(kernel_dtype, d_y, d_hn, d_cn if lstm else None)
        d_x, d_h0, d_c0, *d_weights = _call(HANDLERS[1], results, (*given, *_arrays(kernel_dtype, *flat)), of)
        d_x, d_h0, d_c0 = (each.astype(dtype) for each in (d_x, d_h0, d_c0 if lstm else d_cn))
        return d_x, d_h0, d_c0, jax.tree.unflatten(structure, d_weights)

    rows = 0 if of.batch_first else 1
    return by_rows(backward, (rows, rows, None, 1, 1, 0, 2, rows, 1, 1), (rows, 1, 1, None))


def _call(handler: str, results: tuple[jax.ShapeDtypeStruct, ...], arguments: tuple[Array, ...], of: Stack):
    _ffi.register(BINDING, HANDLERS, _native.load(SOURCE, FLAGS), PASSES)
    out = jax.ffi.ffi_call(handler, results)(*arguments, **of.attributes)
    return alike((arguments[0], *out))[1:]  # which custom calls cannot say themselves


def _kernel_dtype(x: Array):
    return jnp.dtype("bfloat16" if x.dtype == jnp.bfloat16 else "float32")


def _arrays(dtype, *arrays: Array | None) -> tuple[Array, ...]:
    """Arrays in `dtype`; what is not there as one without elements."""
    return tuple(jnp.zeros(0, dtype) if x is None else x.astype(dtype) for x in arrays)


def _lengths(lengths: Array | None) -> Array:
    return jnp.zeros(0, jnp.int32) if lengths is None else lengths
