"""What a report says, as words and numbers ready to lay out: the same in the terminal, in Markdown and in HTML.

Nothing here is escaped or shortened: each renderer does that in its own way, at its own edge.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from perfkit._report import Comparison, Environment, Fidelity, Quantity, Report, Step, Verdict
from perfkit.reporting._format import (
    NOT_FINITE,
    counted,
    format_bytes,
    format_change,
    format_comparison,
    format_count,
    format_error,
    format_interval,
    format_percent,
    format_quantity,
    format_seconds,
    listing,
    spaced,
)

UNAVAILABLE = "unavailable"
NOT_MEASURED = "not measured"
TONES = {Verdict.FASTER: "good", Verdict.SLOWER: "bad", Verdict.SAME: "neutral", Verdict.NOISY: "neutral"}


@dataclass(frozen=True)
class Headline:
    """The first thing a reader sees.

    Args:
        figure: "1.84×", "Original returned" or "Not measured".
        interval: "[1.79, 1.90]", or empty.
        verdict: "faster", or empty.
        tone: "good", "bad" or "neutral".
        evidence: what the figure rests on; empty where nothing was measured.
    """

    figure: str
    interval: str
    verdict: str
    tone: str
    evidence: str
    explanation: str

    @property
    def text(self) -> str:
        return " ".join(part for part in (self.figure, self.interval, self.verdict) if part)


@dataclass(frozen=True)
class Row:
    """One quantity before and after."""

    label: str
    before: str
    after: str
    change: str


@dataclass(frozen=True)
class StepFacts:
    """One step of the chain in words; `skipped` holds a line for each reason."""

    recipe: str
    stage: str
    status: str
    touched: int
    skipped: int
    reasons: tuple[str, ...]
    speedup: str
    verdict: str
    apply: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class CandidateFacts:
    """One chain that the search considered, in words."""

    recipe: str
    outcome: str
    won: bool
    speedup: str
    fidelity: str
    seconds: str
    reason: str


@dataclass(frozen=True)
class SummaryFacts:
    """One report among several, in words.

    Args:
        speedup, compiled: the ratio with what must be said of it, then its interval where there is one.
        peak: tensor peak before and after.
    """

    label: str
    recipe: str
    headline: Headline
    speedup: tuple[str, str]
    compiled: tuple[str, str]
    peak: tuple[str, str]
    error: str
    fidelity_ok: bool
    lost: str


def measured(comparison: Comparison | None) -> bool:
    """Whether there is a ratio with an interval to show or draw."""
    return comparison is not None and all(
        math.isfinite(value) and value > 0 for value in (comparison.ratio, comparison.low, comparison.high)
    )


def identity(report: Report) -> tuple[str, ...]:
    """What was optimized and where: framework, mode, device."""
    return tuple(part for part in (report.framework, report.mode, report.device) if part)


def headline(report: Report) -> Headline:
    """The outcome first: the ratio, or that the original came back, or why nothing was measured."""
    speedup = report.speedup
    if report.outcome == "original returned":
        told = f"measured {format_comparison(speedup)} {speedup.verdict}; {evidence(speedup)}" if speedup else ""
        if speedup and not speedup.pairs:
            told = "1× by identity: the result is the model that was passed in"
        unmeasured = f"{NOT_MEASURED}: {report.not_measured}" if report.not_measured else ""
        return Headline("Original returned", "", "", "neutral", told or unmeasured, report.explanation)
    if speedup is None:
        return Headline("Not measured", "", "", "neutral", report.not_measured, report.explanation)
    if report.savings:
        saved, time = f"{report.savings[0].ratio:.3g}× less {report.savings[0].what}", f"{1 / speedup.ratio:.2f}×"
        return Headline(saved, "", f"at {time} the time", "good", evidence(speedup), report.explanation)
    figure, interval = format_interval(speedup)
    return Headline(figure, interval, speedup.verdict, TONES[speedup.verdict], evidence(speedup), report.explanation)


def evidence(comparison: Comparison) -> str:
    """What a ratio rests on."""
    return (
        f"{100 * comparison.confidence:.4g}% interval from {counted(comparison.pairs, 'interleaved pair')}; "
        f"the original against itself varies by ±{format_percent(comparison.noise)}"
    )


def alarms(report: Report) -> tuple[str, ...]:
    """What must not be missed beside a good headline."""
    told = []
    if report.fidelity is not None and not report.fidelity.ok:
        told.append(f"Fidelity failed: {report.fidelity.reason or fidelity(report.fidelity)}")
    if report.metric is not None and not report.metric.ok:
        told.append(f"The metric dropped too far: {metric(report)}")
    if report.steps and not any(step.effect.touched for step in report.steps):
        told.append("NO_EFFECT: no step changed anything in this model")
    if simulated := [step.recipe for step in report.steps if step.effect.simulated]:
        told.append(f"Simulated, so without the speed of real low-precision or sparse kernels: {', '.join(simulated)}")
    return tuple(told)


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


def step_facts(step: Step) -> StepFacts:
    """One step of the waterfall."""
    reasons = Counter(part.reason for part in step.effect.skipped)
    return StepFacts(
        recipe=step.recipe,
        stage=step.stage.lower(),
        status=step.effect.status + (", simulated" if step.effect.simulated else ""),
        touched=len(step.effect.touched),
        skipped=len(step.effect.skipped),
        reasons=tuple(f"{format_count(count)} × {reason}" for reason, count in reasons.most_common()),
        speedup=format_comparison(step.speedup) if step.speedup else NOT_MEASURED,
        verdict=str(step.speedup.verdict) if step.speedup else "",
        apply=format_seconds(step.apply_s),
        notes=step.effect.notes,
    )


def fidelity(result: Fidelity | None) -> str:
    """How close the numbers are, in one line."""
    if result is None:
        return NOT_MEASURED
    line = f"relative error {format_error(result.relative_error)}, at most {format_error(result.limit)} allowed"
    return f"{line}, compared with {result.reference}" if result.reference else line


def fidelity_rows(result: Fidelity) -> tuple[tuple[str, str], ...]:
    """Everything known about the numbers, as label and value."""
    limit = f"{result.factor:g} × the original's error + {format_error(result.tolerance)}"
    found = [
        ("relative error", format_error(result.relative_error)),
        ("allowed", f"{format_error(result.limit)} = {limit}"),
        ("the original's own error", format_error(result.original_error)),
        ("largest absolute error", format_error(result.max_abs_error)),
        ("signal to quantization noise", with_reason(result.sqnr_db)),
        ("top-1 agreement", with_reason(result.top1_agreement)),
        ("compared with", result.reference),
    ]
    return tuple(found + ([("reason", result.reason)] if result.reason else []))


def fidelity_extras(result: Fidelity) -> str:
    """The rest of `fidelity_rows` that is available, in one line."""
    found = [f"largest absolute error {format_error(result.max_abs_error)}"]
    if result.sqnr_db.value is not None:
        found.append(f"SQNR {format_quantity(result.sqnr_db)}")
    if result.top1_agreement.value is not None:
        found.append(f"top-1 agreement {format_quantity(result.top1_agreement)}")
    return "; ".join(found)


def metric(report: Report) -> str:
    """The caller's own metric, or empty where there is none."""
    found = report.metric
    if found is None:
        return ""
    values = f"{_plain_number(found.before)} → {_plain_number(found.after)}"
    return f"{values} (a drop of {_plain_number(found.max_drop)} is allowed)"


def compiled(report: Report) -> str:
    """The result against the framework's plain compiler."""
    found = report.against_compiled
    if found is None:
        return NOT_MEASURED
    return f"{format_comparison(found)} {found.verdict}, compared with {found.baseline}"


def payback(report: Report) -> str:
    """After how many calls the cost of optimizing is earned back."""
    spent = f"optimizing took {format_seconds(report.optimizing_s)}"
    if report.payback_calls.value is None:
        return f"{UNAVAILABLE}: {report.payback_calls.unavailable}; {spent}"
    return f"after {format_quantity(report.payback_calls)}; {spent}"


def candidate_facts(report: Report) -> tuple[CandidateFacts, ...]:
    """The search, as it went: the winner first, then by ratio, then those without one."""
    ranked = sorted(
        report.candidates,
        key=lambda item: (item.outcome != "won", -item.speedup.ratio if measured(item.speedup) else 0.0),
    )
    return tuple(
        CandidateFacts(
            recipe=spaced(item.recipe),
            outcome=item.outcome,
            won=item.outcome == "won",
            speedup=_ratio_told(item.speedup),
            fidelity=_passed(item.fidelity),
            seconds=format_seconds(item.seconds),
            reason=item.reason,
        )
        for item in ranked
    )


def losses(report: Report) -> str:
    """Where the two loss curves end."""
    if report.losses is None or not report.losses.before or not report.losses.after:
        return ""
    last = tuple(_plain_number(curve[-1]) for curve in (report.losses.before, report.losses.after))
    return f"last of {counted(len(report.losses.before), 'step')}: {last[0]} → {last[1]}"


def parallel_rows(report: Report) -> tuple[tuple[str, str], ...]:
    """What several devices gave and cost, as label and value; empty where one process has the whole model."""
    found = report.parallel
    if found is None:
        return ()
    peaks = ", ".join(map(format_quantity, found.rank_peak_bytes))
    rows = [
        ("layout", f"{found.layout}; {counted(found.devices, 'device')}, processes: {found.processes}"),
        *(("", part) for part in found.parts),
        ("efficiency", _share(found.efficiency)),
        ("exchanged", f"{_told(found.sent_bytes)} a call by each device"),
        ("communicating", _share(found.communicating)),
        ("peak by process", peaks),
        ("model by process", ", ".join(map(format_bytes, found.rank_model_bytes))),
    ]
    if found.balance:
        rows.append(("stages", ", ".join(map(format_percent, found.balance)) + " of the work"))
        rows.append(("bubble", f"{format_percent(found.bubble)} of the time, by the schedule"))
    return tuple(rows)


def _share(quantity: Quantity) -> str:
    if quantity.value is None:
        return with_reason(quantity)
    return format_percent(quantity.value) + (f" ({quantity.method})" if quantity.method else "")


def _told(quantity: Quantity) -> str:
    return with_reason(quantity) + (f" ({quantity.method})" if quantity.method else "")


def found_recipe(report: Report) -> str:
    """The chain that was kept: of a search its winner."""
    if report.outcome == "original returned":
        return "none (original)"
    return next((item.recipe for item in report.candidates if item.outcome == "won"), report.recipe)


def summary(label: str, report: Report) -> SummaryFacts:
    """One line for a table of several reports."""
    head = headline(report)
    lost = [item.recipe for item in report.candidates if item.outcome in ("lost", "failed")]
    return SummaryFacts(
        label=label,
        recipe=spaced(found_recipe(report)),
        headline=head,
        speedup=_terse(report.speedup) if head.interval else (head.figure, ""),
        compiled=_terse(report.against_compiled),
        peak=(format_quantity(report.before.tensor_peak_bytes), format_quantity(report.after.tensor_peak_bytes)),
        error=format_error(report.fidelity.relative_error) if report.fidelity else NOT_MEASURED,
        fidelity_ok=report.fidelity is None or report.fidelity.ok,
        lost=f"{len(lost)}: {listing(lost, 2)}" if lost else "none",
    )


def environment_line(environment: Environment) -> str:
    """The machine and the libraries in one line."""
    parts = [
        f"{environment.cpu} ({counted(environment.cores, 'core')})",
        ", ".join(environment.accelerators) or "no accelerator",
        environment.os,
        f"Python {environment.python}",
        *(f"{name} {version}" for name, version in sorted(environment.libraries.items())),
        f"fingerprint {environment.fingerprint}",
    ]
    return " · ".join(parts)


def environment_rows(environment: Environment) -> tuple[tuple[str, str], ...]:
    """The machine and the libraries, as label and value."""

    def pairs(values: dict) -> str:
        return ", ".join(f"{name} {value}" for name, value in sorted(values.items())) or "none"

    return (
        ("processor", f"{environment.cpu}, {counted(environment.cores, 'core')}"),
        ("instruction sets", ", ".join(environment.instruction_sets) or "none known"),
        ("memory", with_reason(environment.memory_bytes)),
        ("accelerators", ", ".join(environment.accelerators) or "none"),
        ("system", f"{environment.os}, Python {environment.python}"),
        ("libraries", pairs(environment.libraries)),
        ("threads", pairs(environment.threads)),
        ("settings", pairs(environment.settings)),
        ("fingerprint", environment.fingerprint),
    )


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


def with_reason(quantity: Quantity) -> str:
    told = format_quantity(quantity)
    return told if quantity.unavailable is None else f"{told}: {quantity.unavailable}"


def _passed(result: Fidelity | None) -> str:
    if result is None:
        return NOT_MEASURED
    return f"{'ok' if result.ok else 'failed'}, {format_error(result.relative_error)}"


def _ratio_told(comparison: Comparison | None) -> str:
    """The interval says faster or slower by itself; that it is not to be trusted must be said."""
    if comparison is None:
        return NOT_MEASURED
    told = format_comparison(comparison)
    return f"{told} {comparison.verdict}" if comparison.verdict is Verdict.NOISY else told


def _terse(comparison: Comparison | None) -> tuple[str, str]:
    """Ratio and interval for a narrow column, with the verdict where the ratio alone would mislead."""
    if comparison is None:
        return NOT_MEASURED, ""
    figure, interval = format_interval(comparison)
    words = {Verdict.FASTER: "", Verdict.SLOWER: "slower", Verdict.SAME: "no change", Verdict.NOISY: "noisy"}
    return f"{figure} {words[comparison.verdict]}".strip(), interval


def _plain_number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else NOT_FINITE
