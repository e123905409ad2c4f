"""The C++ kernel of `cpu_kernel.cpp`, called on torch tensors: which calls it takes, and where it pays."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from perfkit.kernels import _native
from perfkit.kernels._torch import Threads
from perfkit.kernels.linear.problem import Problem
from perfkit.measure._hardware import cpu
from perfkit.measure.environment import has

SOURCE = Path(__file__).with_name("cpu_kernel.cpp")
FLAGS = ("-ffp-contract=fast",)
"""Products and sums may round once: there is no reference in other operations to be equal to bit for bit."""

DTYPES = ("float32", "bfloat16")
LEAST_WORK = 1 << 14
"""Multiply-adds below which a call of the kernel takes no less time than torch's own: measured on a Zen 5."""

LEAST_INPUTS = 128
"""Products summed for one output from which adding up a sum's lanes is a small part of the work."""

MOST_ROWS = 16
"""Rows of x up to which reading the weights takes longer than multiplying with them, whatever multiplies."""

MOST_ROWS_MEASURED = {"float32": 4096, "bfloat16": 128}
"""The same where torch's own product was measured to be slower for more: on a Zen 5, whose AVX-512 MKL does not use;
oneDNN's bfloat16 product, which has no AMX there, is faster from a few hundred rows on."""

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


def refusal(problem: Problem) -> str | None:
    """Why the kernel cannot take `problem`; None where it can."""
    if problem.dtype not in DTYPES:
        return f"it takes {' and '.join(DTYPES)}, and the tensors are {problem.dtype}"
    if not problem.rows * problem.inputs * problem.outputs:
        return "something is empty"
    return _native.missing()


def slower(problem: Problem) -> str | None:
    """Why torch's own product is expected to be as fast; None where it is not."""
    if problem.work < LEAST_WORK or problem.inputs < LEAST_INPUTS:
        return f"{problem.rows} rows of {problem.inputs} inputs to {problem.outputs} are too little work to gain by it"
    if not has("avx512f"):
        return "it was measured with AVX-512 only"
    if problem.dtype == "bfloat16" and not has("avx512_bf16"):
        return "this CPU has no bfloat16 instructions"
    others = "Intel" in cpu()[0] or has("amx_bf16")
    most = MOST_ROWS if others else MOST_ROWS_MEASURED[problem.dtype]
    return f"above {most} rows torch's own product is as fast" if problem.rows > most else None


@functools.lru_cache(maxsize=4096)
def caller(problem: Problem, leading: tuple[int, ...]) -> Call:
    """y of (*leading, N) from x of (*leading, K), all dense: with everything worked out that depends on no numbers."""
    fields = problem.rows, problem.outputs, problem.inputs, problem.activation == "relu", problem.dtype == "bfloat16"
    told, run, threads = (ctypes.c_int64 * len(fields))(*fields), library().perfkit_linear, Threads.of_torch
    size, dtype, empty = (*leading, problem.outputs), getattr(torch, problem.dtype), torch.empty

    def call(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = empty(size, dtype=dtype)
        at = None if bias is None else bias.data_ptr()
        if run(told, x.data_ptr(), weight.data_ptr(), at, y.data_ptr(), threads()):
            raise MemoryError("the linear kernel found no memory for its working space")
        return y

    return call
