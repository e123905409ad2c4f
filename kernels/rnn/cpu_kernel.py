"""The C++ kernel of `cpu_core.hpp`, called on torch tensors: one call for a whole stack.

It computes in float32. bfloat16 tensors are read and written as they are, and multiplied so where the processor can;
float16 ones are converted here.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from perfkit.kernels import _native
from perfkit.kernels._torch import parallel
from perfkit.kernels.rnn.cpu_source import FLAGS, MODES, SOURCE
from perfkit.kernels.rnn.problem import Problem

RAGGED = ("no", "lengths", "packed")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float32}
"""What is read and written for tensors of a dtype."""


class Stack(NamedTuple):
    """`PerfkitRnn` of cpu_stack.hpp, every member 8 bytes; tensors as addresses, 0 for those that are not there."""

    cell: int
    dtype: int
    steps: int
    batch: int
    inputs: int
    hidden: int
    layers: int
    directions: int
    ragged: int
    rows: int
    threads: int
    parallel: int
    weights: int
    h0: int
    c0: int
    x: int
    x_step: int
    x_row: int
    y: int
    y_step: int
    y_row: int
    gates: int
    cells: int
    inner: int


Call = Callable[[Tensor, "Tensor | None", "Tensor | None", Sequence[Tensor]], "tuple[Tensor, Tensor, Tensor | None]"]

_FORWARD = struct.Struct(f"{len(Stack._fields) + 2}q")
_BACKWARD = struct.Struct(f"{len(Stack._fields) + 11}q")


@functools.cache
def library() -> ctypes.CDLL:
    """The kernel, built at the first use.

    Raises:
        UnsupportedError: there is no C++ compiler, or it fails.
    """
    found = _native.load(SOURCE, FLAGS)
    found.perfkit_rnn_forward_in_line.argtypes = (ctypes.c_char_p,)
    return found


def instructions() -> str:
    """What the products run on here, the fastest first: "AVX512-BF16, AVX-512" for instance, or "AVX2"."""
    name = library().perfkit_rnn_instructions
    name.restype = ctypes.c_char_p
    return name().decode()


def forward(problem: Problem, x, rows, h0, c0, weights, batch_first, gates, cells, inner):
    """All layers and directions; see `torch_stack` for the arguments. `gates`, `cells`, `inner` are filled if not None.

    Returns:
        y, hn, cn, in x's dtype, float32 for float16; cn is None but for LSTM.
    """
    dtype = DTYPES[problem.dtype]
    lstm = problem.mode == "LSTM"
    x, h0, c0 = _features(x, dtype), _dense(h0, dtype), _dense(c0, dtype) if lstm else None
    weights, pointers = _weights(weights, dtype)
    rows = None if rows is None else _dense(rows, torch.int64)
    kept = None if gates is None else _like(gates, dtype)
    between = None if inner is None else _like(inner, dtype)
    y = x.new_empty((*x.shape[:-1], problem.hidden * problem.directions))
    hn, cn = torch.empty_like(h0), torch.empty_like(h0) if lstm else None
    stack = _stack(problem, rows, pointers, h0, c0, x, y, batch_first, kept, cells, between)
    _call(library().perfkit_rnn_forward, _FORWARD.pack(*stack, hn.data_ptr(), _pointer(cn)))
    for given, filled in ((gates, kept), (inner, between)):
        if given is not filled:
            given.copy_(filled)
    return y, hn, cn


def caller(problem: Problem, batch_first: bool, bias: bool, rounded: int = 0) -> Call | None:
    """`forward` of one problem without rows, nothing kept: what does not depend on numbers and addresses is worked out.

    Addresses are asked for at each call: a parameter may be replaced, written to or moved at any time.

    Args:
        rounded: for a problem in bfloat16, what is given in float32 and rounded by the kernel, as it reads it: 1 the
            weights, 2 the weights and x; the states may be in either. 0 for nothing.

    Returns:
        `call(x, h0, c0, weights) -> y, hn, cn` for contiguous tensors, of which no copy is made. States may be
        None, for zeros; the weights are in one sequence. None where the kernel reads other dtypes.
    """
    if not takes_as_it_is(problem):
        return None
    run, address = library().perfkit_rnn_forward_in_line, Tensor.data_ptr
    count, lstm = problem.layers * problem.directions, problem.mode == "LSTM"
    sizes = (problem.batch, problem.steps) if batch_first else (problem.steps, problem.batch)
    of_y, of_states = (*sizes, problem.hidden * problem.directions), (count, problem.batch, problem.hidden)
    of_x = _dense_strides(problem, batch_first, problem.inputs)
    past_y = (*_dense_strides(problem, batch_first, of_y[2]), 0, 0, 0)
    fill = struct.Struct(f"{_FORWARD.size // 8 + 4 * count}q").pack
    cell, known, *sizes = _about(problem)
    about, dtype = (cell, known + rounded, *sizes, 0), DTYPES[problem.dtype]
    threads, lent = torch.get_num_threads, parallel()

    def call(x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor]):
        y, hn = x.new_empty(of_y, dtype=dtype), x.new_empty(of_states, dtype=dtype)
        cn = torch.empty_like(hn) if lstm else None
        places = [*map(address, weights)]
        if not bias:
            places = [place for at in range(0, len(places), 2) for place in (*places[at : at + 2], 0, 0)]
        if rounded:
            h0, c0 = (None if state is None else state.to(dtype) for state in (h0, c0))
        given = threads(), lent, 0, _pointer(h0), _pointer(c0), address(x), *of_x, address(y), *past_y
        _call(run, fill(*about, *given, address(hn), _pointer(cn), *places))
        return y, hn, cn

    return call


def takes_as_it_is(problem: Problem) -> bool:
    """Whether contiguous tensors need no copy."""
    return DTYPES[problem.dtype] == getattr(torch, problem.dtype) and problem.ragged == "no"


def told_of_last(problem: Problem, batch_first: bool) -> ctypes.Array:
    """What `perfkit_rnn_last` is told of a problem of one direction without rows."""
    numbers = dict.fromkeys(Stack._fields, 0) | dict(zip(Stack._fields, _about(problem), strict=False))
    numbers["x_step"], numbers["x_row"] = _dense_strides(problem, batch_first, problem.inputs)
    return ctypes.create_string_buffer(_FORWARD.pack(*numbers.values(), 0, 0))


def backward(problem: Problem, x, rows, h0, c0, weights, batch_first, y, gates, cells, inner, d_y, d_hn, d_cn):
    """The gradients of `forward`, in x's dtype, float32 for float16; those of the weights in float32.

    Returns:
        d_x, d_h0, d_c0 (None but for LSTM), and of each layer and direction those of its weights.
    """
    dtype, lstm = DTYPES[problem.dtype], problem.mode == "LSTM"
    h0, d_hn, gates, inner = (_dense(each, dtype) for each in (h0, d_hn, gates, inner))
    c0, d_cn = (_dense(each, dtype) if lstm else None for each in (c0, d_cn))
    x, y, d_y = (_features(each, dtype) for each in (x, y, d_y))
    weights, pointers = _weights(weights, dtype)
    rows = None if rows is None else _dense(rows, torch.int64)
    d_x, d_h0, d_c0 = torch.empty_like(x), torch.empty_like(h0), torch.empty_like(h0) if lstm else None
    d_x = d_x if d_x.stride(-1) == 1 else x.new_empty(x.shape)
    d_weights = [[x.new_empty(weight.shape, dtype=torch.float32) for weight in direction] for direction in weights]
    d_pointers = _pointers(d_weights)
    stack = _stack(problem, rows, pointers, h0, c0, x, y, batch_first, gates, cells if lstm else None, inner)
    of_y = d_y.data_ptr(), *_strides(d_y, batch_first), d_hn.data_ptr(), _pointer(d_cn)
    of_x = d_x.data_ptr(), *_strides(d_x, batch_first), d_h0.data_ptr(), _pointer(d_c0)
    _call(library().perfkit_rnn_backward, _BACKWARD.pack(*stack, *of_y, *of_x, ctypes.addressof(d_pointers)))
    return d_x, d_h0, d_c0, d_weights


def _stack(problem, rows, weights, h0, c0, x, y, batch_first, gates, cells, inner) -> Stack:
    """What forward and backward are both told."""
    return Stack(
        *_about(problem),
        _pointer(rows),
        torch.get_num_threads(),
        parallel(),
        ctypes.addressof(weights),
        h0.data_ptr(),
        _pointer(c0),
        x.data_ptr(),
        *_strides(x, batch_first),
        y.data_ptr(),
        *_strides(y, batch_first),
        _pointer(gates),
        _pointer(cells),
        _pointer(inner),
    )


def _about(problem: Problem) -> tuple[int, ...]:
    """The members of `Stack` from `cell` to `ragged`."""
    sizes = problem.steps, problem.batch, problem.inputs, problem.hidden, problem.layers, problem.directions
    return MODES.index(problem.mode), int(problem.dtype == "bfloat16"), *sizes, RAGGED.index(problem.ragged)


def _weights(weights, dtype: torch.dtype) -> tuple[list[list[Tensor]], ctypes.Array]:
    """All of them contiguous and of one dtype, and their addresses."""
    kept = [[_dense(weight, dtype) for weight in direction] for direction in weights]
    return kept, _pointers(kept)


def _pointers(weights: list[list[Tensor]]) -> ctypes.Array:
    """Four addresses for each direction, 0 for those of biases that are not there."""
    missing = [0] * (4 - len(weights[0]))
    pointers = [pointer for direction in weights for pointer in (*(each.data_ptr() for each in direction), *missing)]
    return (ctypes.c_void_p * len(pointers))(*pointers)


def _dense(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    tensor = tensor if tensor.dtype == dtype else tensor.to(dtype)
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _features(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x, of the dtype, its features one after the other."""
    x = x if x.dtype == dtype else x.to(dtype)
    return x if x.stride(-1) == 1 else x.contiguous()


def _like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor, or room for one like it where it is of another dtype."""
    return tensor if tensor.dtype == dtype else torch.empty_like(tensor, dtype=dtype)


def _strides(x: Tensor, batch_first: bool) -> tuple[int, int]:
    """From step to step and from row to row, in elements."""
    if x.dim() == 2:
        return 0, x.stride(0)
    first, second, _ = x.stride()
    return (second, first) if batch_first else (first, second)


def _dense_strides(problem: Problem, batch_first: bool, width: int) -> tuple[int, int]:
    """The same of a contiguous tensor of so many features."""
    return (width, problem.steps * width) if batch_first else (problem.batch * width, width)


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _call(function, arguments: bytes) -> None:
    if function(arguments):
        raise MemoryError("the recurrent kernel found no memory for its working space")
