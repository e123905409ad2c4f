"""The C++ kernel of `cpu_kernel.cpp`, called on torch tensors."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from perfkit.kernels import _native
from perfkit.kernels._torch import Threads
from perfkit.kernels.linear.cpu_shape import FLAGS, SOURCE, shape
from perfkit.kernels.linear.problem import Problem

Call = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]


@functools.cache
def library() -> ctypes.CDLL:
    """The kernel, built at the first use.

    Raises:
        UnsupportedError: there is no C++ compiler, or it fails.
    """
    found = _native.load(SOURCE, FLAGS)
    found.perfkit_linear.argtypes = (*(ctypes.c_void_p,) * 5, Threads)
    return found


@functools.lru_cache(maxsize=4096)
def caller(problem: Problem, leading: tuple[int, ...]) -> Call:
    """y of (*leading, N) from x of (*leading, K), all dense: with everything worked out that depends on no numbers."""
    numbers, run, threads = told(problem), library().perfkit_linear, Threads.of_torch
    size, dtype, empty = (*leading, problem.outputs), getattr(torch, problem.dtype), torch.empty
    device = torch.device("cpu")  # whatever the default device is

    def call(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = empty(size, dtype=dtype, device=device)
        at = None if bias is None else bias.data_ptr()
        if run(numbers, x.data_ptr(), weight.data_ptr(), at, y.data_ptr(), threads()):
            raise MemoryError("the linear kernel found no memory for its working space")
        return y

    return call


@functools.lru_cache(maxsize=4096)
def told(problem: Problem) -> ctypes.Array:
    """`PerfkitLinear`, which is nothing but integers."""
    numbers = shape(problem)
    return (ctypes.c_int64 * len(numbers))(*numbers)
