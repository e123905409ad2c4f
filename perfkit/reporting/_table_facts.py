"""The table of a report: each quantity before and after, how it was measured, or why it was not."""

from __future__ import annotations

from dataclasses import dataclass

from perfkit._quantity import Quantity
from perfkit._report import Report
from perfkit.reporting._format import format_bytes, format_change, format_count, format_quantity


@dataclass(frozen=True)
class Row:
    """One quantity before and after."""

    label: str
    before: str
    after: str
    change: str


def rows(report: Report) -> tuple[Row, ...]:
    """The before and after table. A percentile that neither side has is left to `missing`."""
    told = []
    for label, before, after in _quantities(report):
        percentile = label.startswith("p") and label.endswith("latency")
        if percentile and before.value is None and after.value is None:
            continue
        both = before.value is not None and after.value is not None
        change = format_change(before.value, after.value) if both else ""
        told.append(Row(label, format_quantity(before), format_quantity(after), change))
    sizes = (report.before.model_bytes, report.after.model_bytes)
    told.append(Row("model size", format_bytes(sizes[0]), format_bytes(sizes[1]), format_change(*sizes)))
    counts = (report.before.parameters, report.after.parameters)
    told.append(Row("parameters", format_count(counts[0]), format_count(counts[1]), format_change(*counts)))
    return tuple(told)


def missing(report: Report) -> tuple[str, ...]:
    """Why quantities are unavailable: one line a reason, naming all that it holds for."""
    reasons: dict[str, list[str]] = {}
    for label, before, after in _quantities(report):
        if before.unavailable is not None and before.unavailable == after.unavailable:
            reasons.setdefault(before.unavailable, []).append(label)
            continue
        for side, quantity in (("before", before), ("after", after)):
            if quantity.unavailable is not None:
                reasons.setdefault(quantity.unavailable, []).append(f"{label} ({side})")
    return tuple(f"{', '.join(labels)}: {reason}" for reason, labels in reasons.items())


def methods(report: Report) -> tuple[str, ...]:
    """How quantities were measured, one line a method."""
    found: dict[str, list[str]] = {}
    for label, before, after in _quantities(report):
        for method in dict.fromkeys(quantity.method for quantity in (before, after) if quantity.method):
            found.setdefault(method, []).append(label)
    return tuple(f"{', '.join(labels)}: {method}" for method, labels in found.items())


def _quantities(report: Report) -> tuple[tuple[str, Quantity, Quantity], ...]:
    """Every row of the table that may be unavailable: label, before, after."""
    before, after = report.before, report.after
    untimed = Quantity.missing("ms", report.not_measured or "nothing was timed")

    def latency(label: str, field: str) -> tuple[str, Quantity, Quantity]:
        sides = [getattr(side.latency, field) if side.latency else untimed for side in (before, after)]
        return label, sides[0], sides[1]

    states = before.optimizer_state_bytes, after.optimizer_state_bytes
    optimizer = [("optimizer state", *states)] if report.mode == "training" else []
    medians = [Quantity(side.latency.median_ms, "ms") if side.latency else untimed for side in (before, after)]
    return (
        ("median latency", medians[0], medians[1]),
        latency("p90 latency", "p90_ms"),
        latency("p95 latency", "p95_ms"),
        latency("p99 latency", "p99_ms"),
        ("throughput", before.throughput, after.throughput),
        ("first call", before.first_call_s, after.first_call_s),
        ("compile", before.compile_s, after.compile_s),
        ("tensor peak", before.tensor_peak_bytes, after.tensor_peak_bytes),
        ("process high-water", before.process_high_water_bytes, after.process_high_water_bytes),
        *optimizer,
    )
