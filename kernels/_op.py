"""What every op folder offers, and the one rule that picks who computes a call.

An `Op` has several `Implementation`s of one contract. `Op.choose` takes the one that was measured to be fastest here on
such shapes (`_autotune.py`), else the first in order that neither refuses nor expects the library to be faster.
`implementation=` forces one. `trace` tells
which one ran and why the others did not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from perfkit._errors import InvalidInputError, UnsupportedError, nearest
from perfkit.kernels import _autotune


class Problem(Protocol):
    """One call of an op, without its numbers: a frozen dataclass, validated when it is made.

    Attributes:
        framework: "torch" or "jax".
        device: "cpu", "cuda" or "tpu".
        dtype: "float32", "bfloat16", "float16", ...
        needs_grad: a backward pass may follow.
        bucket: the shapes and options, rounded: calls of one bucket share what was measured.
    """

    @property
    def framework(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def needs_grad(self) -> bool: ...
    @property
    def bucket(self) -> str: ...


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    Args:
        name: "cpu", "triton" or "pallas" for kernels of our own, "library" for the framework's layer, "reference".
        framework: the one whose arrays it takes.
        devices: where it runs; empty for everywhere.
        refusal: why it cannot take a problem, None where it can. Asked only for problems of its framework and devices.
        slower: why the "library" behind it is expected to be faster on a problem that both can take, None where it is
            not. From estimates or another machine: asked only where nothing was measured and nobody forces it.
    """

    name: str
    framework: str
    refusal: Callable[[Any], str | None]
    devices: tuple[str, ...] = ()
    slower: Callable[[Any], str | None] = lambda _problem: None

    def why_not(self, problem: Problem) -> str | None:
        """Why it cannot take `problem`, None where it can."""
        if problem.device not in (self.devices or (problem.device,)):
            return f"it runs on {' and '.join(self.devices)}, and this call is on {problem.device}"
        return self.refusal(problem)


@dataclass(frozen=True)
class Choice:
    """Who computes a call.

    Args:
        op: its name.
        implementation: the name of the one that runs.
        why: what made it so, for people.
        refused: the name and reason of each that cannot take the call, or was left out as `slower`.
        configuration: tile sizes and the like that were measured best; empty where nothing was.
    """

    op: str
    implementation: str
    why: str
    refused: tuple[tuple[str, str], ...] = ()
    configuration: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Op:
    """One contract and those who keep it.

    Args:
        name: the folder's.
        implementations: in the order in which they are tried where nothing was measured.
    """

    name: str
    implementations: tuple[Implementation, ...]

    def choose(self, problem: Problem, implementation: str | None = None, *, recorded: bool = True) -> Choice:
        """Who computes `problem`; `trace` tells of it if `recorded`.

        Raises:
            InvalidInputError: there is no `implementation` of that name.
            UnsupportedError: it cannot take the problem, or nobody can.
        """
        choice = _choose(self, problem, implementation, _autotune.state())
        for calls in _traces.get() if recorded else ():
            calls.append(choice)
        return choice

    def named(self, problem: Problem, name: str) -> Implementation:
        """The implementation called `name` for the problem's framework."""
        known = {found.name: found for found in self.implementations if found.framework == problem.framework}
        if name not in known:
            raise InvalidInputError(
                f"{self.name} has no implementation {name!r} for {problem.framework}: {nearest(name, known)}"
            )
        return known[name]


@functools.lru_cache(maxsize=4096)
def _choose(op: Op, problem: Problem, implementation: str | None, _tables: tuple) -> Choice:
    if implementation is not None:
        if reason := op.named(problem, implementation).why_not(problem):
            raise UnsupportedError(f"{op.name} cannot run on implementation {implementation!r}: {reason}")
        tuned = _autotune.lookup(op.name, problem)
        configuration = tuned.configuration if tuned and tuned.implementation == implementation else ()
        return Choice(op.name, implementation, "asked for", configuration=configuration)
    mine = [found for found in op.implementations if found.framework == problem.framework]
    reasons = {found.name: found.why_not(problem) for found in mine}
    refused = tuple((name, reason) for name, reason in reasons.items() if reason)
    able = [name for name, reason in reasons.items() if not reason]
    if not able:
        told = "; ".join(f"{name}: {reason}" for name, reason in refused)
        raise UnsupportedError(f"no implementation of {op.name} takes this call ({told or 'there is none'})")
    tuned = _autotune.lookup(op.name, problem)
    if tuned is not None and tuned.implementation in able:
        return Choice(
            op.name, tuned.implementation, f"measured fastest on {tuned.device}", refused, tuned.configuration
        )
    before = able[: able.index("library")] if "library" in able else []
    slow = {name: reason for name in before if (reason := op.named(problem, name).slower(problem))}
    chosen = next(name for name in able if name not in slow)
    return Choice(op.name, chosen, "first that takes the call; nothing was measured here", (*refused, *slow.items()))


_traces: ContextVar[tuple[list[Choice], ...]] = ContextVar("perfkit.kernels.trace", default=())


def tracing() -> bool:
    """Whether somebody collects who computes calls."""
    return bool(_traces.get())


@contextmanager
def trace() -> Iterator[list[Choice]]:
    """Collect who computes the calls made inside, in order. Calls in a compiled program count once, when it is traced.

    Example:
        >>> with trace() as calls:
        ...     y = perfkit.kernels.conv2d(x, weight)
        >>> calls[0].implementation, calls[0].why
    """
    calls: list[Choice] = []
    token = _traces.set((*_traces.get(), calls))
    try:
        yield calls
    finally:
        _traces.reset(token)
