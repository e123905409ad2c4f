"""What the ops share in torch: who looks on at a call, what autocast makes of it, what is remembered of its like."""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from perfkit.kernels import _autotune, _op
from perfkit.kernels._op import Choice, Op, Problem

PLAIN = {Tensor, torch.nn.Parameter}
_MOST = 4096


def observer(tensors: Iterable[Tensor]) -> str | None:
    """Who must see a call as one operation, or be given other numbers than lie in memory; None for nobody.

    "compiled": torch.compile or torch.export; "subclassed": a tensor's class; "transformed": torch.func; "dual": a
    derivative in forward mode; "traced": a dispatch mode, torch.jit.trace, or a profiler, which knows operators alone;
    "negated": a tensor negated lazily.
    """
    if torch.compiler.is_compiling():
        return "compiled"
    if not PLAIN.issuperset(map(type, tensors)):
        return "subclassed"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "transformed"
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        return "dual"
    if torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None:
        return "traced"
    if torch.autograd._profiler_enabled() and not counts_allocations():
        return "traced"
    return "negated" if any(map(Tensor.is_neg, tensors)) else None


class _Counting(threading.local):
    on = False


_counting = _Counting()


@contextmanager
def counting_allocations() -> Iterator[None]:
    """Within it this thread's profiler is there for what tensors take alone: calls are made as they are without it."""
    before, _counting.on = _counting.on, True
    try:
        yield
    finally:
        _counting.on = before


def counts_allocations() -> bool:
    return _counting.on


def autocasts(device: str) -> bool:
    """Whether autocast is on for such devices, of those that have it here."""
    return device in ("cpu", "cuda") and torch.is_autocast_enabled(device)


def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What autocast makes of an argument: float64 and integers stay."""
    narrow = tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if narrow else tensor


def lowered(device: str, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """What autocast makes of an operation's arguments, where it is on for such devices."""
    if not autocasts(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(cast(tensor, dtype) for tensor in tensors)


@functools.cache
def of_openmp(name: str) -> int:
    """The address of a function of torch's OpenMP runtime, GNU's or LLVM's; 0 where none is in sight.

    Wheels for x86 put the runtime where all libraries see it; those for ARM, where what torch computes with does.
    """
    for library in (None, *map(str, Path(torch.__file__).parent.glob("lib/libtorch_cpu.*"))):
        try:
            return ctypes.cast(getattr(ctypes.CDLL(library), name), ctypes.c_void_p).value
        except (AttributeError, OSError, TypeError):  # TypeError: Windows has no namespace of all libraries
            continue
    return 0


def parallel() -> int:
    """The address of `GOMP_parallel`; 0 where it is not in sight."""
    return of_openmp("GOMP_parallel")


class Threads(ctypes.Structure):
    """`Threads` of _thread_pool.hpp."""

    _fields_ = (("count", ctypes.c_int64), ("parallel", ctypes.c_void_p))

    @classmethod
    def of_torch(cls) -> Threads:
        """torch's own, as many as it uses."""
        return _as_many(torch.get_num_threads())


@functools.cache
def _as_many(count: int) -> Threads:
    return Threads(count, parallel())


class Known:
    """The problem of a call, checked, and who computes it: found once for all calls of a kind."""

    def __init__(self, op: Op):
        self.op = op
        self._found: dict[Any, tuple[Problem, Choice]] = {}

    def __call__(
        self, kind: Any, problem: Callable[[], Problem], implementation: str | None, *, recorded: bool = True
    ) -> tuple[Any, Choice]:
        """What is known of calls that are alike in `kind`; `problem()` is made of the first of them."""
        kind = kind, implementation, _autotune.state()
        found = self._found.get(kind)
        if found is None:
            made = problem()
            if len(self._found) >= _MOST:
                self._found.clear()
            found = self._found[kind] = made, self.op.choose(made, implementation, recorded=recorded)
        elif recorded and _op.tracing():
            self.op.choose(found[0], implementation)
        return found


def folded(calls: int, tensor: Tensor | None, dim: int | None, at: int) -> Tensor | None:
    """vmap's calls and the batch, number `at` of a single call's dimensions, as one."""
    if tensor is None:
        return None
    tensor = tensor.unsqueeze(0).expand(calls, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.movedim(0, at).flatten(at, at + 1)


def one_by_one(run: Callable[..., Any], info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, Any]:
    """vmap's calls after each other, the results stacked."""

    def pick(given, dim, call):
        if isinstance(given, (list, tuple)):
            return [pick(each, of_it, call) for each, of_it in zip(given, dim, strict=True)]
        return given if dim is None else given.select(dim, call)

    calls = [run(*map(functools.partial(pick, call=call), arguments, in_dims)) for call in range(info.batch_size)]
    if isinstance(calls[0], Tensor):
        return torch.stack(calls), 0
    found = [torch.stack(each) for each in zip(*calls, strict=True)]
    kind = type(calls[0])  # a list of tensors, or a tuple of outputs
    return kind(found), kind([0] * len(found))
