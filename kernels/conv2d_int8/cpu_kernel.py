"""The C++ kernel of `cpu_kernel.cpp`, called on torch tensors."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from perfkit.kernels import _int8_torch, _native
from perfkit.kernels._torch import Threads
from perfkit.kernels.conv2d_int8.cpu_shape import SOURCE, told
from perfkit.kernels.conv2d_int8.problem import Problem

Call = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]


@functools.cache
def library() -> ctypes.CDLL:
    """The kernel, built at the first use.

    Raises:
        UnsupportedError: there is no C++ compiler, or it fails.
    """
    found = _native.load(SOURCE)
    found.perfkit_conv2d_int8.argtypes = (*(ctypes.c_void_p,) * 5, Threads)
    found.perfkit_conv2d_int8_pack.argtypes = (ctypes.c_void_p,) * 4
    found.perfkit_conv2d_int8_packed_bytes.argtypes = (ctypes.c_void_p,)
    found.perfkit_conv2d_int8_packed_bytes.restype = ctypes.c_int64
    found.perfkit_conv2d_int8_instructions.restype = ctypes.c_char_p
    return found


def packed(problem: Problem, weight: Tensor, weight_scale: Tensor) -> Tensor | None:
    """The weight as the kernel reads it, kept; None where a scale is not positive and finite."""
    sizes = problem.sizes

    def pack(weight: Tensor, scale: Tensor) -> Tensor | None:
        numbers = told(problem)
        size = library().perfkit_conv2d_int8_packed_bytes(numbers)
        return _int8_torch.pack_with(library().perfkit_conv2d_int8_pack, (numbers,), size, weight, scale)

    way = sizes.stride, sizes.dilation, sizes.pool, problem.x_last and problem.y_last
    return _int8_torch.packed(weight, weight_scale, way, pack)


@functools.lru_cache(maxsize=4096)
def caller(problem: Problem) -> Call:
    """y from x, both dense as the problem has them, the packed weight and the bias."""
    run, numbers, threads = library().perfkit_conv2d_int8, told(problem), Threads.of_torch
    size = (problem.sizes.batch, problem.sizes.outputs, *problem.sizes.out_size)
    layout = torch.channels_last if problem.y_last else torch.contiguous_format
    there = {"dtype": getattr(torch, problem.y), "memory_format": layout, "device": torch.device("cpu")}

    def call(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = torch.empty(size, **there)
        at = None if bias is None else bias.data_ptr()
        if run(numbers, x.data_ptr(), weight.data_ptr(), at, y.data_ptr(), threads()):
            raise MemoryError("the int8 convolution kernel found no memory for its working space")
        return y

    return call
