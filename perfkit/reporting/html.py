"""A report as HTML: a page of its own, an output in a notebook, or several reports on one page."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from perfkit._report import Report, Step
from perfkit.reporting import _environment_facts, _facts, _parallel_facts, _search_facts, _table_facts, plots
from perfkit.reporting._format import clean, counted, format_interval, format_quantity, format_seconds, shorten

# The column's width on a desk and in a hand; the page shows the picture that fits.
WIDE, NARROW = 740, 350
# A list of every module of a large model belongs into the JSON.
MOST_NAMES, MOST_CANDIDATES, MOST_ALIKE, MOST_TITLE = 60, 200, 6, 120


def render(report: Report) -> str:
    """The report as one self-contained page; no network is needed to view it."""
    return (
        templates()
        .get_template("page.html")
        .render(title=f"{shorten(report.model, MOST_TITLE)} · perfkit", views=[_view(report)], summary=[])
    )


def embedded(report: Report) -> str:
    """The report for a notebook: an element whose style touches nothing around it."""
    return templates().get_template("embedded.html").render(view=_view(report))


def page(reports: Sequence[tuple[str, Report]]) -> str:
    """Several (label, report) on one page: a table of all, then each in full."""
    views = [_view(report, label=label, anchor=f"report-{index}") for index, (label, report) in enumerate(reports, 1)]
    summary = [_search_facts.summary(label, report) for label, report in reports]
    title = f"{counted(len(views), 'report')} · perfkit"
    return templates().get_template("page.html").render(title=title, views=views, summary=summary)


@functools.cache
def templates() -> Environment:
    """The templates of this folder: what they are given is escaped."""
    found = Environment(
        loader=PackageLoader("perfkit", "reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Escaping makes markup harmless; control characters and direction overrides have to go as well.
        finalize=lambda value: clean(value) if type(value) is str else value,
    )
    found.filters["breakable"] = breakable
    return found


def breakable(path: str) -> Markup:
    """The path of a module or an operation, with places to break a long one: behind dots and colons."""
    return Markup(re.sub(r"(::|\.)", r"\1<wbr>", str(escape(clean(path)))))  # escaped before


@dataclass(frozen=True)
class Highlight:
    """One of the few numbers that stand beside the headline; a line may break only between `parts`."""

    label: str
    parts: tuple[str, ...]
    detail: str
    ok: bool = True


@dataclass(frozen=True)
class StepDetail:
    """What a step changed and what it left alone, by name; the lists are cut, the counts are not."""

    facts: _facts.StepFacts
    touched: tuple[str, ...]
    more_touched: int
    skipped: tuple[tuple[str, str], ...]
    more_skipped: int


def _view(report: Report, label: str = "", anchor: str = "report") -> dict[str, Any]:
    """Everything the templates show, in words: they decide nothing."""
    head = _facts.headline(report)
    candidates = _search_facts.candidate_facts(report)
    return {
        "anchor": anchor,
        "label": label,
        "model": shorten(clean(report.model), MOST_TITLE),
        "identity": " · ".join(_facts.identity(report)),
        "recipe": report.recipe,
        "inputs": report.inputs,
        "head": head,
        "alarms": _facts.alarms(report),
        "highlights": _highlights(report),
        "rows": _table_facts.rows(report),
        "missing": _table_facts.missing(report),
        "methods": _table_facts.methods(report),
        "steps": [_step_detail(step) for step in report.steps],
        "fidelity": report.fidelity,
        "fidelity_rows": _facts.fidelity_rows(report.fidelity) if report.fidelity else (),
        "losses": _facts.losses(report),
        "parallel_rows": _parallel_facts.parallel_rows(report),
        "considered": bool(report.candidates),
        "candidates": candidates[:MOST_CANDIDATES],
        "more_candidates": max(0, len(candidates) - MOST_CANDIDATES),
        "left_out": [
            (item.recipes[:MOST_ALIKE], max(0, len(item.recipes) - MOST_ALIKE), item.outcome, item.reason)
            for item in _search_facts.left_out(report)[:MOST_CANDIDATES]
        ],
        "notes": report.notes,
        "environment": _environment_facts.environment_rows(report.environment),
        "footer": " · ".join(part for part in (f"perfkit {report.perfkit_version}".strip(), report.created) if part),
        "figures": {
            "latency": _figure(plots.latency, report),
            "waterfall": _figure(plots.waterfall, report),
            "memory": _figure(plots.memory, report),
            "losses": _figure(plots.losses, report),
            "candidates": _figure(plots.candidates, report),
        },
    }


def _figure(draw: Callable[[Report, float], str], report: Report) -> Markup:
    return both(lambda width: draw(report, width), WIDE, NARROW)


def both(draw: Callable[[float], str], wide_px: float, narrow_px: float) -> Markup:
    """The picture at both widths; text in a picture that is merely scaled down cannot be read on a phone."""
    # Safe as markup: the canvas escapes every text it is given.
    wide, narrow = Markup(draw(wide_px)), Markup(draw(narrow_px))
    return Markup('<div class="wide">{}</div><div class="narrow">{}</div>').format(wide, narrow) if wide else Markup()


def _highlights(report: Report) -> list[Highlight]:
    before, after = report.before, report.after
    found = []
    if before.latency is not None and after.latency is not None:
        row = _table_facts.rows(report)[0]
        found.append(Highlight(row.label, (f"{row.before} →", row.after), row.change))
    if before.tensor_peak_bytes.value is not None and after.tensor_peak_bytes.value is not None:
        row = next(row for row in _table_facts.rows(report) if row.label == "tensor peak")
        found.append(Highlight(row.label, (f"{row.before} →", row.after), row.change))
    if (result := report.fidelity) is not None:
        error, limit = _facts.fidelity_rows(result)[:2]
        told = f"{'within' if result.ok else 'failed: at most'} {limit[1].split(' = ')[0]} allowed"
        found.append(Highlight(error[0], (error[1],), told, ok=result.ok))
    if report.metric is not None:
        values, _, allowed = _facts.metric(report).partition(" (")
        found.append(Highlight("your metric", (values,), allowed.rstrip(")"), ok=report.metric.ok))
    if (against := report.against_compiled) is not None:
        detail = f"{against.verdict}, compared with {against.baseline}"
        found.append(Highlight("against the compiler", format_interval(against), detail))
    spent = f"optimizing took {format_seconds(report.optimizing_s)}"
    if (calls := report.payback_calls).value is None:
        found.append(Highlight("pays back", (_facts.UNAVAILABLE,), f"{calls.unavailable}; {spent}"))
    else:
        found.append(Highlight("pays back", (f"after {format_quantity(calls)}",), spent))
    return found


def _step_detail(step: Step) -> StepDetail:
    touched, skipped = step.effect.touched, step.effect.skipped
    return StepDetail(
        facts=_facts.step_facts(step),
        touched=touched[:MOST_NAMES],
        more_touched=max(0, len(touched) - MOST_NAMES),
        skipped=tuple((part.name, part.reason) for part in skipped[:MOST_NAMES]),
        more_skipped=max(0, len(skipped) - MOST_NAMES),
    )
