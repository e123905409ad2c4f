"""A report in the terminal: a short proof, read from the top."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement as Extent
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from perfkit._report import Report
from perfkit.reporting import _environment_facts, _facts, _parallel_facts, _search_facts, _table_facts
from perfkit.reporting._format import clean, counted, listing, shorten

STYLES = {"good": "bold green", "bad": "bold red", "neutral": "bold yellow"}
BAR_CELLS = 16
# What a reader can take in before the page takes over.
MOST_REASONS, MOST_CANDIDATES, MOST_ALIKE = 3, 20, 2
MOST_TEXT_LENGTH, MOST_NAME_LENGTH = 110, 48
NARROWEST_SUMMARY = 96


def render(report: Report) -> RenderableType:
    """The report as something rich can print at any width."""
    return _Proof(report)


def summary_table(rows: Sequence[tuple[str, Report]]) -> RenderableType:
    """One line for each (label, report); on a narrow screen two, with the intervals below their ratios."""
    return _Summary(tuple(rows))


def to_text(renderable: RenderableType, width: int) -> str:
    """What rich would print, as text without colour."""
    # Everything that rich would find out about the terminal is said here, so that the text is the same everywhere.
    written = io.StringIO()
    console = Console(
        file=written,
        width=width,
        color_system=None,
        force_terminal=False,
        force_jupyter=False,
        legacy_windows=False,
    )
    console.print(renderable)
    return "\n".join(line.rstrip() for line in written.getvalue().splitlines()) + "\n"


@dataclass(frozen=True)
class _Proof:
    report: Report

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from _header(self.report)
        yield from _quantities(self.report)
        if self.report.steps:
            yield from _steps(self.report, bars=options.max_width >= 90)
        yield from _statements(self.report)
        if self.report.candidates:
            yield from _candidates(self.report)
        yield from _notes(self.report)


def _header(report: Report) -> Iterator[RenderableType]:
    what = " · ".join((shorten(clean(report.model), 2 * MOST_NAME_LENGTH), *map(clean, _facts.identity(report))))
    yield line(what, "bold")
    yield line(f"recipe {report.recipe}" + (f" · inputs {report.inputs}" if report.inputs else ""), "dim")
    yield Text()
    head = _facts.headline(report)
    unmeasured = report.speedup is None and head.evidence
    yield line(f"{head.text}: {head.evidence}" if unmeasured else head.text, STYLES[head.tone])
    if head.evidence and not unmeasured:
        yield line(head.evidence, "dim")
    if head.explanation:
        yield line(head.explanation)
    for alarm in _facts.alarms(report):
        yield line(f"! {alarm}", "bold red")
    yield Text()


def _quantities(report: Report) -> Iterator[RenderableType]:
    table = text_table("", ("before", "right"), ("after", "right"), ("change", "right"))
    table.columns[2].style = "bold"
    for row in _table_facts.rows(report):
        table.add_row(*(cell(value) for value in (row.label, row.before, row.after, row.change)))
    yield table
    for reason in _table_facts.missing(report):
        yield indented(f"unavailable: {reason}")
    yield Text()


def _steps(report: Report, *, bars: bool) -> Iterator[RenderableType]:
    columns = [("touched", "right"), ("skipped", "right"), ("speedup so far", "left"), ("", "left")]
    table = text_table("step", *columns, *([("", "left")] if bars else []))
    ratios = [step.speedup.ratio for step in report.steps if _facts.measured(step.speedup)]
    most = max([1.0, *ratios])
    if ratios:
        table.add_row(*map(cell, ("original", "", "", "1.00×", "")), *([bar(1, most)] if bars else []))
    details = []
    for step in report.steps:
        facts = _facts.step_facts(step)
        name = cell(_name(facts.recipe))
        if facts.status != "applied":
            name.append(f"  {facts.status}", "bold yellow")
        drawn = bar(step.speedup.ratio, most) if _facts.measured(step.speedup) else Text()
        cells = (str(facts.touched), str(facts.skipped), facts.speedup, facts.verdict)
        table.add_row(name, *map(cell, cells), *([drawn] if bars else []))
        details += _step_details(facts)
    yield table
    yield from details
    yield Text()


def _step_details(facts: _facts.StepFacts) -> Iterator[RenderableType]:
    name = _name(facts.recipe)
    if facts.reasons:
        told = [_told(reason) for reason in facts.reasons[:MOST_REASONS]]
        if (rest := len(facts.reasons) - MOST_REASONS) > 0:
            told.append(counted(rest, "more reason"))
        yield indented(f"{name} skipped {'; '.join(told)}")
    for note in facts.notes:
        yield indented(f"{name}: {note}")


def _statements(report: Report) -> Iterator[RenderableType]:
    """What else is known, one fact a line."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    result = report.fidelity
    status = "" if result is None else "ok: " if result.ok else "FAILED: "
    table.add_row("fidelity", line(status + _facts.fidelity(result), "" if result is None or result.ok else "bold red"))
    if result is not None:
        table.add_row("", line(_facts.fidelity_extras(result)))
    if report.losses is not None:
        table.add_row("loss", line(_facts.losses(report)))
    if report.metric is not None:
        table.add_row("metric", line(("ok: " if report.metric.ok else "FAILED: ") + _facts.metric(report)))
    if report.speedup is not None or report.against_compiled is not None:
        table.add_row("compiler", line(_facts.compiled(report)))
    table.add_row("payback", line(_facts.payback(report)))
    for label, value in _parallel_facts.parallel_rows(report):
        table.add_row(label, line(value))
    yield table


def _candidates(report: Report) -> Iterator[RenderableType]:
    tried = [
        ((_told(item.recipe), item.outcome, item.speedup, item.fidelity, _told(item.reason)), item.won)
        for item in _search_facts.candidate_facts(report)
    ]
    columns = ("outcome", "left"), ("speedup", "left"), ("fidelity", "left"), ("why it lost", "prose")
    yield from _first_rows(text_table("candidate", *columns), tried, "candidate")
    left_out = [
        ((listing(map(_told, item.recipes), MOST_ALIKE), item.outcome, _told(item.reason)), False)
        for item in _search_facts.left_out(report)
    ]
    yield from _first_rows(text_table("left out", ("outcome", "left"), ("why", "prose")), left_out, "reason")


def _first_rows(table: Table, rows: Sequence[tuple[tuple[str, ...], bool]], noun: str) -> Iterator[RenderableType]:
    """The table with as many rows of (cells, whether they stand out) as can be taken in; nothing without any."""
    if not rows:
        return
    for cells, bold in rows[:MOST_CANDIDATES]:
        table.add_row(*(cell(value, "bold" if bold else "") for value in cells))
    yield Text()
    yield table
    if (rest := len(rows) - MOST_CANDIDATES) > 0:
        yield indented(f"{counted(rest, f'more {noun}')} in the HTML and JSON reports")


def _notes(report: Report) -> Iterator[RenderableType]:
    yield Text()
    for note in report.notes:
        yield line(f"note: {note}")
    yield line(f"measured on {_environment_facts.environment_line(report.environment)}", "dim")


@dataclass(frozen=True)
class _Summary:
    rows: tuple[tuple[str, Report], ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        facts = [_search_facts.summary(label, report) for label, report in self.rows]
        one_line = _summary_table(facts, " ")
        natural = Extent.get(console, options.update(width=10_000), one_line).maximum
        if natural <= options.max_width:
            yield one_line
        elif options.max_width >= NARROWEST_SUMMARY:
            yield _summary_table(facts, "\n")
        else:
            for item in facts:
                yield from _summary_lines(item)


def _summary_table(facts: Iterable[_search_facts.SummaryFacts], join: str) -> Table:
    columns = (("recipe found", "prose"), ("speedup", "left"), ("vs compiler", "left"), ("tensor peak", "left"))
    table = text_table("model", *columns, ("error", "left"), ("tried and lost", "prose"))
    for item in facts:
        table.add_row(
            cell(_name(item.label), "bold"),
            cell(_name(item.recipe)),
            cell(_joined(join, *item.speedup), STYLES[item.headline.tone]),
            cell(_joined(join, *item.compiled)),
            cell(_joined(f" →{join}", *item.peak)),
            cell(
                _joined(join, item.error, "" if item.fidelity_ok else "FAILED"), "" if item.fidelity_ok else "bold red"
            ),
            cell(_name(item.lost)),
        )
    return table


def _summary_lines(item: _search_facts.SummaryFacts) -> Iterator[RenderableType]:
    """The same as the table's row, for a screen too narrow for a table."""
    label = line(_name(item.label), "bold")
    yield Text("  ").join((label, line(item.headline.text, STYLES[item.headline.tone])))
    recipe, lost = (_told(text) for text in (item.recipe, item.lost))
    yield indented(f"recipe {recipe}")
    yield indented(f"tried and lost {lost}")
    yield indented(f"vs compiler {_joined(' ', *item.compiled)}")
    error = item.error if item.fidelity_ok else f"{item.error} FAILED"
    yield indented(f"tensor peak {item.peak[0]} → {item.peak[1]}; relative error {error}")


def _joined(join: str, *parts: str) -> str:
    return join.join(part for part in parts if part)


def _name(text: str) -> str:
    return shorten(clean(text), MOST_NAME_LENGTH)


def _told(text: str) -> str:
    return shorten(clean(text), MOST_TEXT_LENGTH)


def text_table(first: str, *columns: tuple[str, str]) -> Table:
    """A table whose first column and columns of "prose" wrap; a number with its interval never does."""
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), collapse_padding=True, header_style="dim", show_edge=False
    )
    # Names fold: a recipe cut short cannot be typed again.
    table.add_column(first, overflow="fold")
    for name, kind in columns:
        prose = kind == "prose"
        table.add_column(name, justify="right" if kind == "right" else "left", overflow="fold", no_wrap=not prose)
    return table


def line(text: str, style: str = "") -> Text:
    """A line of the report: never rich markup, never a control sequence, whatever the model is called."""
    return Text(clean(text), style)


def cell(text: str, style: str = "") -> Text:
    """A table's cell; a line break is ours, so each line is cleaned by itself."""
    return Text("\n".join(clean(line) for line in text.split("\n")), style)


def indented(text: str) -> Padding:
    return Padding(line(text, "dim"), (0, 0, 0, 2))


def bar(ratio: float, most: float) -> Text:
    """A bar from zero, in eighths of a cell; the colour adds nothing to its length."""
    eighths = max(1, round(8 * BAR_CELLS * ratio / most))
    return Text("█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip(), "cyan")
