"""The report's pictures as inline SVG: no script, no library, nothing loaded from elsewhere.

Each function takes the report and a width in pixels and returns one `<svg>` element, or "" where there is nothing to
draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from perfkit._quantity import Comparison, Latency, Quantity
from perfkit._report import Candidate, Report
from perfkit.reporting import _facts, _rows, _svg
from perfkit.reporting._format import (
    counted,
    format_bytes,
    format_comparison,
    format_ms,
    format_quantity,
)
from perfkit.reporting._svg import Canvas, Scale

# More than these say no more to the eye.
MOST_CANDIDATES, MOST_TICKS, MOST_POINTS = 24, 160, 240
HISTOGRAM_HEIGHT = 56


def waterfall(report: Report, width: float) -> str:
    """What each step added: from the ratio before it to the ratio after it, with the interval."""
    if not any(_facts.measured(step.speedup) for step in report.steps):
        return ""
    rows, told, reached = [], [], 1.0
    for step in report.steps:
        facts = _facts.step_facts(step)
        about = f"{facts.status.removeprefix('applied, ')} · {facts.touched} touched, {facts.skipped} skipped"
        rows.append(_rows.Row(facts.recipe, about, facts.speedup, _jump(step.speedup, reached, "gain")))
        told.append(f"after {facts.recipe} {facts.speedup}")
        reached = step.speedup.ratio if _facts.measured(step.speedup) else reached
    ratios = [step.speedup for step in report.steps]
    if _facts.measured(report.speedup) and report.outcome == "optimized":
        value = format_comparison(report.speedup)
        rows.append(_rows.Row("result", "measured at the end", value, _jump(report.speedup, 1.0, "total")))
        told.append(f"the result, measured at the end, {value}")
        ratios.append(report.speedup)
    drawn = [ratio for ratio in ratios if _facts.measured(ratio)]
    description = f"Speed-up over the original with its interval: {'; '.join(told)}."
    return _rows.ratio_chart(rows, drawn, width, "Speed-up after each step", description)


def candidates(report: Report, width: float) -> str:
    """The chains that were timed, as dots with their intervals, fastest first."""
    timed = [item for item in report.candidates if _facts.measured(item.speedup)]
    if not timed:
        return ""
    shown = sorted(timed, key=lambda item: -item.speedup.ratio)[:MOST_CANDIDATES]
    # The winner may be slower than many that failed the tolerance; it is shown all the same.
    shown += [item for item in timed if item.outcome == "won" and item not in shown]
    rows = [
        _rows.Row(item.recipe, _about(item), format_comparison(item.speedup), _dot(item.speedup, item.outcome == "won"))
        for item in shown
    ]
    told = "; ".join(f"{item.recipe} {format_comparison(item.speedup)} {item.outcome}" for item in shown)
    description = f"{counted(len(shown), 'candidate')} of {len(timed)} that were timed: {told}."
    ratios = [item.speedup for item in shown]
    return _rows.ratio_chart(rows, ratios, width, "Speed-up of each candidate", description)


def latency(report: Report, width: float) -> str:
    """How the times of single calls are distributed, before and after, on one axis."""
    sides = [(name, side.latency) for name, side in (("before", report.before), ("after", report.after))]
    return distributions([(name, found) for name, found in sides if found is not None], width)


def distributions(sides: Sequence[tuple[str, Latency]], width: float, noun: str = "call") -> str:
    """How the times of single calls are distributed on one axis; a name is also the class of what is drawn."""
    sides = [(name, found) for name, found in sides if found.samples_ms]
    if not sides:
        return ""
    limits = [_limits(found.samples_ms) for _, found in sides]
    values = [value for pair in limits for value in pair]
    medians = [found.median_ms for _, found in sides]
    axis = _svg.scale(values, 1, width - 1, log=_svg.wide_apart(values, 8) and _svg.wide_apart(medians, 8))
    told = [f"{name}: median {format_ms(found.median_ms)} of {len(found.samples_ms)} calls" for name, found in sides]
    beyond = [line for name, found in sides if (line := _beyond(name, found, axis))]
    row_height = HISTOGRAM_HEIGHT + 42
    bottom = row_height * len(sides)
    height = bottom + 36 + 16 * len(beyond)
    canvas = Canvas(width, height, "Latency of single calls", "; ".join(told + beyond) + ".")
    _time_axis(canvas, axis, bottom, 5 if width < _rows.NARROW else 8, noun)
    # As many bins as the calls can fill, and no more than the eye can tell apart.
    calls = max(len(found.samples_ms) for _, found in sides)
    bins = min(round(8 * math.sqrt(calls)), 54 if width < _rows.NARROW else 108)
    for index, (name, found) in enumerate(sides):
        _histogram(canvas, axis, index * row_height, name, found, bins)
    for index, line in enumerate(beyond):
        canvas.text(0, bottom + 48 + 16 * index, line, "small muted", width=width)
    return canvas.svg()


def memory(report: Report, width: float) -> str:
    """Tensor peak, process high-water and model size, before and after; each pair on a scale of its own."""
    before, after = report.before, report.after
    sizes = (Quantity(before.model_bytes, "B"), Quantity(after.model_bytes, "B"))
    groups = (
        ("Tensor peak", before.tensor_peak_bytes, after.tensor_peak_bytes),
        ("Process high-water", before.process_high_water_bytes, after.process_high_water_bytes),
        ("Model size", *sizes),
    )
    narrow = width < _rows.NARROW
    left, group_height = (52, 76) if narrow else (212, 62)
    title = "Memory before and after"
    told = (f"{name}: {format_quantity(pair[0])} before, {format_quantity(pair[1])} after" for name, *pair in groups)
    canvas = Canvas(width, group_height * len(groups) - 8, title, "; ".join(told) + ".")
    for index, (name, *pair) in enumerate(groups):
        top = index * group_height
        canvas.text(0, top + (13 if narrow else 20), name, "label")
        most = max([item.value for item in pair if item.value is not None] + [0.0])
        for row, (side, item) in enumerate(zip(("before", "after"), pair, strict=True)):
            y = top + row * 22 + (22 if narrow else 4)
            canvas.text(left - 8, y + 12, side, "small muted", anchor="end")
            # The value stands behind its bar, so the longest bar leaves room for it.
            room = width - left - 84
            if item.value is None or not math.isfinite(item.value):
                canvas.text(left, y + 12, format_quantity(item), "small muted italic")
                continue
            length = room * max(item.value, 0) / most if most > 0 else 0
            canvas.rect(left, y, max(length, 1.5), 15, f"bar {side}")
            canvas.text(left + max(length, 1.5) + 7, y + 12, format_bytes(item.value), f"value {side}-text")
    return canvas.svg()


def losses(report: Report, width: float) -> str:
    """The two training curves: before broad and pale, after narrow upon it, so that both show where they agree."""
    if report.losses is None:
        return ""
    curves = {"before": report.losses.before, "after": report.losses.after}
    finite = [value for curve in curves.values() for value in curve if math.isfinite(value)]
    steps = max(map(len, curves.values()))
    if not finite or steps < 2:
        return ""
    height, bottom = 260, 224
    y = _svg.scale(finite, bottom, 34, log=_svg.wide_apart(finite, 8))
    x = Scale(1, steps, 58, width - 10)
    gaps = sum(not math.isfinite(value) for value in report.losses.after)
    description = _facts.losses(report) + (f"; {counted(gaps, 'step')} after not finite" if gaps else "")
    canvas = Canvas(width, height, "Training loss before and after", description)
    for tick in y.ticks(5):
        canvas.line(x.start, y(tick), x.end, y(tick), "grid")
        canvas.text(x.start - 8, y(tick) + 4, f"{tick:.4g}", "small muted", anchor="end")
    for tick in (tick for tick in x.ticks(4 if width < _rows.NARROW else 8) if tick >= 1 and tick == int(tick)):
        canvas.text(x(tick), bottom + 18, f"{tick:.0f}", "small muted", anchor="middle")
    canvas.text(x.start, bottom + 34, "training step", "small muted")
    for index, (name, curve) in enumerate(curves.items()):
        left = x.start + 84 * index
        canvas.line(left, 12, left + 22, 12, f"curve {name}")
        canvas.text(left + 28, 16, name, f"label {name}-text")
        for run in _runs(curve):
            points = [(x(step), y(value)) for step, value in _thinned(run)]
            canvas.path(points, f"curve {name}") if len(points) > 1 else canvas.circle(*points[0], 2, f"dot {name}")
    if gaps:
        canvas.text(x.end, bottom + 34, f"after: {counted(gaps, 'step')} not finite", "label bad-text", anchor="end")
    return canvas.svg()


def _jump(comparison: Comparison | None, reached: float, kind: str) -> Callable | None:
    if not _facts.measured(comparison):
        return None

    def draw(canvas: Canvas, axis: Scale, y: float, above: float | None) -> None:
        start, end = axis(reached), axis(comparison.ratio)
        # Filled for a gain and hollow for a loss, so that it can be told without colour.
        shape = "loss" if end < start else kind
        if above is not None and kind != "total":
            canvas.line(start, above + 9, start, y - 9, "step-line")
        canvas.rect(min(start, end), y - 9, max(abs(end - start), 1.5), 18, f"bar {shape}")
        _rows.whisker(canvas, axis, y, comparison)

    return draw


def _dot(comparison: Comparison, won: bool) -> Callable:
    def draw(canvas: Canvas, axis: Scale, y: float, above: float | None) -> None:  # noqa: ARG001 (dots stand alone)
        _rows.whisker(canvas, axis, y, comparison)
        canvas.circle(axis(comparison.ratio), y, 5.5, "dot won" if won else "dot lost")

    return draw


def _about(item: Candidate) -> str:
    if item.fidelity is not None and not item.fidelity.ok:
        return f"{item.outcome} · fidelity failed"
    return item.outcome


def _limits(samples: Sequence[float]) -> tuple[float, float]:
    """Where the bulk of the times lies: a few preempted calls must not squeeze all others into one bin."""
    ranked = sorted(samples)
    low, high = ranked[len(ranked) // 10], ranked[(9 * len(ranked)) // 10]
    room = 4 * (high - low)
    return max(ranked[0], low - room), min(ranked[-1], high + room)


def _beyond(name: str, found: Latency, axis: Scale) -> str:
    slower = [value for value in found.samples_ms if value > axis.high]
    faster = [value for value in found.samples_ms if value < axis.low]
    told = [f"{counted(len(slower), 'call')} beyond the axis, up to {format_ms(max(slower))}"] if slower else []
    told += [f"{counted(len(faster), 'call')} below the axis, down to {format_ms(min(faster))}"] if faster else []
    return f"{name}: {', '.join(told)}" if told else ""


def _histogram(canvas: Canvas, axis: Scale, top: float, name: str, found: Latency, bins: int) -> None:
    inside = [value for value in found.samples_ms if axis.low <= value <= axis.high]
    counts = [0] * bins
    for value in inside:
        share = (axis(value) - axis.start) / (axis.end - axis.start)
        counts[min(int(share * bins), bins - 1)] += 1
    floor, bin_width = top + 22 + HISTOGRAM_HEIGHT, (axis.end - axis.start) / bins
    outline = []
    for index in range(_first(counts), bins - _first(counts[::-1])):
        left, y = axis.start + index * bin_width, floor - HISTOGRAM_HEIGHT * counts[index] / max(counts)
        outline += [(left, y), (left + bin_width, y)]
    canvas.area(_corners([(outline[0][0], floor), *outline, (outline[-1][0], floor)]), f"hist {name}")
    every = max(1, math.ceil(len(inside) / MOST_TICKS))
    shown = [*sorted(inside)[::every], max(inside)]
    canvas.ticks([axis(value) for value in shown], floor + 3, floor + 9, f"rug {name}")
    canvas.line(axis.start, floor, axis.end, floor, "axis")
    middle = axis(found.median_ms)
    canvas.line(middle, top + 18, middle, floor + 9, "median")
    canvas.text(0, top + 13, name, f"label {name}-text")
    told = f"median {format_ms(found.median_ms)}"
    half = _svg.text_width(told, "value") / 2
    # Clear of the name on the left and of the edge on the right.
    x = min(max(middle, 56 + half), canvas.width - half)
    canvas.text(x, top + 13, told, "value", anchor="middle")


def _time_axis(canvas: Canvas, axis: Scale, bottom: float, most: int, noun: str) -> None:
    units = ((1e-6, "nanoseconds"), (1e-3, "microseconds"), (1.0, "milliseconds"), (1e3, "seconds"))
    size, unit = max((item for item in units if item[0] <= axis.high), default=units[0])
    for tick in axis.ticks(most):
        canvas.line(axis(tick), 20, axis(tick), bottom - 10, "grid")
        canvas.text(axis(tick), bottom + 12, f"{tick / size:.4g}", "small muted", anchor="middle")
    scale = ", logarithmic" if axis.log else ""
    canvas.text(axis.start, bottom + 30, f"{unit} per {noun}{scale}", "small muted")


def _first(counts: Sequence[int]) -> int:
    return next(index for index, count in enumerate(counts) if count)


def _corners(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same outline without points that lie between two others at the same height."""
    kept = points[:1]
    for index in range(1, len(points) - 1):
        if not points[index - 1][1] == points[index][1] == points[index + 1][1]:
            kept.append(points[index])
    return kept + points[-1:]


def _runs(curve: Sequence[float]) -> list[list[tuple[int, float]]]:
    """The curve's finite stretches, as (step, loss): a line must not bridge a gap."""
    runs: list[list[tuple[int, float]]] = [[]]
    for step, value in enumerate(curve, start=1):
        if math.isfinite(value):
            runs[-1].append((step, value))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _thinned(run: list[tuple[int, float]]) -> list[tuple[int, float]]:
    every = max(1, math.ceil(len(run) / MOST_POINTS))
    return run[::every] + ([run[-1]] if (len(run) - 1) % every else [])
