"""Questions that several readers of a profile ask: which operations cost most, and what share of a step is theirs."""

from __future__ import annotations

import math

from perfkit.profiling._time_data import Op, Time


def on_device(time: Time) -> bool:
    """Whether a device's kernels were recorded: the host's operations then run beside them, and are not added."""
    return any(op.kind == "kernel" for op in time.ops)


def hottest(time: Time) -> tuple[Op, ...]:
    """The operations that the step consists of, longest first: a device's kernels where there are any."""
    kind = "kernel" if on_device(time) else "op"
    return tuple(sorted((op for op in time.ops if op.kind == kind), key=lambda op: -op.self_ms))


def whole_ms(time: Time) -> float:
    """What the times of operations are parts of.

    The profiler slows the host, so the host's operations are parts of a step that it slowed; a kernel takes as long
    as it would without.
    """
    if on_device(time):
        return time.step.median_ms
    return math.fsum(time.phases_ms.values()) or time.step.median_ms


def share(ms: float, time: Time) -> float:
    """What part of a step `ms` is, where `ms` is the time of an operation or a module."""
    whole = whole_ms(time)
    return ms / whole if whole else 0.0
