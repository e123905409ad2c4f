"""The operations and kernels of profiled steps, summed by name and place, each with what was counted of it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from perfkit.profiling._time_data import Op
from perfkit.profiling.torch_count import Call, Count, Key
from perfkit.profiling.torch_events import Event
from perfkit.profiling.torch_placing import COMPILED_GRAPH, Placed, Placing


@dataclass(frozen=True)
class Step:
    """One profiled step: its range, its operations, and what the device did in it."""

    event: Event
    placing: Placing
    runtime: list[Event]
    kernels: list[Event]


def operations(steps: list[Step], count: Count) -> tuple[Op, ...]:
    """Operations and kernels summed by name and place, per step, longest first."""
    rows: defaultdict[tuple, list[float]] = defaultdict(lambda: [0.0] * 4)

    def add(name: str, kind: str, place: Placed | None, ns: int, call: Call) -> None:
        module, phase = (place.module, place.phase) if place else ("", "other")
        row = rows[name, kind, module, phase, call.shapes]
        for index, value in enumerate((1, ns, call.flops, call.moved_bytes)):
            row[index] += value

    for step in steps:
        launched: defaultdict[int, list[Event]] = defaultdict(list)
        for kernel in step.kernels:
            place = step.placing.launchers.get(kernel.launcher)
            launched[id(place)].append(kernel)
            if place is None:
                add(kernel.name, "kernel", None, kernel.duration_ns, _NOTHING)
        for place, call in _joined(step.placing.operations, count):
            kernels = sorted(launched[id(place)], key=lambda kernel: kernel.duration_ns, reverse=True)
            launches_work = kernels and place.name != COMPILED_GRAPH
            add(place.name, "op", place, place.ns, Call(call.shapes, 0.0, 0.0) if launches_work else call)
            for index, kernel in enumerate(kernels):  # an operation's work is its longest kernel's
                does = launches_work and index == 0
                add(kernel.name, "kernel", place, kernel.duration_ns, call if does else _NOTHING)
    per_step = 1 / len(steps)
    ops = (
        Op(name, kind, module, phase, *_scaled(row, per_step), shapes)
        for (name, kind, module, phase, shapes), row in rows.items()
    )
    return tuple(sorted(ops, key=lambda op: op.self_ms, reverse=True))


_NOTHING = Call("", 0.0, 0.0)


def _scaled(row: list[float], per_step: float) -> tuple[float, float, float, float]:
    calls, ns, flops, moved = row
    return calls * per_step, ns * per_step / 1e6, flops * per_step, moved * per_step


def _joined(operations: list[Placed], count: Count) -> Iterator[tuple[Placed, Call]]:
    """Each operation with what was counted of it: call by call, both runs being in the same order.

    What was counted and did not run as such is in the compiled graphs of its phase, by their time.
    """
    times = Counter((place.name, place.module, place.phase) for place in operations)
    graphs: Counter[str] = Counter()
    for place in operations:
        graphs[place.phase] += place.ns if place.name == COMPILED_GRAPH else 0
    missing: defaultdict[str, list[Call]] = defaultdict(list)
    for key, calls in count.calls.items():
        missing[key[2]] += [] if key in times else calls
    seen: Counter[Key] = Counter()
    for place in operations:
        key = place.name, place.module, place.phase
        calls = count.calls.get(key, [])
        if place.name == COMPILED_GRAPH:
            yield place, _shared(missing[place.phase], place.ns / max(graphs[place.phase], 1), "")
        elif not calls:
            yield place, _NOTHING
        elif len(calls) == times[key]:
            yield place, calls[seen[key]]
        else:
            yield place, _shared(calls, 1 / times[key], calls[0].shapes)
        seen[key] += 1


def _shared(calls: list[Call], share: float, shapes: str) -> Call:
    return Call(shapes, *(share * sum(getattr(call, name) for call in calls) for name in ("flops", "moved_bytes")))
