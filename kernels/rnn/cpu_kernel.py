"""The C++ kernel of `cpu_kernel.cpp`, called on torch tensors: layers and directions of a stack, one after the other.

It computes in float32, whatever the tensors' dtype: half precision saves memory here, not time.
"""

from __future__ import annotations

import ctypes
import functools
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from perfkit.kernels import _native
from perfkit.kernels.rnn.problem import GATES, SAVED, Problem

SOURCE = Path(__file__).with_name("cpu_kernel.cpp")
MODES = tuple(GATES)
DTYPES = ("float32", "bfloat16", "float16")
FLAGS = ("-ffp-contract=fast",)
"""Products and sums may round once: there is no reference in other operations to be equal to bit for bit."""


class Rows(NamedTuple):
    """Where the rows of each step are; as `PerfkitRnn` wants it.

    Args:
        batch_sizes: (T,) how many of the rows, longest first, are there at each step.
        starts: (T,) the place of a step's first row in packed data, 0 where rows are padded.
        order: (B,) the row that each of them is.
        step: rows from one step to the next in padded data, 0 in packed.
        whole: every row is there at every step.
    """

    batch_sizes: ctypes.Array
    starts: ctypes.Array
    order: ctypes.Array
    step: int
    whole: bool


class _Forward(ctypes.Structure):
    """`PerfkitRnn` of cpu_kernel.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("cell", "steps", "batch", "inputs", "hidden")),
        *((name, ctypes.c_void_p) for name in ("batch_sizes", "starts", "rows")),
        *((name, ctypes.c_int64) for name in ("reverse", "saved_step")),
        ("x", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("x_step", "x_row")),
        ("out", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("out_step", "out_row")),
        *((name, ctypes.c_void_p) for name in ("w_ih", "w_hh", "bias", "bias_hn", "h", "c", "gates", "cells")),
        ("threads", ctypes.c_int64),
    )


class _Backward(ctypes.Structure):
    """`PerfkitRnnBackward` of cpu_kernel.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("cell", "steps", "batch", "hidden")),
        *((name, ctypes.c_void_p) for name in ("batch_sizes", "starts", "rows")),
        *((name, ctypes.c_int64) for name in ("reverse", "saved_step")),
        *((name, ctypes.c_void_p) for name in ("out", "d_out")),
        *((name, ctypes.c_int64) for name in ("out_step", "out_row", "d_out_step", "d_out_row")),
        *((name, ctypes.c_void_p) for name in ("w_hh", "h0", "c0", "gates", "cells")),
        *((name, ctypes.c_void_p) for name in ("d_h", "d_c", "d_gates", "previous")),
        ("threads", ctypes.c_int64),
    )


def refusal(problem: Problem) -> str | None:
    """Why the kernel cannot take `problem`; None where it can."""
    if problem.dtype not in DTYPES:
        return f"it computes in float32, and the tensors are {problem.dtype}"
    if _native.find_compiler() is None:
        return "there is no C++ compiler to build it with (Debian, Ubuntu: apt install g++), or CXX does not name one"
    return None


@functools.cache
def library() -> ctypes.CDLL:
    """The kernel, built at the first use.

    Raises:
        UnsupportedError: there is no C++ compiler, or it fails.
    """
    return _native.load(SOURCE, FLAGS)


def forward(problem: Problem, x, rows, h0, c0, weights, batch_first, gates, cells, inner):
    """All layers and directions; see `torch_op` for the arguments. `gates`, `cells` and `inner` are filled if not None.

    Returns:
        y, hn, cn, in float32; cn is None but for LSTM.
    """
    mode, hidden, directions = problem.mode, problem.hidden, problem.directions
    lay = place(problem, rows, batch_first)
    h = h0.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    c = c0.to(torch.float32, copy=True, memory_format=torch.contiguous_format) if mode == "LSTM" else None
    layer_x = x.float()
    for layer in range(problem.layers):
        layer_x = layer_x if layer_x.stride(-1) == 1 else layer_x.contiguous()
        shape = (*x.shape[:-1], hidden * directions)
        out = layer_x.new_empty(shape) if lay.whole else layer_x.new_zeros(shape)
        for way in range(directions):
            i = layer * directions + way
            w_ih, w_hh, bias, bias_hn = _weights(mode, hidden, weights[i])
            arguments = _Forward(
                **_shared(problem, lay, way),
                inputs=layer_x.size(-1),
                x=layer_x.data_ptr(),
                out=out.data_ptr() + 4 * way * hidden,
                w_ih=w_ih.data_ptr(),
                w_hh=w_hh.data_ptr(),
                bias=bias.data_ptr(),
                bias_hn=_pointer(bias_hn),
                h=h[i].data_ptr(),
                c=_pointer(c if c is None else c[i]),
                gates=_pointer(gates if gates is None else gates[i]),
                cells=_pointer(cells if cells is None or mode != "LSTM" else cells[i]),
            )
            arguments.x_step, arguments.x_row = _strides(layer_x, batch_first)
            arguments.out_step, arguments.out_row = _strides(out, batch_first)
            _call(library().perfkit_rnn_forward, arguments, mode)
        if inner is not None and layer < problem.layers - 1:
            inner[layer].copy_(_by_rows(out, batch_first))
        layer_x = out
    return layer_x, h, c


def backward(problem: Problem, x, rows, h0, c0, weights, batch_first, y, gates, cells, inner, d_y, d_hn, d_cn):
    """The gradients of `forward`, in float32.

    Returns:
        d_x, d_h0, d_c0 (None but for LSTM), and of each layer and direction (w_ih, w_hh, b_ih, b_hh).
    """
    mode, hidden, directions = problem.mode, problem.hidden, problem.directions
    lay = place(problem, rows, batch_first)
    d_h = d_hn.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    d_c = d_cn.to(torch.float32, copy=True, memory_format=torch.contiguous_format) if mode == "LSTM" else None
    h0, c0 = h0.float().contiguous(), c0.float().contiguous() if mode == "LSTM" else None
    gradients = [()] * (problem.layers * directions)
    d_out = d_y.float()
    for layer in reversed(range(problem.layers)):
        last = layer == problem.layers - 1
        out = y.float() if last else inner[layer].float()
        first_last = batch_first and last  # inner outputs are kept time-major
        d_first = batch_first and last
        layer_x = _by_rows(x.float(), batch_first) if layer == 0 else inner[layer - 1].float()
        d_x = torch.zeros_like(layer_x)
        for way in range(directions):
            i = layer * directions + way
            make = torch.empty if lay.whole else torch.zeros
            d_gates = make(layer_x.size(0), SAVED[mode], hidden)
            previous = make(layer_x.size(0), hidden)
            w_ih, w_hh, _, _ = _weights(mode, hidden, weights[i])
            arguments = _Backward(
                **_shared(problem, lay, way),
                out=out.data_ptr() + 4 * way * hidden,
                d_out=d_out.data_ptr() + 4 * way * hidden,
                w_hh=w_hh.data_ptr(),
                h0=h0[i].data_ptr(),
                c0=_pointer(c0 if c0 is None else c0[i]),
                gates=gates[i].data_ptr(),
                cells=_pointer(cells[i] if mode == "LSTM" else None),
                d_h=d_h[i].data_ptr(),
                d_c=_pointer(d_c if d_c is None else d_c[i]),
                d_gates=d_gates.data_ptr(),
                previous=previous.data_ptr(),
            )
            arguments.out_step, arguments.out_row = _strides(out, first_last, lay)
            arguments.d_out_step, arguments.d_out_row = _strides(d_out, d_first, lay)
            _call(library().perfkit_rnn_backward, arguments, mode)
            of_x = d_gates[:, : GATES[mode]].flatten(1)
            of_h = d_gates[:, [0, 1, 3]].flatten(1) if mode == "GRU" else of_x
            d_x.addmm_(of_x, w_ih)
            gradients[i] = (of_x.t() @ layer_x, of_h.t() @ previous, of_x.sum(0), of_h.sum(0))
        d_out = d_x
    if batch_first:
        d_x = d_x.view(problem.steps, problem.batch, -1).transpose(0, 1)
    return d_x.reshape(x.shape), d_h, d_c, gradients


def place(problem: Problem, rows: Tensor | None, batch_first: bool) -> Rows:
    """Where the rows of each step are."""
    steps, batch = problem.steps, problem.batch
    of_steps, of_rows = ctypes.c_int64 * steps, ctypes.c_int64 * batch
    if problem.ragged == "packed":
        sizes = rows.tolist()
        starts = accumulate(sizes[:-1], initial=0)
        return Rows(of_steps(*sizes), of_steps(*starts), of_rows(*range(batch)), 0, True)
    if problem.ragged == "lengths":
        lengths = rows.tolist()
        order = sorted(range(batch), key=lambda row: -lengths[row])
        sizes = [sum(length > step for length in lengths) for step in range(steps)]
        return Rows(of_steps(*sizes), of_steps(), of_rows(*order), batch, min(lengths) == steps)
    return Rows(of_steps(*[batch] * steps), of_steps(), of_rows(*range(batch)), batch, True)


def _shared(problem: Problem, lay: Rows, way: int) -> dict[str, int]:
    """What both directions of the pass are told."""
    return {
        "cell": MODES.index(problem.mode),
        "steps": problem.steps,
        "batch": problem.batch,
        "hidden": problem.hidden,
        "batch_sizes": ctypes.addressof(lay.batch_sizes),
        "starts": ctypes.addressof(lay.starts),
        "rows": ctypes.addressof(lay.order),
        "reverse": way,
        "saved_step": lay.step,
        "threads": torch.get_num_threads(),
    }


def _weights(mode: str, hidden: int, weights: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """A direction's weights as the kernel takes them: both biases summed, but for that of GRU's n."""
    w_ih, w_hh, *biases = (weight.float().contiguous() for weight in weights)
    if not biases:
        biases = (w_ih.new_zeros(w_ih.size(0)), w_ih.new_zeros(w_ih.size(0)))
    b_ih, b_hh = biases
    if mode != "GRU":
        return w_ih, w_hh, b_ih + b_hh, None
    bias = b_ih.clone()
    bias[: 2 * hidden] += b_hh[: 2 * hidden]
    return w_ih, w_hh, bias, b_hh[2 * hidden :]


def _strides(x: Tensor, batch_first: bool, lay: Rows | None = None) -> tuple[int, int]:
    """From step to step and from row to row, in elements; time-major rows in one dimension where `lay` tells."""
    if x.dim() == 2:
        return (lay.step if lay else 0) * x.stride(0), x.stride(0)
    return (x.stride(1), x.stride(0)) if batch_first else (x.stride(0), x.stride(1))


def _by_rows(x: Tensor, batch_first: bool) -> Tensor:
    """(rows, features), time-major."""
    return (x.transpose(0, 1) if batch_first and x.dim() == 3 else x).flatten(0, -2)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _call(function, arguments: ctypes.Structure, mode: str) -> None:
    if function(ctypes.byref(arguments)):
        raise MemoryError(f"the {mode} kernel found no memory for its working space")
