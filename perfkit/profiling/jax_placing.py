"""Where in a recorded step stands what was launched operation by operation: the n-th run of a name by the n-th."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from perfkit.profiling.jax_scopes import Place
from perfkit.profiling.jax_trace import Event, Host, Trace


def placed(trace: Trace, eqns: Iterable[Any], place: Callable[[str], Place]) -> Trace:
    """The trace with the module and the phase of all that it tells of a recorded step.

    Every step runs the programs of a name in the order of its operations. Where there were more or fewer of a name,
    nothing is said of it.

    Args:
        eqns: the operations of one step.
        place: reads where an operation stands off its path.
    """
    expected: dict[str, list[Place]] = {}
    for eqn in eqns:
        name = str(eqn.params.get("name") or eqn.primitive.name)  # of a jitted function its own
        expected.setdefault(name, []).append(place(f"{eqn.source_info.name_stack}/{eqn.primitive.name}"))
    runs: dict[str, dict[tuple[int, int], None]] = {}
    for event in trace.events:
        runs.setdefault(trace.programs.get(event.program, "").removeprefix("jit_"), {})[event.program, event.run] = None
    found: dict[tuple[int, int], Place] = {}
    for name, ordered in runs.items():
        places = expected.get(name, []) * len(trace.steps)
        if len(places) == len(ordered):
            found |= dict(zip(ordered, places, strict=True))
    events = tuple(_event(event, found.get((event.program, event.run))) for event in trace.events)
    return replace(trace, events=events, host=tuple(_launching(trace.host, events)))


def _event(event: Event, at: Place | None) -> Event:
    return replace(event, module=at.module, phase=at.phase) if at else event


def _launching(host: Iterable[Host], events: tuple[Event, ...]) -> Iterable[Host]:
    """What the host did, in the phase of the first operation that it then launched."""
    said = [event for event in events if event.phase]
    starts = [event.start_ms for event in said]
    for item in host:
        index = bisect.bisect_left(starts, item.start_ms)
        yield replace(item, phase=said[index].phase) if index < len(said) else item
