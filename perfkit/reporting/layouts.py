"""Predicted layouts in the terminal, the quickest first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType

from perfkit.reporting._format import format_bytes, format_ms, format_ratio
from perfkit.reporting.terminal import cell, line, text_table

if TYPE_CHECKING:
    from perfkit.parallel.planning_layouts import Layouts

COLUMNS = ("step", "speed-up", "computing", "sending", "waiting", "framework", "held")


def render(found: Layouts) -> RenderableType:
    """The layouts as something rich can print."""
    return Group(*_parts(found))


def _parts(found: Layouts) -> Iterator[RenderableType]:
    yield line(f"{found.model} · training · {found.rows} rows · {found.devices} devices ({found.device})", "bold")
    yield line(f"predicted, not run; measured: {found.measured}")
    yield line(f"one device takes {format_ms(found.one_device_s * 1e3)}")
    yield line("")
    table = text_table("layout", *((name, "right") for name in COLUMNS))
    for index, item in enumerate(found.predictions):
        times = (item.computing_s, item.sending_s, item.waiting_s, item.overhead_s)
        table.add_row(
            cell(str(item.way), "" if index else "bold green"),
            cell(format_ms(item.step_s * 1e3)),
            cell(format_ratio(found.one_device_s / item.step_s)),
            *(cell(format_ms(seconds * 1e3) if seconds else "–") for seconds in times),
            cell(format_bytes(item.held_bytes)),
        )
    yield table
    yield line("")
    yield line(f"the quickest as a recipe: {found.best.way.recipe}")
    for reason in found.refused:
        yield line(f"not possible: {reason}")
    yield line("held: weights, gradients and two moments on a device, without activations")
