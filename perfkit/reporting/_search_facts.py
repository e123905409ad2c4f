"""Several chains or several reports side by side, as words and numbers: what a search considered, a table of models."""

from __future__ import annotations

from dataclasses import dataclass

from perfkit._quantity import Comparison, Verdict
from perfkit._report import Fidelity, Report
from perfkit.reporting._facts import NOT_MEASURED, Headline, headline, measured
from perfkit.reporting._format import (
    format_comparison,
    format_error,
    format_interval,
    format_quantity,
    format_seconds,
    listing,
    spaced,
)

TRIED = ("won", "lost", "failed")


@dataclass(frozen=True)
class CandidateFacts:
    """One chain that the search tried, in words."""

    recipe: str
    outcome: str
    won: bool
    speedup: str
    fidelity: str
    seconds: str
    reason: str


@dataclass(frozen=True)
class LeftOutFacts:
    """Chains that the search did not try, for the same reason."""

    recipes: tuple[str, ...]
    outcome: str
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


def candidate_facts(report: Report) -> tuple[CandidateFacts, ...]:
    """What the search tried: the winner first, then by ratio, then those without one."""
    ranked = sorted(
        (item for item in report.candidates if item.outcome in TRIED),
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


def left_out(report: Report) -> tuple[LeftOutFacts, ...]:
    """What the search did not try, by reason: what it could have tried first, and of that what is most."""
    found: dict[tuple[str, str], list[str]] = {}
    for item in report.candidates:
        if item.outcome not in TRIED:
            found.setdefault((item.outcome, item.reason), []).append(spaced(item.recipe))
    told = [LeftOutFacts(tuple(recipes), *why) for why, recipes in found.items()]
    return tuple(sorted(told, key=lambda item: (item.outcome == "refused", -len(item.recipes))))


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
