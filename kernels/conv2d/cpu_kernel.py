"""The C++ kernel of `cpu_kernel.cpp`, called on torch tensors."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perfkit.kernels import _native
from perfkit.kernels.conv2d.problem import Problem

SOURCE = Path(__file__).with_name("cpu_kernel.cpp")
DTYPES = ("float32", "bfloat16")
FLAGS = ("-ffp-contract=fast",)
"""Products and sums may round once: there is no reference in other operations to be equal to bit for bit."""


class Shape(ctypes.Structure):
    """`PerfkitConv2d` of cpu_kernel.cpp."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            *("batch", "inputs", "height", "width", "outputs", "kernel_height", "kernel_width"),
            *("stride_h", "stride_w", "top", "left", "dilation_h", "dilation_w", "groups", "pool"),
            *("out_height", "out_width", "relu", "bfloat16", "channels_last"),
            *("x_n", "x_c", "x_h", "x_w", "w_o", "w_i", "w_h", "w_w"),
        )
    )


def refusal(problem: Problem) -> str | None:
    """Why the kernel cannot take `problem`; None where it can."""
    if problem.dtype not in DTYPES:
        return f"it takes {' and '.join(DTYPES)}, and the tensors are {problem.dtype}"
    if _native.find_compiler() is None:
        return "there is no C++ compiler to build it with (Debian, Ubuntu: apt install g++), or CXX does not name one"
    return None


@functools.cache
def library() -> ctypes.CDLL:
    """The kernel, built at the first use.

    Raises:
        UnsupportedError: there is no C++ compiler, or it fails.
    """
    found = _native.load(SOURCE, FLAGS)
    found.perfkit_conv2d_forward.argtypes = (*(ctypes.c_void_p,) * 6, ctypes.c_int64)
    found.perfkit_conv2d_backward.argtypes = (*(ctypes.c_void_p,) * 8, ctypes.c_int64)
    return found


def forward(problem: Problem, x: Tensor, weight: Tensor, bias: Tensor | None, configuration: Any = ()):
    """y, argmax; see the head of `__init__.py`."""
    return caller(problem)(x, weight, bias)


@functools.lru_cache(maxsize=4096)
def caller(problem: Problem):
    """`forward` of one problem, with everything worked out that does not depend on numbers."""
    run, shape = library().perfkit_conv2d_forward, shape_of(problem)
    size = (problem.batch, problem.outputs, *problem.out_size)
    layout = {"memory_format": torch.channels_last if problem.channels_last else torch.contiguous_format}
    dtype, saves, empty, threads = (
        getattr(torch, problem.dtype),
        problem.saves_argmax,
        torch.empty,
        torch.get_num_threads,
    )
    address = ctypes.addressof(shape)

    def call(x: Tensor, weight: Tensor, bias: Tensor | None, _shape: Shape = shape) -> tuple[Tensor, Tensor | None]:
        y = empty(size, dtype=dtype, **layout)
        argmax = empty(size, dtype=torch.uint8, **layout) if saves else None
        failed = run(
            address,
            x.data_ptr(),
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            None if argmax is None else argmax.data_ptr(),
            threads(),
        )
        if failed:
            raise MemoryError("the convolution kernel found no memory for its working space")
        return y, argmax

    return call


def backward(
    problem: Problem,
    x: Tensor,
    weight: Tensor,
    argmax: Tensor | None,
    d_y: Tensor,
    wanted: tuple[bool, bool, bool],
    configuration: Any = (),
):
    """d_x, d_weight, d_bias; see the head of `__init__.py`. The weights' sums do not depend on the number of threads."""
    d_x = torch.empty_like(x) if wanted[0] else None
    d_weight = torch.empty_like(weight, dtype=torch.float32) if wanted[1] else None
    d_bias = torch.empty(problem.outputs) if wanted[2] and problem.bias else None
    shape = shape_of(problem)
    tensors = (x, weight, argmax, d_y, d_x, d_weight, d_bias)
    pointers = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
    if library().perfkit_conv2d_backward(ctypes.addressof(shape), *pointers, torch.get_num_threads()):
        raise MemoryError("the convolution's backward kernel found no memory for its working space")
    return d_x, *(None if each is None else each.to(x.dtype) for each in (d_weight, d_bias))


@functools.lru_cache(maxsize=4096)
def shape_of(problem: Problem) -> Shape:
    """What the kernel is told, for x dense in the problem's layout and contiguous weights."""
    channels, height, width = problem.inputs, problem.height, problem.width
    kernel = problem.kernel_height * problem.kernel_width
    x_c, x_h, x_w = (1, width * channels, channels) if problem.channels_last else (height * width, width, 1)
    return Shape(
        *(problem.batch, channels, height, width, problem.outputs, problem.kernel_height, problem.kernel_width),
        *(*problem.stride, problem.padding[0], problem.padding[2], *problem.dilation, problem.groups, problem.pool),
        *(*problem.out_size, problem.activation == "relu", problem.dtype == "bfloat16", problem.channels_last),
        *(channels * height * width, x_c, x_h, x_w),
        *(problem.taps, kernel, problem.kernel_width, 1),
    )
