"""The C++ kernel of `cpu_kernel.cpp`, called on torch tensors."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from perfkit.kernels import _native
from perfkit.kernels._torch import Threads
from perfkit.kernels.conv2d import cpu_kernel as convolution
from perfkit.kernels.conv2d.problem import Problem as Convolution
from perfkit.kernels.linear import cpu_kernel as linear
from perfkit.kernels.linear.problem import Problem as Linear

SOURCE = Path(__file__).with_name("cpu_kernel.cpp")

Problem = Convolution | Linear
Layer = tuple[Problem, Tensor, "Tensor | None"]
"""A layer's problem, weight and bias: dense, on CPU, of the problem's shapes and dtype."""


class _Layer(ctypes.Structure):
    """`PerfkitLayer`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("run", "problem", "weight", "bias")),
        *((name, ctypes.c_int64) for name in ("convolves", "bytes")),
    )


@functools.cache
def library() -> ctypes.CDLL:
    """The kernel, built at the first use.

    Raises:
        UnsupportedError: there is no C++ compiler, or it fails.
    """
    found = _native.load(SOURCE)
    found.perfkit_sequence.argtypes = (ctypes.c_void_p, ctypes.c_int64, *(ctypes.c_void_p,) * 2, Threads)
    return found


def caller(layers: Sequence[Layer], size: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """y, of `size`, from x, dense as the first problem has it. Where weights lie is known from now on."""
    told = [_told(problem) for problem, _, _ in layers]
    steps = (_Layer * len(layers))(*map(_layer, layers, told))
    run, threads, empty, count = library().perfkit_sequence, Threads.of_torch, torch.empty, len(layers)
    dtype = getattr(torch, layers[-1][0].dtype)

    def call(x: Tensor) -> Tensor:
        y = empty(size, dtype=dtype)
        if run(steps, count, x.data_ptr(), y.data_ptr(), threads()):
            raise MemoryError("a kernel found no memory for its working space")
        return y

    call.told = told  # which the steps point to
    return call


def _told(problem: Problem) -> ctypes.Array:
    return convolution.told(problem) if isinstance(problem, Convolution) else linear.told(problem)


def _layer(layer: Layer, told: ctypes.Array) -> _Layer:
    problem, weight, bias = layer
    convolves = isinstance(problem, Convolution)
    run = convolution.library().perfkit_conv2d_forward if convolves else linear.library().perfkit_linear
    outputs = problem.outputs * (
        problem.batch * problem.out_size[0] * problem.out_size[1] if convolves else problem.rows
    )
    return _Layer(
        *(ctypes.cast(run, ctypes.c_void_p), ctypes.cast(told, ctypes.c_void_p)),
        *(weight.data_ptr(), None if bias is None else bias.data_ptr()),
        *(convolves, outputs * weight.element_size()),
    )
