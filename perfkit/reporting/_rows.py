"""Charts made of rows: a name, marks on one shared axis, a value. Wide, they stand side by side; narrow, stacked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from perfkit._quantity import Comparison
from perfkit.reporting import _svg
from perfkit.reporting._svg import Canvas, Scale

# Below this width there is no room for a column of names.
NARROW = 520
NAME_WIDTH, VALUE_WIDTH, INSET = 222, 148, 24
AXIS_HEIGHT = 34


@dataclass(frozen=True)
class Row:
    """One row.

    Args:
        name: what the row is about, in code type.
        about: a small line below the name.
        value: the number at the row's end.
        draw: draws the marks around the height `y` it is given, and a connection from the row above, which ends at
            `above`, or None where there is no room for one; None where there is nothing to draw.
    """

    name: str
    about: str
    value: str
    draw: Callable[[Canvas, Scale, float, float | None], None] | None


def ratio_chart(rows: Sequence[Row], ratios: Sequence[Comparison], width: float, title: str, description: str) -> str:
    """Rows of speed-ups on one axis, with a reference line at 1×, logarithmic where they differ more than 8 times."""
    narrow = width < NARROW
    start, end = (INSET, width - INSET) if narrow else (NAME_WIDTH + INSET, width - VALUE_WIDTH - INSET)
    values = [1.0] + [value for item in ratios for value in (item.ratio, item.low, item.high)]
    axis = _svg.scale(values, start, end, log=_svg.wide_apart(values, 8))
    ticks = axis.ticks(5 if narrow else 7)
    row_height = 64 if narrow else 42
    bottom = row_height * len(rows) + 8
    canvas = Canvas(width, bottom + AXIS_HEIGHT, title, description)
    # Where names stand above the marks, the lines of the grid keep clear of them.
    bands = [(row * row_height + 38, row * row_height + 62) for row in range(len(rows))] if narrow else [(4, bottom)]
    for top, end in bands:
        canvas.ticks([axis(tick) for tick in ticks], top, end, "grid")
        canvas.line(axis(1), top, axis(1), end, "reference")
    for tick in ticks:
        canvas.text(axis(tick), bottom + 16, f"{tick:.4g}×", "small muted", anchor="middle")
    canvas.text(axis(1), bottom + 31, "original", "small muted", anchor="middle")
    for index, row in enumerate(rows):
        top = index * row_height + 6
        if narrow:
            room = width - _svg.text_width(row.value, "value") - 12
            canvas.text(0, top + 12, row.name, "mono", width=room)
            canvas.text(0, top + 27, row.about, "small muted", width=width)
            canvas.text(width, top + 12, row.value, "value", anchor="end")
        else:
            canvas.text(0, top + 13, row.name, "mono", width=NAME_WIDTH - 6)
            canvas.text(0, top + 29, row.about, "small muted", width=NAME_WIDTH - 6)
            canvas.text(width, top + 21, row.value, "value", anchor="end", width=VALUE_WIDTH)
        if row.draw is not None:
            y = top + (44 if narrow else 17)
            row.draw(canvas, axis, y, None if narrow or index == 0 else y - row_height)
    return canvas.svg()


def whisker(canvas: Canvas, axis: Scale, y: float, comparison: Comparison) -> None:
    """The interval of a ratio."""
    low, high = axis(comparison.low), axis(comparison.high)
    canvas.line(low, y, high, y, "whisker")
    canvas.ticks([low, high], y - 4, y + 4, "whisker")
