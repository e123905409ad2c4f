"""What a report says, as words and numbers ready to lay out: the same in the terminal, in Markdown and in HTML.

Nothing here is escaped or shortened: each renderer does that in its own way, at its own edge.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from perfkit._quantity import NOT_FINITE, Comparison, Verdict
from perfkit._report import Fidelity, Report, Step
from perfkit.reporting._format import (
    counted,
    format_comparison,
    format_count,
    format_error,
    format_interval,
    format_percent,
    format_quantity,
    format_seconds,
    with_reason,
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


def losses(report: Report) -> str:
    """Where the two loss curves end."""
    if report.losses is None or not report.losses.before or not report.losses.after:
        return ""
    last = tuple(_plain_number(curve[-1]) for curve in (report.losses.before, report.losses.after))
    return f"last of {counted(len(report.losses.before), 'step')}: {last[0]} → {last[1]}"


def _plain_number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else NOT_FINITE
