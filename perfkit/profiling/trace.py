"""A profiled step as a Chrome trace: JSON that ui.perfetto.dev, chrome://tracing and Speedscope open.

Source: "Trace Event Format", the Chromium project; complete ("X"), counter ("C") and metadata ("M") events.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from perfkit.profiling._memory_data import Memory
from perfkit.profiling._profile import Profile
from perfkit.profiling._time_data import Span

HOST, MEMORY, FIRST_DEVICE = 1, 2, 10


def render(profile: Profile) -> str:
    """The trace as JSON: a process for the host and each device, a thread for each track, a counter for memory."""
    events: list[dict[str, Any]] = []
    if profile.time is not None:
        events += _spans(profile.time.spans)
    if profile.memory is not None:
        events += _counters(profile.memory)
    about = {name: getattr(profile, name) for name in ("model", "framework", "mode", "device", "inputs", "outcome")}
    trace = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {**about, "created": profile.created}}
    return json.dumps(trace, allow_nan=False, separators=(",", ":")) + "\n"


def _spans(spans: tuple[Span, ...]) -> Iterator[dict[str, Any]]:
    places: dict[str, dict[str, int]] = {}
    processes: dict[str, int] = {}
    for span in spans:
        if span.track in places:
            continue
        process = span.track.partition(":")[0] if span.track.startswith("device") else "host"
        if process not in processes:
            processes[process] = HOST if process == "host" else FIRST_DEVICE + len(processes)
            yield from _named("process", process, {"pid": processes[process]})
        places[span.track] = {"pid": processes[process], "tid": len(places) + 1}
        yield from _named("thread", span.track, places[span.track])
    for span in spans:
        yield {
            "ph": "X",
            "name": span.name,
            "cat": span.kind,
            "ts": _us(span.start_ms),
            "dur": _us(span.duration_ms),
            **places[span.track],
            "args": {"module": span.module} if span.module else {},
        }


def _counters(memory: Memory) -> Iterator[dict[str, Any]]:
    if memory.timeline:
        # Memory is traced in a step of its own, so its clock is not that of the spans.
        yield from _named("process", "memory (traced in a step of its own)", {"pid": MEMORY})
    for point in memory.timeline:
        at = {"pid": MEMORY, "tid": 0, "ts": _us(point.at_ms)}
        yield {"ph": "C", "name": "bytes held", **at, "args": point.bytes_by_category}


def _named(what: str, name: str, place: dict[str, int]) -> Iterator[dict[str, Any]]:
    """The metadata events that give a process or a thread its name and its place in the order."""
    yield {"ph": "M", "name": f"{what}_name", **place, "args": {"name": name}}
    yield {"ph": "M", "name": f"{what}_sort_index", **place, "args": {"sort_index": place.get("tid", place["pid"])}}


def _us(ms: float) -> float:
    return round(1e3 * ms, 3)
