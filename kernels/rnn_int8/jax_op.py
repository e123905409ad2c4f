"""One direction of one layer in JAX: the C++ kernel as a custom call, weights packed as `weights.pack` has it.

Letters: T time steps, B batch rows, I input features, H hidden units, G gates, N = G H, K columns.
"""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from perfkit._errors import InvalidInputError
from perfkit.kernels import _ffi, _native
from perfkit.kernels._int8_jax import inference_only
from perfkit.kernels._jax import alike, by_rows, processors
from perfkit.kernels.rnn_int8.problem import GATES, MODES, PANEL, SLACK, SOURCE

BINDING = Path(__file__).with_name("cpu_ffi.cpp")
HANDLER = "perfkit_rnn_int8_xla"


def layer(
    mode: str,
    x: Array,
    h0: Array,
    c0: Array | None,
    q_ih: Array,
    scale_ih: Array,
    q_hh: Array,
    scale_hh: Array,
    bias: Array,
    bias_hn: Array | None,
    x_scale: Array,
    h_scale: Array,
    lengths: Array | None = None,
) -> tuple[Array, Array, Array | None]:
    """What the package's head says, with known scales of x and of the hidden states; there is no derivative.

    Args:
        mode: "LSTM", "GRU", "RNN_TANH" or "RNN_RELU".
        x: (T, B, I); h0, c0: (B, H); float32. c0 is None but for LSTM.
        q_ih, q_hh: (N, I) and (N, H), int8, gates in torch's order; scale_ih, scale_hh: (N,), float32.
        bias: (N,), float32, of both sides, for the GRU's n gate that of the input; bias_hn: (H,), that of its hidden
            part, None for other cells.
        x_scale, h_scale: (), float32, positive.
        lengths: (B,), int32, from 1 to T: the steps that each row has; None for all.

    Returns:
        y: (T, B, H), zero past a row's length; the final h and c: (B, H). float32.

    Raises:
        InvalidInputError: sizes or dtypes that do not go together.
        UnsupportedError: there is no C++ compiler, or a derivative is asked for.
    """
    (_, _, inputs), (_, hidden), channels = x.shape, h0.shape, GATES[mode] * h0.shape[1]
    expected = {"q_ih": (channels, inputs), "q_hh": (channels, hidden), "scale_ih": (channels,)}
    expected |= {"scale_hh": (channels,), "bias": (channels,), "h0": (x.shape[1], hidden)}
    if lengths is not None and (lengths.shape != x.shape[1:2] or lengths.dtype != jnp.int32):
        raise InvalidInputError(f"lengths is {lengths.dtype} {list(lengths.shape)}: expected int32 [{x.shape[1]}]")
    for (name, size), array in zip(expected.items(), (q_ih, q_hh, scale_ih, scale_hh, bias, h0), strict=True):
        dtype = "int8" if name.startswith("q") else "float32"
        if array.shape != size or array.dtype != dtype:
            raise InvalidInputError(f"{name} is {array.dtype} {list(array.shape)}: expected {dtype} {list(size)}")
    scales = jnp.stack([x_scale, h_scale]).astype(jnp.float32)
    given = pack(q_ih, GATES[mode]), scale_ih, pack(q_hh, GATES[mode]), scale_hh, bias
    hidden_bias = jnp.zeros(0, jnp.float32) if bias_hn is None else bias_hn
    y, h, c = _call(mode)(x, h0, h0[:, :1] if c0 is None else c0, lengths, (*given, hidden_bias, scales))
    return y, h, None if c0 is None else c


def pack(q_NK: Array, gates: int) -> Array:
    """The layout that the kernel reads; see `perfkit.kernels.rnn_int8.weights.pack`."""
    channels, columns = q_NK.shape
    q_GHK4 = jnp.pad(q_NK.reshape(gates, -1, columns), ((0, 0), (0, 0), (0, -columns % 4)))
    q_GHK4 = q_GHK4.reshape(gates, channels // gates, -1, 4)
    units = range(0, channels // gates, PANEL)
    panels = [q_GHK4[:, unit : unit + PANEL].swapaxes(1, 2).reshape(-1) for unit in units]
    sums_N = jax.lax.bitcast_convert_type(q_NK.sum(1, dtype=jnp.int32), jnp.int8).reshape(-1)
    return jnp.concatenate([*panels, sums_N, jnp.zeros(SLACK, jnp.int8)])


@functools.cache
def _call(mode: str):
    """(y, hn, cn) of (x, h0, c0, lengths, weights and scales), of any number of rows; c0 and cn are for LSTM alone."""

    def run(x, h0, c0, lengths, weights):
        _ffi.register(BINDING, (HANDLER,), _native.load(SOURCE), ("perfkit_rnn_int8",))
        results = [
            jax.ShapeDtypeStruct(size, jnp.float32) for size in ((*x.shape[:2], h0.shape[1]), h0.shape, c0.shape)
        ]
        call = jax.ffi.ffi_call(HANDLER, results)
        numbers = {"cell": np.int64(MODES.index(mode)), "threads": np.int64(processors())}
        lengths = jnp.zeros(0, jnp.int32) if lengths is None else lengths
        return tuple(alike((x, *call(x, h0, c0, lengths, *weights, **numbers)))[1:])

    return inference_only(by_rows(run, (1, 0, 0, 0, None), (1, 0, 0)))
