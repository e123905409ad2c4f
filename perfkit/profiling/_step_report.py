"""From what a loop's profiler wrote down to a report, and from several processes' reports to one."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

import perfkit
from perfkit._errors import InvalidInputError
from perfkit._quantity import Quantity
from perfkit.measure import statistics as measured
from perfkit.measure.environment import environment
from perfkit.profiling._profile import Finding
from perfkit.profiling._step_data import MergedSteps, Steps, StepTime
from perfkit.reporting._format import counted, format_bytes, format_percent

SLOWEST, MOST_SHOWN = 5, 500
FEWEST_POINTS = 4
WORTH = 0.05
"""A share of the time below which nothing is said."""

LEAK_BYTES = 4096.0
"""Resident memory moves by pages: what grows by less than one per step is not called a leak."""


@dataclass
class Log:
    """What a profiler wrote down after warm-up.

    Args:
        seconds: from the first step to the end of the last.
        watching_s: of them, spent on watching.
        memory: of watched steps: number, resident bytes of the process, bytes on devices (None without).
        batches: whether batches came through the profiler, so that waiting for them is known.
    """

    steps: list[StepTime] = field(default_factory=list)
    seconds: float = 0.0
    watching_s: float = 0.0
    memory: list[tuple[int, float | None, float | None]] = field(default_factory=list)
    recompiles: int = 0
    batches: bool = False


def report(log: Log, *, rank: int, processes: int, warmup: int, every: int, outcome: str, explanation: str) -> Steps:
    """Medians, shares and slopes of a log."""
    rows = log.steps
    nothing = "no step was counted"
    data = _median(
        rows, lambda row: row.data_ms if log.batches else None, nothing if not rows else "batches() was not used"
    )
    resident = _slope([(at, held) for at, held, _ in log.memory], "resident memory of the process")
    on_devices = [(at, held) for at, _, held in log.memory]
    device = _slope(on_devices, "memory that the framework holds on devices")
    if on_devices and all(held is None for _, held in on_devices):
        device = Quantity.missing("B", "there is no device with memory of its own")
    share = _ratio(sum(row.data_ms for row in rows) / 1e3, log.seconds, "time in next(loader) / time")
    if not log.batches:
        share = Quantity.missing("ratio", "batches() was not used")
    found = Steps(
        rank=rank,
        processes=processes,
        outcome=outcome,
        explanation=explanation,
        warmup=warmup,
        every=every,
        counted=len(rows),
        step=measured.latency([_total(row) for row in rows]) if rows else None,
        data_ms=data,
        compute_ms=_median(rows, lambda row: row.compute_ms, nothing),
        sync_ms=_median(rows, lambda row: row.sync_ms, "no step was watched"),
        data_share=share,
        throughput=_throughput(log),
        resident_growth=resident,
        device_growth=device,
        recompiles=log.recompiles,
        overhead=_ratio(log.watching_s, log.seconds, "time in the profiler / time"),
        slowest=tuple(sorted(rows, key=_total, reverse=True)[:SLOWEST]),
        timeline=tuple(rows[:: max(1, -(-len(rows) // MOST_SHOWN))]),
        findings=(),
        environment=environment(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        perfkit_version=perfkit.__version__,
    )
    return _with_findings(found)


def merged(reports: Iterable[Steps | str | Path]) -> MergedSteps:
    """One report of the reports of all processes, or of the files that they wrote.

    Raises:
        InvalidInputError: there are none, two are of the same process, or a file holds no such report.

    Example:
        >>> print(merged(Path().glob("steps.rank*.json")))
    """
    read = [report if isinstance(report, Steps) else Steps.from_json(report) for report in reports]
    ranks = tuple(sorted(read, key=lambda steps: steps.rank))
    numbers = [steps.rank for steps in ranks]
    if not ranks or len(set(numbers)) < len(numbers):
        raise InvalidInputError(f"reports of the ranks {numbers}: expected one of each process, and at least one")
    rates = [steps.throughput.value for steps in ranks]
    computing = [steps.compute_ms.value or 0.0 for steps in ranks]
    slowest = max(range(len(ranks)), key=lambda index: computing[index])
    mean = statistics.fmean(computing)
    return MergedSteps(
        ranks=ranks,
        throughput=(
            Quantity.missing("items/s", "some processes do not know theirs")
            if None in rates
            else Quantity(sum(rate or 0.0 for rate in rates), "items/s", method=f"sum over {len(ranks)} processes")
        ),
        slowest_rank=ranks[slowest].rank,
        imbalance=_ratio(computing[slowest], mean, "median computing time of the slowest process / mean of all"),
    )


def _with_findings(steps: Steps) -> Steps:
    found = [
        *_data_bound(steps),
        *_growing(steps.device_growth, 1.0, "device"),
        *_growing(steps.resident_growth, LEAK_BYTES, "process"),
        *_recompiling(steps),
    ]
    return dataclasses.replace(steps, findings=tuple(sorted(found, key=lambda one: one.share, reverse=True)))


def _data_bound(steps: Steps) -> list[Finding]:
    share = steps.data_share.value or 0.0
    if share < WORTH:
        return []
    return [
        Finding(
            kind="waiting for data",
            told=f"Waiting for batches takes {format_percent(share)} of the time.",
            where=(),
            share=share,
            resource="time",
            recipe="",
            advice="Load ahead: more workers in the loader, or a thread that prefetches; cheaper decoding.",
            predicted=Quantity(
                1 / (1 - share) if share < 1 else 1.0, "ratio", method="all loading hidden behind computing"
            ),
        )
    ]


def _growing(growth: Quantity, least: float, what: str) -> list[Finding]:
    if (growth.value or 0.0) < least:
        return []
    return [
        Finding(
            kind="memory grows",
            told=f"Memory of the {what} grows by {format_bytes(growth.value)} each step.",
            where=(),
            share=0.0,
            resource="memory",
            recipe="",
            advice="Look for lists that keep outputs or losses with their history: keep numbers, or detach them.",
            predicted=Quantity.missing("ratio", "it depends on how long the loop runs"),
        )
    ]


def _recompiling(steps: Steps) -> list[Finding]:
    if not steps.recompiles:
        return []
    return [
        Finding(
            kind="recompilation",
            told=f"{counted(steps.recompiles, 'compilation')} took place after the warm-up of {steps.warmup} steps.",
            where=(),
            share=min(1.0, steps.recompiles / max(steps.counted, 1)),
            resource="time",
            recipe="",
            advice="Pad batches to few shapes, drop the last short one, pass changing numbers as tensors or arrays.",
            predicted=Quantity.missing("ratio", "how long they took is not known"),
        )
    ]


def _total(row: StepTime) -> float:
    return max(row.data_ms + row.compute_ms + (row.sync_ms or 0.0), 1e-6)


def _median(rows: Sequence[StepTime], of: Callable[[StepTime], float | None], reason: str) -> Quantity:
    values = [value for row in rows if (value := of(row)) is not None]
    if not values:
        return Quantity.missing("ms", reason)
    return Quantity(statistics.median(values), "ms", method=f"median of {len(values)} steps")


def _ratio(part: float, whole: float, method: str) -> Quantity:
    return (
        Quantity(part / whole, "ratio", method=method)
        if whole > 0
        else Quantity.missing("ratio", "no step was counted")
    )


def _throughput(log: Log) -> Quantity:
    if not log.steps or log.seconds <= 0:
        return Quantity.missing("items/s", "no step was counted")
    counts = [row.items for row in log.steps]
    if None in counts:
        return Quantity.missing("items/s", "how many items a step has is not known: pass items= to step()")
    total = sum(count or 0 for count in counts)
    return Quantity(total / log.seconds, "items/s", method=f"{total} items in {log.seconds:.3g} s")


def _slope(points: Sequence[tuple[int, float | None]], what: str) -> Quantity:
    """The median of the slopes between all pairs of points: one outlier does not move it.

    Source: Sen, "Estimates of the regression coefficient based on Kendall's tau" (1968).
    """
    known = [(at, held) for at, held in points if held is not None]
    if len(known) < FEWEST_POINTS:
        return Quantity.missing("B", f"{what}: {len(known)} watched steps know it, and it takes {FEWEST_POINTS}")
    at, held = np.array(known[-MOST_SHOWN:], float).T
    first, second = np.triu_indices(len(at), 1)
    slope = float(np.median((held[second] - held[first]) / (at[second] - at[first])))
    return Quantity(slope, "B", method=f"{what} at {len(at)} steps: median slope of all pairs")
