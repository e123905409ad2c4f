"""The profile's pictures as inline SVG that need no script: roofline, memory over time, readings of devices, shares.

Each function takes a width in pixels beside its data and returns one `<svg>` element, or "" where there is nothing to
draw.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from perfkit.profiling import _views
from perfkit.profiling import roofline as roof
from perfkit.profiling._memory_data import CATEGORIES, Memory, MemoryPoint
from perfkit.profiling._profile import Profile, Series
from perfkit.profiling._time_data import Op
from perfkit.reporting import _profile_rows, _rows, _svg
from perfkit.reporting._format import clean, counted, format_bytes, format_ms, format_number, format_percent, shorten
from perfkit.reporting._svg import Canvas, Scale

# More than these say no more to the eye.
MOST_DOTS, MOST_LABELS, MOST_POINTS, MOST_NAME = 120, 7, 240, 28
# What the axes of the picture of memory take on either side; the script reads a time off the pointer's place.
MEMORY_LEFT, MEMORY_RIGHT = 64, 8


def roofline(profile: Profile, width: float) -> str:
    """Operations by arithmetic per byte and by what they reach, under the roofs of this machine."""
    ceilings = profile.ceilings
    if profile.time is None or ceilings is None or not ceilings.bandwidth_gb_s.value:
        return ""
    bandwidth = ceilings.bandwidth_gb_s.value
    roofs = {name: told.value for name, told in ceilings.gflops.items() if told.value}
    # What does no arithmetic that is counted has no place on axes of it.
    dots = [place for place in roof.placed(_views.hottest(profile.time), ceilings) if place.gflops > 0][:MOST_DOTS]
    if not roofs or not dots:
        return ""
    ridges = [peak / bandwidth for peak in roofs.values()]
    intensities = [place.intensity for place in dots]
    # A handful of operations with next to no arithmetic must not squeeze all others into one corner.
    lowest = max(min(intensities), min(ridges) / 3e3)
    reached = [place.gflops for place in dots if place.intensity >= lowest]
    height, bottom, left = (380.0, 336.0, 52.0) if width >= _rows.NARROW else (320.0, 276.0, 46.0)
    x = _svg.scale(
        [min(lowest / 1.5, min(ridges) / 20), *ridges, *intensities, max(ridges) * 6],
        left,
        width - 6,
        log=True,
        margin=0.02,
    )
    top_roof = max(roofs.values())
    highest = min(max(top_roof, *reached), 5 * top_roof)
    y = _svg.scale([max(min(reached), top_roof / 1e5) / 2, highest * 1.8], bottom, 8, log=True, margin=0.02)
    told = "; ".join(
        f"{place.op.name} {format_number(place.gflops)} GFLOP/s, bound by {place.bound}" for place in dots[:MOST_LABELS]
    )
    canvas = Canvas(width, height, "Roofline", f"{counted(len(dots), 'operation')} under the measured roofs: {told}.")
    for tick in x.ticks(6 if width < _rows.NARROW else 10):
        canvas.line(x(tick), y.end, x(tick), bottom, "grid")
        canvas.text(x(tick), bottom + 17, f"{tick:.4g}", "small muted", anchor="middle")
    for tick in y.ticks(7):
        canvas.line(x.start, y(tick), x.end, y(tick), "grid")
        canvas.text(x.start - 8, y(tick) + 4, f"{tick:.4g}", "small muted", anchor="end")
    canvas.text(x.end, bottom + 36, "FLOP per byte that must move", "small muted", anchor="end")
    canvas.text(x.start, bottom + 36, "GFLOP/s", "small muted")
    taken = _roofs(canvas, x, y, roofs, bandwidth)
    _dots(canvas, x, y, dots, profile)
    _labels(canvas, x, y, dots[:MOST_LABELS], profile, taken)
    return canvas.svg()


Box = tuple[float, float, float, float]
"""Left, top, right and bottom of what is drawn."""


def _roofs(canvas: Canvas, x: Scale, y: Scale, roofs: dict[str, float], bandwidth: float) -> list[Box]:
    """The roofs and their names; returns where the names stand."""
    highest = max(roofs.values())
    start = max(x.low, y.low / bandwidth)
    canvas.path([(x(start), y(start * bandwidth)), (x(highest / bandwidth), y(highest))], "roof")
    told: list[tuple[float, list[str]]] = []
    for name, peak in sorted(roofs.items(), key=lambda item: -item[1]):
        canvas.line(x(peak / bandwidth), y(peak), x.end, y(peak), "roof")
        # Roofs that lie close together would write over each other: they share a line.
        if told and y(peak) - 5 - told[-1][0] <= 12:
            told[-1][1].append(f"{name} {format_number(peak)}")
        else:
            told.append((y(peak) - 5, [f"{name} {format_number(peak)}"]))
    boxes = []
    for height, names in told:
        text = f"{', '.join(names)} GFLOP/s"
        canvas.text(x.end, height, text, "small muted halo", anchor="end")
        boxes.append((x.end - _svg.text_width(text, "small"), height - 10, x.end, height + 4))
    middle = math.sqrt(start * highest / bandwidth)
    canvas.text(
        x(middle) - 8, y(middle * bandwidth) - 8, f"{format_number(bandwidth)} GB/s", "small muted", anchor="end"
    )
    return boxes


def _dots(canvas: Canvas, x: Scale, y: Scale, dots: Sequence[roof.Placed], profile: Profile) -> None:
    """The dots, the longest last so that they lie on top."""
    for place in reversed(dots):
        op = place.op
        share = _views.share(op.self_ms, profile.time)
        about = (
            f"{op.name} · {op.module or 'no module'} · {op.phase}: {format_percent(share)} of the step, "
            f"{format_number(place.gflops)} GFLOP/s, {format_number(place.intensity)} FLOP/B, bound by {place.bound}"
        )
        canvas.circle(*_inside(x, y, place), _radius(share), f"dot {place.bound}", about)


def _labels(
    canvas: Canvas, x: Scale, y: Scale, dots: Sequence[roof.Placed], profile: Profile, taken: list[Box]
) -> None:
    """The names of dots, right or left of them, where they hide nothing of what is `taken` and no other dot."""
    circles = []
    for place in dots:
        (center, height), radius = _inside(x, y, place), _radius(_views.share(place.op.self_ms, profile.time))
        circles.append((center - radius, height - radius, center + radius, height + radius))
    for place, (start, top, end, bottom) in zip(dots, circles, strict=True):
        share, height = _views.share(place.op.self_ms, profile.time), (top + bottom) / 2
        for text in _names(place.op, share):
            wide = _svg.text_width(text, "small")
            boxes = [(left, height - 6, left + wide, height + 8) for left in (end + 4, start - 4 - wide)]
            inside = [box for box in boxes if x.start <= box[0] and box[2] <= x.end]
            if free := [box for box in inside if not any(_overlap(box, other) for other in (*taken, *circles))]:
                taken.append(free[0])
                canvas.text(free[0][0], height + 4, text, "small halo")
                break


def _names(op: Op, share: float) -> tuple[str, ...]:
    """What an operation may be called beside its dot, the longest first."""
    name = op.name.rpartition("::")[2]
    where = f"{op.module.rpartition('.')[2]} · {name}" if op.module else name
    texts = (shorten(clean(where), MOST_NAME), shorten(clean(name), MOST_NAME), shorten(clean(name), MOST_NAME // 2))
    return tuple(f"{text} {format_percent(share)}" for text in dict.fromkeys(texts))


def _radius(share: float) -> float:
    return 3 + 15 * math.sqrt(min(share, 1))


def _overlap(one: Box, other: Box) -> bool:
    return one[0] <= other[2] and other[0] <= one[2] and one[1] <= other[3] and other[1] <= one[3]


def _inside(x: Scale, y: Scale, place: roof.Placed) -> tuple[float, float]:
    return x(max(place.intensity, x.low)), y(min(max(place.gflops, y.low), y.high))


def memory(found: Memory, width: float) -> str:
    """Bytes held over a step, by category, one upon the other, with the peak."""
    points = thinned(found.timeline)
    if len(points) < 2:
        return ""
    names = _profile_rows.categories(found)
    heights = [[held(point, name) for name in names] for point in points]
    totals = [sum(row) for row in heights]
    most = max(totals)
    if not most:
        return ""
    narrow = width < _rows.NARROW
    height, bottom, top = 300.0, 262.0, 30.0
    x = Scale(points[0].at_ms, max(points[-1].at_ms, points[0].at_ms + 1e-9), MEMORY_LEFT, width - MEMORY_RIGHT)
    y = Scale(0, most * 1.08, bottom, top)
    unit = 1024 ** min(4, int(math.log(most, 1024)))
    told = ", ".join(f"{name} {size}" for name, size, _ in _profile_rows.category_rows(found))
    canvas = Canvas(width, height, "Memory over a step", f"Peak {format_bytes(most)}: {told}.")
    for tick in Scale(0, most * 1.08 / unit, 0, 1).ticks(5):
        canvas.line(x.start, y(tick * unit), x.end, y(tick * unit), "grid")
        canvas.text(x.start - 8, y(tick * unit) + 4, format_bytes(tick * unit), "small muted", anchor="end")
    floor = [0.0] * len(points)
    for index, name in enumerate(names):
        ceiling = [low + row[index] for low, row in zip(floor, heights, strict=True)]
        shape = _steps(points, ceiling, x, y) + _steps(points, floor, x, y)[::-1]
        canvas.area(shape, f"layer {colour(name)}")
        floor = ceiling
    # Where XLA's arena is there whole all the time, the peak is when most of it is in use.
    at_peak = (index for index, point in enumerate(points) if point.bytes_by_category == found.by_category)
    peak = next(at_peak, totals.index(most))
    at = x(points[peak].at_ms)
    canvas.line(at, y(most) - 4, at, bottom, "median")
    label = f"peak {format_bytes(most)}"
    half = _svg.text_width(label, "label") / 2
    middle = min(max(at, x.start + half), width - half)
    canvas.text(middle, y(most) - 9, label, "label", anchor="middle")
    for tick in x.ticks(4 if narrow else 8):
        canvas.text(x(tick), bottom + 17, format_ms(tick), "small muted", anchor="middle")
    canvas.line(x.start, bottom, x.end, bottom, "axis")
    return canvas.svg()


def colour(category: str) -> str:
    """The class that gives a category of memory its colour."""
    return f"k{CATEGORIES.index(category) if category in CATEGORIES else len(CATEGORIES)}"


def held(point: MemoryPoint, name: str) -> float:
    """Bytes of a category at that moment; what is not a number is drawn as nothing."""
    value = point.bytes_by_category.get(name, 0.0)
    return max(value, 0.0) if math.isfinite(value) else 0.0


def _steps(points: Sequence[MemoryPoint], values: Sequence[float], x: Scale, y: Scale) -> list[tuple[float, float]]:
    """What is held stays held until the next point: a stair, not a slope."""
    found = [(x(points[0].at_ms), y(values[0]))]
    for index in range(1, len(points)):
        at, height = x(points[index].at_ms), y(values[index])
        if height != found[-1][1] or index == len(points) - 1:
            found += [(at, found[-1][1]), (at, height)]
    return found


def thinned(points: Sequence[MemoryPoint]) -> list[MemoryPoint]:
    """At most `MOST_POINTS`, of each stretch the one that holds most: the peak stays what it is."""
    finite = [point for point in points if math.isfinite(point.at_ms)]
    if len(finite) <= MOST_POINTS:
        return finite
    edges = [round(index * len(finite) / MOST_POINTS) for index in range(MOST_POINTS + 1)]
    stretches = (finite[start:end] for start, end in itertools.pairwise(edges))
    return [
        max(part, key=lambda point: sum(held(point, name) for name in point.bytes_by_category)) for part in stretches
    ]


def series(found: Series, width: float) -> str:
    """One reading of a device over time."""
    points = [
        (at, value)
        for at, value in zip(found.at_s, found.values, strict=False)
        if math.isfinite(at) and math.isfinite(value)
    ]
    if len(points) < 2 or points[0][0] == points[-1][0]:
        return ""
    points = _extremes(points)
    values = [value for _, value in points]
    height, bottom, top = 116.0, 92.0, 26.0
    x = Scale(points[0][0], points[-1][0], 44, width - 8)
    y = _svg.scale(values, bottom, top, log=False, margin=0.08)
    told = f"{format_number(min(values))} to {format_number(max(values))} {found.unit}"
    canvas = Canvas(width, height, found.name, f"{found.name}: {told}")
    canvas.text(0, 13, found.name, "label", width=width / 2)
    canvas.text(width, 13, told, "small muted", anchor="end", width=width / 2)
    for tick in y.ticks(3):
        canvas.line(x.start, y(tick), x.end, y(tick), "grid")
        canvas.text(x.start - 8, y(tick) + 4, f"{tick:.4g}", "small muted", anchor="end")
    for tick in x.ticks(4):
        canvas.text(x(tick), bottom + 17, f"{tick:.4g} s", "small muted", anchor="middle")
    canvas.path([(x(at), y(value)) for at, value in points], "curve after")
    return canvas.svg()


def _extremes(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `MOST_POINTS`: the lowest and the highest of each stretch, in their order."""
    if len(points) <= MOST_POINTS:
        return points
    stretches = MOST_POINTS // 2
    edges = [round(index * len(points) / stretches) for index in range(stretches + 1)]
    found: list[tuple[float, float]] = []
    for start, end in itertools.pairwise(edges):
        part = points[start:end]
        found += sorted({min(part, key=lambda item: item[1]), max(part, key=lambda item: item[1])})
    return found


def shares(rows: Sequence[tuple[str, str, float]], kinds: Sequence[str], title: str, width: float) -> str:
    """Parts of a whole as one bar: name, amount, share, and the class of each; the legend is the page's."""
    whole = sum(share for _, _, share in rows)
    if not whole:
        return ""
    told = ", ".join(f"{name} {amount} ({format_percent(share)})" for name, amount, share in rows)
    canvas, left = Canvas(width, 26, title, told), 0.0
    for (name, amount, share), kind in zip(rows, kinds, strict=True):
        wide = width * share / whole
        canvas.rect(left, 0, max(wide - 1, 0.3), 26, f"layer {kind}", f"{name}: {amount}, {format_percent(share)}")
        left += wide
    return canvas.svg()
