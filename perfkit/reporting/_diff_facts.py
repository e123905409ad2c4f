"""What the difference of two profiles says, as words and numbers ready to lay out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from perfkit.profiling._align import Change
from perfkit.profiling.diff import CONFIDENCE, ProfileDiff
from perfkit.reporting._format import (
    counted,
    format_bytes,
    format_ms,
    format_ratio,
)

HOW = "Two runs, each at its own time: perfkit optimize times both sides interleaved, and is the proof."

SMALLEST_EFFECT = 0.002
"""Share of a step below which a change is summed up with others of its size."""


@dataclass(frozen=True)
class Row:
    """One operation, module or category in words; `saved` of the whole step or peak."""

    name: str
    where: str
    before: str
    after: str
    saved: str
    status: str


def headline(diff: ProfileDiff) -> tuple[str, str]:
    """`12.3 ms → 9.1 ms per step`, and `1.35× as fast, 99% interval [1.31, 1.39]`."""
    per = "step" if diff.after.mode == "training" else "call"
    times = f"{format_ms(diff.before.step_ms)} → {format_ms(diff.after.step_ms)} per {per}"
    state = "if the machine was in the same state"
    if not (diff.low > 0 and math.isfinite(diff.high)):
        return times, f"{format_ratio(diff.ratio)} as fast, {state}; too few {per}s were timed for an interval"
    interval = f"{CONFIDENCE:.0%} interval [{diff.low:.2f}, {diff.high:.2f}]"
    return times, f"{format_ratio(diff.ratio)} as fast, {interval}, {state}"


def peak(diff: ProfileDiff) -> tuple[str, ...]:
    """Peak memory before, after and what is saved; empty where it is not known of both."""
    before, after = diff.before.peak_bytes, diff.after.peak_bytes
    if before is None or after is None:
        return ()
    return format_bytes(before), format_bytes(after), signed_bytes(before - after)


def weighty(diff: ProfileDiff, changes: Iterable[Change]) -> tuple[Change, ...]:
    """Those whose effect on the step's time can be seen."""
    floor = SMALLEST_EFFECT * max(diff.before.step_ms, diff.after.step_ms)
    return tuple(change for change in changes if abs(change.saved_ms) >= floor)


def time_rows(changes: Iterable[Change]) -> tuple[Row, ...]:
    """Operations or modules, by their effect on time."""
    return tuple(
        Row(
            change.name if change.phase else change.module or f"{change.name} (whole model)",
            " · ".join(part for part in (change.module, change.phase) if part) if change.phase else change.name,
            format_ms(change.before_ms) if change.status != "added" else "",
            format_ms(change.after_ms) if change.status != "removed" else "",
            signed_ms(change.saved_ms),
            f"was {change.was}" if change.was else change.status if change.status in ("added", "removed") else "",
        )
        for change in changes
    )


def foot(diff: ProfileDiff, shown: Sequence[Change]) -> tuple[Row, ...]:
    """What completes the operations that are shown to the whole step, and the step."""
    left = diff.ops[len(shown) :]
    rest = math.fsum(change.saved_ms for change in left)
    more = [Row(counted(len(left), "more operation"), "", "", "", signed_ms(rest), "")] if left else []
    whole = (diff.before.step_ms, diff.after.step_ms, diff.saved_ms)
    outside = (diff.outside.before_ms, diff.outside.after_ms, diff.outside.saved_ms)
    sums = (("outside of operations", outside), ("whole step", whole))
    return (*more, *(Row(name, "", format_ms(a), format_ms(b), signed_ms(saved), "") for name, (a, b, saved) in sums))


def byte_rows(changes: Iterable[Change]) -> tuple[Row, ...]:
    """Categories of memory, by their effect on the peak."""
    return tuple(
        Row(
            change.name,
            "",
            format_bytes(change.before_bytes),
            format_bytes(change.after_bytes),
            signed_bytes(change.saved_bytes),
            change.status,
        )
        for change in changes
    )


def signed_ms(saved: float) -> str:
    """What was saved: `1.20 ms`; `−300 µs` where it costs more."""
    return _signed(saved, format_ms)


def signed_bytes(saved: float) -> str:
    return _signed(saved, format_bytes)


def _signed(saved: float, shown: Callable[[float], str]) -> str:
    return f"−{shown(-saved)}" if saved < 0 else shown(saved)
