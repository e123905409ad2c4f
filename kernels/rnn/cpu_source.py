"""The C++ kernel before it is bound to a framework: how it is built, and which calls it takes."""

from __future__ import annotations

from pathlib import Path

from perfkit.kernels import _native
from perfkit.kernels.rnn.problem import GATES, Problem

SOURCE = Path(__file__).with_name("cpu_kernel.cpp")
FLAGS = ("-ffp-contract=fast",)
"""Products and sums may round once: there is no reference in other operations to be equal to bit for bit."""

MODES = tuple(GATES)
"""Cells, in the order of their numbers in `PerfkitRnn`."""

DTYPES = ("float32", "bfloat16", "float16")


def refusal(problem: Problem) -> str | None:
    """Why the kernel cannot take `problem`; None where it can."""
    if problem.dtype not in DTYPES:
        return f"it computes in float32, not in {problem.dtype}"
    return _native.missing()
