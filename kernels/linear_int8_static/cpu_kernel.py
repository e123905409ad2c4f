"""The C++ kernel of `cpu_kernel.cpp`, called on torch tensors."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from perfkit.kernels import _int8_torch, _native
from perfkit.kernels._torch import Threads
from perfkit.kernels.linear_int8_static.cpu_shape import SOURCE, told
from perfkit.kernels.linear_int8_static.problem import Problem

Call = Callable[[Tensor, Tensor, "Tensor | None"], "Tensor | None"]


@functools.cache
def library() -> ctypes.CDLL:
    """The kernel, built at the first use.

    Raises:
        UnsupportedError: there is no C++ compiler, or it fails.
    """
    found = _native.load(SOURCE)
    found.perfkit_linear_int8_static.argtypes = (*(ctypes.c_void_p,) * 5, Threads)
    found.perfkit_linear_int8_static_pack.argtypes = (ctypes.c_int64, ctypes.c_int64, *(ctypes.c_void_p,) * 3)
    found.perfkit_linear_int8_static_packed_bytes.argtypes = (ctypes.c_int64, ctypes.c_int64)
    found.perfkit_linear_int8_static_packed_bytes.restype = ctypes.c_int64
    found.perfkit_linear_int8_static_instructions.restype = ctypes.c_char_p
    return found


def packed(weight: Tensor, weight_scale: Tensor) -> Tensor | None:
    """The weight as the kernel reads it, kept; None where a scale is not positive and finite."""
    return _int8_torch.packed(weight, weight_scale, "linear", _pack)


def _pack(weight: Tensor, scale: Tensor) -> Tensor | None:
    sizes = tuple(weight.shape)
    size = library().perfkit_linear_int8_static_packed_bytes(*sizes)
    return _int8_torch.pack_with(library().perfkit_linear_int8_static_pack, sizes, size, weight, scale)


@functools.lru_cache(maxsize=4096)
def caller(problem: Problem, leading: tuple[int, ...]) -> Call:
    """y of (*leading, N) from x of (*leading, K), all dense, and the packed weight; None where x has no range."""
    numbers, run, threads = told(problem), library().perfkit_linear_int8_static, Threads.of_torch
    size, dtype, empty = (*leading, problem.outputs), getattr(torch, problem.y), torch.empty
    device = torch.device("cpu")  # whatever the default device is

    def call(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = empty(size, dtype=dtype, device=device)
        at = None if bias is None else bias.data_ptr()
        failed = problem.rows and run(numbers, x.data_ptr(), weight.data_ptr(), at, y.data_ptr(), threads())
        if failed == 1:
            raise MemoryError("the int8 linear kernel found no memory for its working space")
        return None if failed else y

    return call
