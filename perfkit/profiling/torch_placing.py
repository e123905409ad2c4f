"""Each event of a profiled step put where it belongs: its operation, module and phase."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from perfkit.profiling.torch_events import Event, every
from perfkit.profiling.torch_where import MODULE, PHASE, STEP, Where

_EVALUATES = "autograd::engine::evaluate_function: "
_COMPILED = "CompiledFxGraph"
COMPILED_GRAPH = "compiled graph"
"""What a program of torch.compile is called: the name that torch gives it changes with every change of the model."""


@dataclass(frozen=True, slots=True)
class Placed:
    """An operation at its place.

    Args:
        ns: its own time, without that of operations within it.
    """

    name: str
    module: str
    phase: str
    ns: int
    event: Event


@dataclass(frozen=True)
class Placing:
    """One step.

    Args:
        operations: in the order of their start.
        ranges: of modules and phases, each with its name.
        launchers: by the number of a host event, the operation it belongs to.
    """

    operations: list[Placed]
    ranges: list[tuple[str, str, Event]]
    launchers: dict[int, Placed]


def placed(host: Iterable[Event], where: Where, whole: Collection[str]) -> Placing:
    """Walk the events of one step.

    Args:
        host: outermost events.
        where: knows which module made a node of the autograd graph.
        whole: names of operators that are one operation with all that runs within them; what calls such operators is
            an operation of its own time alone.
    """
    operations: list[Placed] = []
    ranges: list[tuple[str, str, Event]] = []
    launchers: dict[int, Placed] = {}
    for event, module, phase in _walked(host, where, whole):
        kind, name = _read(event)
        if kind == "operation":
            absorbs = name in whole
            found = Placed(name, module, phase, event.duration_ns if absorbs else event.self_ns, event)
            operations.append(found)
            for within in every([event]) if absorbs else [event]:
                launchers[within.number] = found
        elif kind in ("module", "phase"):
            ranges.append((kind, name, event))
    return Placing(operations, ranges, launchers)


def _walked(host: Iterable[Event], where: Where, whole: Collection[str]) -> Iterator[tuple[Event, str, str]]:
    """Events down to whole operations, with the module and phase that each is in."""
    pending = [(event, "", "other") for event in host][::-1]
    while pending:
        event, module, phase = pending.pop()
        kind, name = _read(event)
        if kind == "module":
            module = name
        elif kind == "phase":
            phase = name
        elif event.name.startswith(_EVALUATES):
            module, phase = where.maker(event.sequence), "backward"
        yield event, module, phase
        if not (kind == "operation" and name in whole):
            pending.extend((child, module, phase) for child in reversed(event.children))


def _read(event: Event) -> tuple[str, str]:
    """What kind of event it is, and its name as shown."""
    for kind, beginning in (("module", MODULE), ("phase", PHASE)):
        if event.name.startswith(beginning):
            return kind, event.name.removeprefix(beginning)
    if _COMPILED in event.name:
        return "operation", COMPILED_GRAPH
    if event.annotation:
        return ("step" if event.name == STEP else "annotation"), event.name
    return "operation", event.name.removeprefix(_EVALUATES)
