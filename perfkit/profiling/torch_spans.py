"""One profiled step as spans, thinned to what can be seen."""

from __future__ import annotations

from perfkit.profiling._time_data import Span
from perfkit.profiling.torch_events import WAITS, Event
from perfkit.profiling.torch_placing import Placing

MOST_SPANS = 2000


def spans(step: Event, placing: Placing, kernels: list[Event], runtime: list[Event]) -> tuple[Span, ...]:
    """The longest `MOST_SPANS` things that went on in a step, in order; phases and modules before operations.

    Args:
        step: the range of the step, whose start is 0 ms.
        runtime: of these, waits are shown.
    """
    main = step.lane
    found: list[tuple[Event, str, str, str, str]] = []
    for kind, name, event in placing.ranges:
        shown = name or "model" if kind == "module" else name
        found.append((event, shown, _host(event, main), kind, name if kind == "module" else ""))
    for place in placing.operations:
        found.append((place.event, place.name, _host(place.event, main), "op", place.module))
    for event in runtime:
        if event.name.startswith(WAITS):
            found.append((event, event.name, "host", "wait", ""))
    for kernel in kernels:
        place_of = placing.launchers.get(kernel.launcher)
        kind = "copy" if kernel.copies else "kernel"
        track = f"device {kernel.device}: stream {kernel.lane}"
        found.append((kernel, kernel.name, track, kind, place_of.module if place_of else ""))
    kept = sorted(found, key=_importance)[:MOST_SPANS]
    return tuple(_deep(sorted(kept, key=lambda one: (one[0].start_ns, -one[0].end_ns)), step.start_ns))


def _importance(one: tuple[Event, str, str, str, str]) -> tuple[bool, int]:
    event, _, _, kind, _ = one
    return kind != "phase", -event.duration_ns


def _host(event: Event, main: int) -> str:
    return "host" if event.lane == main else "host: autograd"


def _deep(ordered: list[tuple[Event, str, str, str, str]], start_ns: int) -> list[Span]:
    """Spans with how many of their own track each lies in."""
    open_on: dict[str, list[int]] = {}
    made = []
    for event, name, track, kind, module in ordered:
        ends = open_on.setdefault(track, [])
        while ends and ends[-1] <= event.start_ns:
            ends.pop()
        depth = len(ends)
        ends.append(event.end_ns)
        made.append(Span(name, track, kind, (event.start_ns - start_ns) / 1e6, event.duration_ns / 1e6, depth, module))
    return made
