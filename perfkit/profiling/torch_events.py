"""What torch's profiler recorded, as plain events: nested, and each kernel with the operation that launched it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

_ASIDE = {"[memory]", "[OutOfMemory]", "profiler::_record_function_enter_new", "profiler::_record_function_exit"}
_ASIDE_BEGINNINGS = ("profiler::_record_function_exit", "ProfilerStep")
_COPIES = ("Memcpy", "Memset")
_RUNTIME = re.compile("cuda|cu[A-Z]|hip[A-Z]")
WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "hipDeviceSynchronize")
"""Runtime calls in which the host waits for the device."""


@dataclass(eq=False, slots=True)
class Event:
    """Something that took place from `start_ns` to `end_ns`.

    Args:
        lane: thread of the host, or stream of the device.
        device: index of the device; -1 for the host.
        sequence: number of the autograd node that it made or evaluates; -1 for none.
        number: of a host event; a kernel's `launcher` is the number of the one that launched it.
        annotation: a range that code marked, and no operation.
        children: what lies within it on the same lane.
    """

    name: str
    start_ns: int
    end_ns: int
    lane: int
    device: int = -1
    sequence: int = -1
    number: int = 0
    launcher: int = 0
    annotation: bool = False
    children: list[Event] = field(default_factory=list)

    @property
    def duration_ns(self) -> int:
        return self.end_ns - self.start_ns

    @property
    def self_ns(self) -> int:
        return max(self.duration_ns - sum(child.duration_ns for child in self.children), 0)

    @property
    def copies(self) -> bool:
        return self.device >= 0 and self.name.startswith(_COPIES)


@dataclass(frozen=True)
class Recorded:
    """What the profiler recorded.

    Args:
        host: the outermost events of the host, in order, with all within them.
        runtime: calls of the device's runtime: launches, copies, waits.
        device: kernels and copies, in order.
    """

    host: list[Event]
    runtime: list[Event]
    device: list[Event]


def recorded(profiler: Any) -> Recorded:
    """The events of a `torch.profiler.profile` that has ended."""
    host, runtime, device = [], [], []
    for raw in profiler.profiler.kineto_results.events():
        name = raw.name()
        if name in _ASIDE or name.startswith(_ASIDE_BEGINNINGS):
            continue
        on_device = str(raw.device_type()) != "DeviceType.CPU"
        event = Event(
            name=name,
            start_ns=raw.start_ns(),
            end_ns=raw.end_ns(),
            lane=raw.device_resource_id() if on_device else raw.start_thread_id(),
            device=raw.device_index() if on_device else -1,
            sequence=raw.sequence_nr(),
            number=raw.correlation_id(),
            launcher=raw.linked_correlation_id(),
            annotation=raw.is_user_annotation(),
        )
        if not on_device:
            (runtime if event.launcher or _RUNTIME.match(name) else host).append(event)
        elif not event.annotation:
            device.append(event)
    return Recorded(nested(host), runtime, sorted(device, key=lambda event: event.start_ns))


def nested(events: Iterable[Event]) -> list[Event]:
    """Events of each lane put within each other; those that lie in no other are returned, in order of their start."""
    outermost: list[Event] = []
    open_on: defaultdict[int, list[Event]] = defaultdict(list)
    for event in sorted(events, key=lambda event: (event.start_ns, -event.end_ns)):
        stack = open_on[event.lane]
        while stack and stack[-1].end_ns <= event.start_ns:
            stack.pop()
        (stack[-1].children if stack else outermost).append(event)
        stack.append(event)
    return outermost


def every(events: Iterable[Event]) -> Iterator[Event]:
    """The events and all within them, outer ones first."""
    pending = list(events)[::-1]
    while pending:
        event = pending.pop()
        yield event
        pending.extend(reversed(event.children))


def union_ns(intervals: Iterable[tuple[int, int]]) -> tuple[int, list[int]]:
    """How long at least one of the intervals lasts, and the gaps between them, in order."""
    total, gaps, end = 0, [], None
    for start, stop in sorted(intervals):
        if end is not None and start > end:
            gaps.append(start - end)
        if end is None or stop > end:
            total += stop - max(start, end if end is not None else start)
            end = stop
    return total, gaps
