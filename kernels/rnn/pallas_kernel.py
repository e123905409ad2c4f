"""The recurrent kernels in Pallas: `pallas_tpu.py` for TPU, `pallas_gpu.py` for GPU; this file brings arrays in shape.

The input parts of all gates are one product before the kernel, and the weights' gradients one after it: XLA does those.
Not yet measured on a TPU or a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from perfkit.kernels.rnn import pallas_tpu
from perfkit.kernels.rnn.problem import GATES, SAVED, Problem

DTYPES = {"tpu": ("float32", "bfloat16"), "cuda": ("float32", "bfloat16", "float16")}
SMALLEST_VMEM = 64 * pallas_tpu.MIB
"""Of a TPU v5p's core, the least of those since v5: what is assumed where no TPU is there to ask."""


@dataclass(frozen=True)
class Pallas:
    """The kernels for one kind of device; what `jax_layer` calls.

    Args:
        device: "tpu" or "cuda".
        interpret: as `pallas_call` takes it; for tests without the device.
        vmem_bytes: of the TPU that it is for; None for the one that is there.
    """

    device: str
    interpret: Any = False
    vmem_bytes: int | None = None

    def forward(self, mode, x, weights, h0, c0, lengths, reverse, save):
        """See `jax_layer.Kernel`."""
        w_ih, w_hh, b_ih, b_hh = weights
        steps, batch, _ = x.shape
        hidden, size = w_hh.shape[1], self._size(w_hh.shape[1])
        gates = GATES[mode]
        bias = b_ih.astype(jnp.float32) + b_hh.astype(jnp.float32)
        bias_hn = None
        if mode == "GRU":
            bias = bias.at[2 * hidden :].set(b_ih[2 * hidden :].astype(jnp.float32))
            bias_hn = _pad(b_hh[2 * hidden :].astype(jnp.float32)[None], 1, size)
        x = self._pad_rows(x, 1)
        of_x = jnp.einsum("tbi,gi->tbg", x, _pad_gates(w_ih, gates, size), preferred_element_type=jnp.float32)
        x_parts = (of_x + _pad_gates(bias[:, None], gates, size)[:, 0]).astype(x.dtype)
        w = _pad(_pad_gates(w_hh, gates, size), 1, size).T
        cell = self._state(c0, size) if mode == "LSTM" else None
        arguments = (mode, x_parts, w, bias_hn, self._state(h0, size), cell, self._lengths(lengths), reverse, save)
        if self.device == "tpu":
            blocks = self._blocks(mode, x.dtype.name, batch, steps, size)
            out = pallas_tpu.forward(*arguments, blocks, self.interpret)
        else:
            out = _gpu().forward(*arguments, self.interpret)
        y = out[0][:, :batch, :hidden]
        states = [state[:batch, :hidden] for state in out[1 : 3 if mode == "LSTM" else 2]]
        saved = tuple(each[:, :batch] for each in out[3 if mode == "LSTM" else 2 :])
        return y, states[0], states[1] if mode == "LSTM" else c0.astype(jnp.float32), saved

    def backward(self, mode, weights, lengths, reverse, y, before, saved, d_y, d_h, d_c):
        """See `jax_layer.Kernel`."""
        w_hh = weights[1]
        steps, batch, hidden = y.shape
        size = self._size(hidden)
        w = _pad(_pad_gates(w_hh, GATES[mode], size), 1, size)
        gates, cells = (*saved, None)[:2] if saved else (_pad(y, 2, size), None)
        gates = self._pad_rows(gates, 1)
        cells = self._pad_rows(cells, 1) if mode == "LSTM" else None
        before = self._pad_rows(_pad(before, 2, size), 1) if mode == "GRU" else None
        d_y = self._pad_rows(_pad(d_y, 2, size), 1)
        d_cell = self._state(d_c, size) if mode == "LSTM" else None
        lengths = self._lengths(lengths)
        arguments = (mode, w, before, gates, cells, lengths, reverse, d_y, self._state(d_h, size), d_cell)
        if self.device == "tpu":
            out = pallas_tpu.backward(*arguments, self._blocks(mode, y.dtype.name, batch, steps, size), self.interpret)
        else:
            out = _gpu().backward(*arguments, self.interpret)
        d_gates = out[0][:, :batch].reshape(steps, batch, SAVED[mode], size)[..., :hidden]
        d_h0 = out[1][:batch, :hidden]
        return d_gates, d_h0, out[2][:batch, :hidden] if mode == "LSTM" else d_c

    def _size(self, hidden: int) -> int:
        """Hidden units that the kernel computes with, for `hidden` that there are: units of zeros stay at zero."""
        if self.device == "tpu":
            return -(-hidden // pallas_tpu.LANES) * pallas_tpu.LANES
        return max(_gpu().LEAST_HIDDEN, 1 << (hidden - 1).bit_length())

    def _blocks(self, mode: str, dtype: str, batch: int, steps: int, size: int) -> pallas_tpu.Blocks:
        found = pallas_tpu.blocks(mode, dtype, batch, steps, size, self.vmem_bytes or vmem_bytes())
        assert found is not None, "refusal() is asked first"
        return found

    def _pad_rows(self, x: Array, axis: int) -> Array:
        """Whole tiles of rows; on TPU the blocks take care of the last ones."""
        return x if self.device == "tpu" else _pad(x, axis, -(-x.shape[axis] // _gpu().ROWS) * _gpu().ROWS)

    def _state(self, state: Array, size: int) -> Array:
        return self._pad_rows(_pad(state.astype(jnp.float32), 1, size), 0)

    def _lengths(self, lengths: Array | None) -> Array | None:
        return None if lengths is None else self._pad_rows(lengths.astype(jnp.int32)[:, None], 0)


def _gpu() -> ModuleType:
    """The kernels for GPU, where they are wanted alone: JAX warns of Pallas for Triton since 0.11, and will drop it."""
    return import_module("perfkit.kernels.rnn.pallas_gpu")


def refusal(problem: Problem) -> str | None:
    """Why the kernels cannot take `problem`; None where they can."""
    dtypes = DTYPES.get(problem.device)
    if dtypes is None:
        return f"it runs on tpu and cuda, and this call is on {problem.device}"
    if problem.dtype not in dtypes:
        return f"on {problem.device} it takes {' and '.join(dtypes)}, and the arrays are {problem.dtype}"
    if problem.device == "cuda":
        if find_spec("jax.experimental.pallas.triton") is None:
            return f"JAX {jax.__version__} has no Pallas for Triton any more"
        if problem.hidden > _gpu().MOST_HIDDEN:
            return (
                f"one program holds the recurrent weights of at most {_gpu().MOST_HIDDEN} hidden units, "
                f"and there are {problem.hidden}"
            )
        return None
    size = Pallas("tpu")._size(problem.hidden)
    if pallas_tpu.blocks(problem.mode, problem.dtype, problem.batch, problem.steps, size, vmem_bytes()) is None:
        least = pallas_tpu.needed(problem.mode, problem.dtype, pallas_tpu.sublanes(problem.dtype), 1, size)
        return (
            f"the recurrent weights of {problem.hidden} hidden units and one block of rows need "
            f"{least / pallas_tpu.MIB:.0f} MiB of VMEM, and 7/8 of {vmem_bytes() / pallas_tpu.MIB:.0f} MiB can be used"
        )
    return None


def vmem_bytes() -> int:
    """VMEM of a core of the TPU that is there."""
    if jax.default_backend() != "tpu":
        return SMALLEST_VMEM
    return pallas_tpu.pltpu.get_tpu_info().vmem_capacity_bytes


def _pad(x: Array, axis: int, size: int) -> Array:
    """Zeros behind x, up to `size` along `axis`."""
    widths = [(0, size - x.shape[axis] if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths) if size != x.shape[axis] else x


def _pad_gates(w: Array, gates: int, size: int) -> Array:
    """(G H, columns) with `size` units in place of H."""
    return _pad(w.reshape(gates, -1, w.shape[1]), 1, size).reshape(gates * size, w.shape[1])
