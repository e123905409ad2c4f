"""The difference of two profiles in the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from perfkit.profiling._align import Change
from perfkit.profiling.diff import ProfileDiff
from perfkit.reporting import _diff_facts
from perfkit.reporting._format import clean, shorten
from perfkit.reporting.terminal import cell, line, text_table

MOST_OPS, MOST_MODULES, MOST_NAME = 16, 8, 36


def render(diff: ProfileDiff) -> RenderableType:
    """The difference as something rich can print at any width."""
    return _Screen(diff)


@dataclass(frozen=True)
class _Screen:
    diff: ProfileDiff

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        diff = self.diff
        yield line(" · ".join((diff.after.model, diff.after.framework, diff.after.mode, diff.after.device)), "bold")
        yield Text()
        times, ratio = _diff_facts.headline(diff)
        yield line(times, "bold green" if diff.saved_ms > 0 else "bold yellow")
        yield line(ratio, "dim")
        for caution in diff.cautions:
            yield line(f"! {caution}", "bold red")
        yield Text()
        shown = _diff_facts.weighty(diff, diff.ops)[:MOST_OPS]
        table = _table("operation", "where", shown)
        for row in _diff_facts.foot(diff, shown):
            style = "bold" if row.name == "whole step" else ""
            table.add_row(*(cell(text, style) for text in (row.name, row.before, row.after, row.saved, "", "")))
        yield table
        yield Text()
        if modules := _diff_facts.weighty(diff, diff.modules)[:MOST_MODULES]:
            yield _table("module", "class", modules)
        yield from _memory(diff)
        yield Text()
        yield line(f"note: {_diff_facts.HOW}")


def _table(first: str, last: str, changes: Sequence[Change]) -> Table:
    columns = (("before", "right"), ("after", "right"), ("saved", "right"), ("", "left"), (last, "prose"))
    table = text_table(first, *columns)
    for change, row in zip(changes, _diff_facts.time_rows(changes), strict=True):
        style = "green" if change.saved_ms > 0 else "red" if change.saved_ms < 0 else ""
        names = (shorten(clean(text), MOST_NAME) for text in (row.name, row.status, row.where))
        name, status, where = names
        cells = (
            cell(name),
            cell(row.before),
            cell(row.after),
            cell(row.saved, style),
            cell(status, "dim"),
            cell(where),
        )
        table.add_row(*cells)
    return table


def _memory(diff: ProfileDiff) -> Iterator[RenderableType]:
    rows = _diff_facts.byte_rows(change for change in diff.categories if change.saved_bytes)
    if not (peak := _diff_facts.peak(diff)):
        return
    yield Text()
    table = text_table("held at the peak", ("before", "right"), ("after", "right"), ("saved", "right"))
    for row in rows:
        table.add_row(*map(cell, (row.name, row.before, row.after, row.saved)))
    table.add_row(*(cell(text, "bold") for text in ("peak memory", *peak)))
    yield table
