"""The C++ kernel of `cpu_kernel.cpp`, called on torch tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from perfkit.kernels import _native
from perfkit.kernels._torch import Threads
from perfkit.kernels.conv2d import cpu_kernel as convolution
from perfkit.kernels.conv2d.problem import Problem as Convolution
from perfkit.kernels.conv2d_int8 import cpu_kernel as integer_convolution
from perfkit.kernels.conv2d_int8 import cpu_shape as integer_shape
from perfkit.kernels.conv2d_int8.problem import Problem as IntegerConvolution
from perfkit.kernels.linear import cpu_kernel as linear
from perfkit.kernels.linear.problem import Problem as Linear
from perfkit.kernels.linear_int8_static import cpu_kernel as integer_linear
from perfkit.kernels.linear_int8_static import cpu_shape as integer_linear_shape
from perfkit.kernels.linear_int8_static.problem import Problem as IntegerLinear
from perfkit.kernels.rnn import cpu_kernel as recurrent
from perfkit.kernels.rnn.problem import Problem as Recurrent

SOURCE = Path(__file__).with_name("cpu_kernel.cpp")


class LastStep(NamedTuple):
    """A stack of recurrent layers of one direction, without rows, of which the last step's outputs alone are wanted."""

    problem: Recurrent
    batch_first: bool


Integer = IntegerLinear | IntegerConvolution
Problem = Convolution | Linear | LastStep | Integer
Layer = tuple[Problem, Sequence["Tensor | None"]]
"""A layer's problem, and its weight and bias, or all weights of recurrent ones, in torch's order, or int8 weight, its
scales and bias: dense, on CPU, of the problem's shapes and dtype."""


class _Layer(ctypes.Structure):
    """`PerfkitLayer`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("run", "problem", "weight", "bias")),
        *((name, ctypes.c_int64) for name in ("convolves", "numbers", "bytes")),
    )


class _Sequence(ctypes.Structure):
    """`PerfkitSequence`."""

    _fields_ = (("layers", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("count", "rows", "x_bytes", "work")))


@cache
def library() -> ctypes.CDLL:
    """The kernel, built at the first use.

    Raises:
        UnsupportedError: there is no C++ compiler, or it fails.
    """
    found = _native.load(SOURCE)
    found.perfkit_sequence.argtypes = (*(ctypes.c_void_p,) * 3, Threads)
    found.perfkit_sequence_between.argtypes = ctypes.c_void_p, Threads
    found.perfkit_sequence_between.restype = ctypes.c_int64
    return found


def caller(layers: Sequence[Layer], x: Tensor, size: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """y, of `size`, dense as the last problem has it, from tensors like x, dense as the first one has it.

    Where weights lie is known from now on. Its `between` tells the bytes of what layers hand on, at most at once.
    """
    rows = _rows(layers[0][0])
    rows = rows if all(_rows(problem) % rows == 0 for problem, _ in layers) else 1
    told = [_told(*layer, rows) for layer in layers]
    steps = (_Layer * len(layers))(*(layer for layer, _ in told))
    work = sum(_work(problem) for problem, _ in layers)
    all_steps = _Sequence(ctypes.addressof(steps), len(layers), rows, x.nbytes // rows, work)
    run, threads, where = library().perfkit_sequence, Threads.of_torch, ctypes.byref(all_steps)
    last, (of_last, *_) = layers[-1]
    lies = isinstance(last, IntegerConvolution) and last.y_last
    empty = partial(torch.empty_like, memory_format=torch.channels_last) if lies else torch.empty_like
    dtype = getattr(torch, last.y) if isinstance(last, Integer) else of_last.dtype
    like = of_last.new_empty(1, dtype=dtype).expand(size)  # of the size, in no memory: quicker than its size is

    def call(x: Tensor) -> Tensor:
        y = empty(like)
        if run(where, x.data_ptr(), y.data_ptr(), threads()):
            raise MemoryError("a kernel found no memory for its working space")
        return y

    call.told, call.between = (steps, told), lambda: library().perfkit_sequence_between(where, threads())
    return call


def joined(problems: Sequence[Problem]) -> list[Problem]:
    """Layers one after the other, of which each that follows another one on integers is handed bytes on its grid."""
    found = list(problems)
    for at in range(len(found) - 1):
        one, other = found[at : at + 2]
        if not (isinstance(one, Integer) and isinstance(other, Integer)):
            continue
        last = isinstance(other, IntegerConvolution) and other.sizes.inputs > integer_shape.FEW_CHANNELS
        lies = {"y_last": last} if isinstance(one, IntegerConvolution) else {}
        found[at] = replace(one, y="uint8", y_grid=other.grid, **lies)
        found[at + 1] = replace(other, x="uint8", **({"x_last": last} if isinstance(other, IntegerConvolution) else {}))
    return found


def _rows(problem: Problem) -> int:
    """How many rows or images are computed apart."""
    return 1 if isinstance(problem, LastStep) else problem.batch if isinstance(problem, Convolution) else problem.rows


def _work(problem: Problem) -> int:
    """Multiply-adds, of what can be computed in rows."""
    if isinstance(problem, Convolution):
        return problem.batch * problem.outputs * problem.conv_size[0] * problem.conv_size[1] * problem.taps
    return 0 if isinstance(problem, LastStep) else problem.work


def _told(problem: Problem, tensors: Sequence[Tensor | None], rows: int) -> tuple[_Layer, Sequence[ctypes.Array]]:
    """A layer, and what it points to that is no tensor."""
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    if isinstance(problem, LastStep):
        run, numbers = recurrent.library().perfkit_rnn_last, recurrent.told_of_last(*problem)
        layers, outputs = problem.problem.layers, problem.problem.batch * problem.problem.hidden
        each = len(addresses) // layers
        four = [address for at in range(0, len(addresses), each) for address in (*addresses[at : at + each], 0, 0)[:4]]
        addresses = [(ctypes.c_void_p * len(four))(*four), None]
    elif isinstance(problem, Convolution):
        run, numbers = convolution.library().perfkit_conv2d_forward, convolution.told(problem)
        outputs = problem.outputs * problem.batch * problem.out_size[0] * problem.out_size[1]
    elif isinstance(problem, Linear):
        run, numbers, outputs = linear.library().perfkit_linear, linear.told(problem), problem.outputs * problem.rows
    else:
        return _told_integer(problem, *tensors, rows)
    pointers = [ctypes.cast(each, ctypes.c_void_p) for each in (run, numbers, *addresses)]
    size = outputs * tensors[0].element_size() // rows
    return _Layer(*pointers, isinstance(problem, Convolution), len(numbers), size), (numbers, addresses[0])


def _told_integer(problem: Integer, weight: Tensor, scale: Tensor, bias: Tensor | None, rows: int):
    """The same of a layer on integers. Its weight is packed once: who keeps the call asks whether it was written to."""
    if isinstance(problem, IntegerLinear):
        run, numbers = integer_linear.library().perfkit_linear_int8_static, integer_linear_shape.told(problem)
        packed = integer_linear.packed(weight, scale)
    else:
        run, numbers = integer_convolution.library().perfkit_conv2d_int8, integer_shape.told(problem)
        packed = integer_convolution.packed(problem, weight, scale)
    bias_at = None if bias is None else bias.data_ptr()
    pointers = [ctypes.cast(each, ctypes.c_void_p) for each in (run, numbers, packed.data_ptr(), bias_at)]
    size = problem.rows // rows * problem.outputs * getattr(torch, problem.y).itemsize
    return _Layer(*pointers, False, len(numbers), size), (numbers, packed)
