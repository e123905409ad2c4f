"""How many threads torch computes with on a CPU: for one model, in the thread that calls it, chosen by the clock.

`torch.set_num_threads` is more than that: a thread that calls torch for the first time takes over the number that was
set last in any other (torch 2.13, ATen/ParallelOpenMP.cpp), and keeps it. A model that set it around its calls would
change what other threads of the process compute with, for good. What it does in the calling thread is to tell OpenMP
and MKL, which both count for each thread apart, and that alone is done here. oneDNN, perfkit's kernels and
torch.compile, when it writes C++, go by the same number; torch.compile also compiles anew where it changes.
"""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from perfkit._quantity import Comparison, Verdict
from perfkit._report import Effect
from perfkit._workload import Workload
from perfkit.backends.torch_training import anew, within
from perfkit.kernels._torch import of_openmp
from perfkit.measure import timing

LONGEST_S = 30.0
"""After so many seconds no other number is begun: where the model is compiled, each takes some."""


class Computing:
    """Within it torch computes with `count` threads, in this thread and in no other."""

    __slots__ = ("before", "count", "mkl")

    def __init__(self, count: int):
        self.count = count

    def __enter__(self):
        self.before = torch.get_num_threads()  # sets a thread up that is new to torch: not to be left for later
        if self.before != self.count:
            _SET_OPENMP(self.count)
            self.mkl = _SET_MKL(self.count)

    def __exit__(self, *_):
        if self.before != self.count:
            _SET_OPENMP(self.before)
            _SET_MKL(self.mkl)


def not_settable() -> str | None:
    """Why the number of threads cannot be set for one thread alone; None where it can."""
    reason = "OpenMP, as this torch has it, cannot be told: call torch.set_num_threads yourself, for the whole process"
    if _SET_OPENMP is None or _SET_MKL is None:
        return reason
    other = torch.get_num_threads() + 1
    with Computing(other):
        return None if torch.get_num_threads() == other else reason


def computing(work: Workload, count: int) -> tuple[Workload, Effect]:
    """The same workload with `count` threads, in each call of the model and in each training step as a whole."""
    context = functools.partial(Computing, count)
    work = within(work, context)
    told = f"computes with {threads(count)}; torch is set to {torch.get_num_threads()}"
    return work, Effect((work.backend.model_name(work),), notes=(told,))


def others(most: int) -> tuple[list[int], list[int]]:
    """The numbers of threads that may be tried: below what torch is set to, downwards, and above it, upwards.

    Args:
        most: the largest; the others are the powers of two.
    """
    ladder = [1 << i for i in range(most.bit_length()) if 1 << i < most] + [most]
    now = torch.get_num_threads()
    return [count for count in reversed(ladder) if count < now], [count for count in ladder if count > now]


def quickest(work: Workload, most: int, budget_s: float) -> tuple[Workload, Effect]:
    """The workload with the number of threads that it is the fastest with, if that is not what torch is set to.

    Time over the number of threads has one valley: the work of each shrinks, and what it takes to meet grows. So either
    way ends at the first number that is slower than the best before it. What is not tried within `LONGEST_S` is told.

    Args:
        most: the largest number of threads.
        budget_s: seconds of timing for each number.
    """
    now = chosen = torch.get_num_threads()
    ratio, low, told = 1.0, 1.0, []
    began = time.perf_counter()
    for counts in others(most):
        for count in counts:
            if told and time.perf_counter() - began > LONGEST_S:
                told.append(f"{threads(count)}: not tried, {LONGEST_S:g} s were over")
                continue
            found = _compared(work, computing(anew(work), count)[0], (threads(now), threads(count)), budget_s)
            told.append(f"{threads(count)} against {threads(now)}: {found}")
            if found.verdict == Verdict.FASTER and found.ratio > ratio:
                chosen, ratio, low = count, found.ratio, found.low
            elif found.high < low:
                break
    if chosen == now:
        return anew(work), Effect(notes=(f"no number is faster than the {now} that torch is set to", *told))
    work, effect = computing(anew(work), chosen)
    return work, replace(effect, notes=(*effect.notes, *told))


def threads(count: int) -> str:
    return f"{count} thread{'' if count == 1 else 's'}"


def _compared(work: Workload, tried: Workload, names: tuple[str, str], budget_s: float) -> Comparison:
    """The workload as it is and with other threads, timed interleaved; both are left in the state that they are in."""
    before, after = (item.backend.finish(item) for item in (work, tried))
    with before.keeping_state(), after.keeping_state():
        calls = work.backend.caller(work, before), tried.backend.caller(tried, after)
        return timing.paired(
            *calls, baseline=names[0], variant_name=names[1], budget_s=budget_s, seed=work.seed, world=work.world
        )[2]


def _openmp() -> Callable[[int], None] | None:
    """`omp_set_num_threads` as torch sees it; None where it is not in sight."""
    address = of_openmp("omp_set_num_threads")
    # It takes nanoseconds, for which Python's lock is not given away.
    return ctypes.PYFUNCTYPE(None, ctypes.c_int)(address) if address else None


def _mkl() -> Callable[[int], int] | None:
    """`mkl_set_num_threads_local`, which returns what was set before, 0 for nothing; None where it is not in sight.

    A function that does nothing where torch was built without MKL.
    """
    if not torch.backends.mkl.is_available():
        return int
    path = next(Path(torch.__file__).parent.glob("lib/libtorch_cpu.*"), None)
    return getattr(ctypes.PyDLL(path and str(path)), "MKL_Set_Num_Threads_Local", None)


_SET_OPENMP = _openmp()
_SET_MKL = _SET_OPENMP and _mkl()
