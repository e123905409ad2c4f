"""The C++ kernel of `cpu_kernel.cpp`, called on torch tensors."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from perfkit.kernels import _native
from perfkit.kernels._torch import Threads
from perfkit.kernels.conv2d.cpu_shape import FLAGS, SOURCE, refusal, shape
from perfkit.kernels.conv2d.problem import Problem

__all__ = ["backward", "caller", "forward", "refusal"]

Call = Callable[[Tensor, Tensor, "Tensor | None"], "tuple[Tensor, Tensor | None]"]


@functools.cache
def library() -> ctypes.CDLL:
    """The kernel, built at the first use.

    Raises:
        UnsupportedError: there is no C++ compiler, or it fails.
    """
    found = _native.load(SOURCE, FLAGS)
    found.perfkit_conv2d_forward.argtypes = (*(ctypes.c_void_p,) * 6, Threads)
    found.perfkit_conv2d_backward.argtypes = (*(ctypes.c_void_p,) * 8, Threads)
    return found


def forward(problem: Problem, x: Tensor, weight: Tensor, bias: Tensor | None, _configuration: Any = ()):
    """y, argmax; see the package's head."""
    return caller(problem)(x, weight, bias)


@functools.lru_cache(maxsize=4096)
def caller(problem: Problem) -> Call:
    """`forward` of one problem, with everything worked out that does not depend on numbers: it takes a microsecond."""
    run, numbers = library().perfkit_conv2d_forward, told(problem)
    size = (problem.batch, problem.outputs, *problem.out_size)
    layout = torch.channels_last if problem.channels_last else torch.contiguous_format
    dtype, saves, threads = getattr(torch, problem.dtype), problem.saves_argmax, Threads.of_torch
    there = {"memory_format": layout, "device": torch.device("cpu")}  # whatever the default device is

    def call(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        y = torch.empty(size, dtype=dtype, **there)
        argmax = torch.empty(size, dtype=torch.uint8, **there) if saves else None
        if run(numbers, _at(x), _at(weight), _at(bias), _at(y), _at(argmax), threads()):
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
    _configuration: Any = (),
):
    """d_x, d_weight, d_bias; see the package's head. Their sums do not depend on the number of threads."""
    d_x = torch.empty_like(x) if wanted[0] else None
    d_weight = torch.empty_like(weight, dtype=torch.float32) if wanted[1] else None
    d_bias = x.new_empty(problem.outputs, dtype=torch.float32) if wanted[2] and problem.bias else None
    pointers = map(_at, (x, weight, argmax, d_y, d_x, d_weight, d_bias))
    if library().perfkit_conv2d_backward(told(problem), *pointers, Threads.of_torch()):
        raise MemoryError("the convolution's backward kernel found no memory for its working space")
    return d_x, *(None if each is None else each.to(x.dtype) for each in (d_weight, d_bias))


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@functools.lru_cache(maxsize=4096)
def told(problem: Problem) -> ctypes.Array:
    """`PerfkitConv2d`, which is nothing but integers."""
    numbers = shape(problem)
    return (ctypes.c_int64 * len(numbers))(*numbers)
