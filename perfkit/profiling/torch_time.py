"""Where the time of a torch model's step goes: operations, kernels and modules, from a profiled run."""

from __future__ import annotations

import contextlib
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from torch.profiler import ProfilerActivity

from perfkit._errors import first_line
from perfkit._quantity import Quantity
from perfkit._workload import Workload
from perfkit.backends.adapter import Finished
from perfkit.backends.torch_profiler import profiled
from perfkit.profiling._basics import Basics, unprofiled
from perfkit.profiling._time_data import Op, Time
from perfkit.profiling.torch_count import Count, counted
from perfkit.profiling.torch_events import WAITS, Event, Recorded, recorded, union_ns
from perfkit.profiling.torch_modules import modules
from perfkit.profiling.torch_operations import Step, operations
from perfkit.profiling.torch_placing import COMPILED_GRAPH, placed
from perfkit.profiling.torch_spans import spans
from perfkit.profiling.torch_where import STEP, Where

MOST_STEPS, FEWEST_STEPS, MOST_EVENTS = 10, 3, 60_000
GAPS = 10
_COUNTED = "operators of one step run without torch.compile, by formula; two for a multiply-add, elementwise work not"


def by_operation(finished: Finished, error: Exception) -> bool:
    """Whether a step that raised this runs another way: a torch model runs operation by operation anyhow."""
    del finished, error
    return False


def collected(work: Workload, finished: Finished, basics: Basics, note: Callable[[str], Any] = str) -> Time:
    """Profile a few steps, and count one without the profiler.

    Args:
        work: holds a copy of the caller's model; its state is as before when this returns or raises.
        basics: of the same workload.
        note: called with what must be said of how the model runs, in JAX.
    """
    del note
    try:
        count = counted(work, finished)
        arithmetic = Quantity(count.flops(), "FLOP", method=_COUNTED)
    except NotImplementedError as error:  # operations that cannot run while another looks at what runs
        count, arithmetic = Count(), Quantity.missing("FLOP", f"it cannot be counted: {first_line(error)}")
    where = Where(work.model)
    events = _profiled(work, finished, where, _steps(count))
    profiled = sorted(_split(events, where, count.operators), key=lambda step: step.event.duration_ns)
    if not profiled:
        return unprofiled(basics, "torch's profiler recorded no step")
    length_ns = statistics.median(step.event.duration_ns for step in profiled)
    steps = profiled[: len(profiled) // 2 + 1]  # the quicker half: the others were interrupted more
    shown = steps[-1]
    ops = operations(steps, count)
    busy, gaps = _busy(steps)
    on_device = any(step.kernels for step in steps)
    return Time(
        step=basics.step,
        first_call_s=basics.first_call_s,
        compile_s=basics.compile_s,
        recompiles=basics.recompiles,
        phases_ms=_phases(steps, ops, on_device),
        busy=_busy_share(work, busy, on_device),
        idle_ms=tuple(gap / 1e6 for gap in sorted(gaps, reverse=True)[:GAPS]),
        waiting=_waiting(steps, work.device),
        attributed=_attributed(steps),
        overhead=Quantity(
            length_ns / 1e6 / basics.step.median_ms,
            "ratio",
            method=f"median of {len(profiled)} profiled steps / median of those without",
        ),
        flops=arithmetic,
        utilization=Quantity.missing("ratio", "the machine's ceiling was not measured"),
        ops=ops,
        modules=modules(work.model, ops, count, on_device),
        spans=spans(shown.event, shown.placing, shown.kernels, shown.runtime),
    )


def _steps(count: Count) -> int:
    """How many steps to profile: fewer of those with many operators."""
    events = 4 * sum(map(len, count.calls.values())) + 1
    return max(FEWEST_STEPS, min(MOST_STEPS, MOST_EVENTS // events))


def _profiled(work: Workload, finished: Finished, where: Where, steps: int) -> Recorded:
    step = where.stepping(work, finished)
    activities = [ProfilerActivity.CPU]
    if work.device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with contextlib.ExitStack() as stack:
        stack.enter_context(finished.keeping_state())
        step()
        profiler = stack.enter_context(profiled(activities=activities))
        stack.enter_context(where.following())
        for _ in range(steps + 1):
            step()
    return recorded(profiler)


def _split(events: Recorded, where: Where, whole: set[str]) -> Iterator[Step]:
    """The steps but for the first, in which the profiler settles."""
    marks = [event for event in events.host if event.name == STEP]
    for mark in marks[1:]:
        inside = [event for event in events.host if mark.start_ns <= event.start_ns < mark.end_ns]
        placing = placed(inside, where, whole | {COMPILED_GRAPH})
        runtime = [event for event in events.runtime if mark.start_ns <= event.start_ns < mark.end_ns]
        kernels = [event for event in events.device if mark.start_ns <= event.start_ns < mark.end_ns]
        yield Step(mark, placing, runtime, kernels)


def _busy(steps: list[Step]) -> tuple[float, list[int]]:
    """Share of the steps' time in which something computes, and the gaps of the step of median length."""
    shares: list[tuple[float, list[int]]] = []
    for step in steps:
        computing = step.kernels or [place.event for place in step.placing.operations]
        inside = [_clipped(event, step.event) for event in computing]
        total, between = union_ns([(step.event.start_ns, step.event.start_ns), *inside, (step.event.end_ns,) * 2])
        shares.append((total / max(step.event.duration_ns, 1), between))
    shares.sort(key=lambda share: share[0])
    return shares[len(shares) // 2]


def _clipped(event: Event, within: Event) -> tuple[int, int]:
    return max(event.start_ns, within.start_ns), min(event.end_ns, within.end_ns)


def _busy_share(work: Workload, busy: float, on_device: bool) -> Quantity:
    if on_device:
        return Quantity(busy, "ratio", method="union of the kernels and copies of the device / step")
    if work.device == "cpu":
        return Quantity(busy, "ratio", method="union of the operations / step: the rest is Python's")
    return Quantity.missing("ratio", f"the profiler recorded no kernel of device {work.device!r} (CUPTI)")


def _waiting(steps: list[Step], device: str) -> Quantity:
    if device == "cpu":
        return Quantity.missing("ratio", "the processor computes itself: it waits for no device")
    waits = sum(
        union_ns((event.start_ns, event.end_ns) for event in step.runtime if event.name.startswith(WAITS))[0]
        for step in steps
    )
    return Quantity(waits / _total_ns(steps), "ratio", method="union of synchronizing runtime calls / step")


def _attributed(steps: list[Step]) -> Quantity:
    known = 0
    for step in steps:
        events = [*step.kernels, *(place.event for place in step.placing.operations)]
        known += union_ns(_clipped(event, step.event) for event in events)[0]
    return Quantity(known / _total_ns(steps), "ratio", method="union of operations and kernels / profiled step")


def _total_ns(steps: list[Step]) -> int:
    return max(sum(step.event.duration_ns for step in steps), 1)


def _phases(steps: list[Step], ops: tuple[Op, ...], on_device: bool) -> dict[str, float]:
    """Milliseconds per step: of kernels by the phase that launched them, without a device of the host."""
    step_ms = _total_ns(steps) / len(steps) / 1e6
    phases: defaultdict[str, float] = defaultdict(float)
    if on_device:
        for op in ops:
            if op.kind == "kernel" and op.phase != "other":
                phases[op.phase] += op.self_ms
    else:
        for step in steps:
            for name, ns in _host_phases(step).items():
                phases[name] += ns / len(steps) / 1e6
    return {**phases, "other": max(step_ms - sum(phases.values()), 0.0)}


def _host_phases(step: Step) -> Counter[str]:
    """Nanoseconds by phase; a backward pass lasts from its first operation to its last before another phase begins."""
    phases: Counter[str] = Counter()
    marked = [(event, name) for kind, name, event in step.placing.ranges if kind == "phase"]
    working = [(place.event, "backward") for place in step.placing.operations if place.phase == "backward"]
    begun, ended = 0, 0
    for event, phase in [*sorted([*marked, *working], key=lambda one: one[0].start_ns), (step.event, "end")]:
        if phase == "backward":
            begun, ended = begun or event.start_ns, max(ended, event.end_ns)
            continue
        phases["backward"] += ended - begun
        phases[phase] += event.duration_ns
        begun = ended = 0
    del phases["end"]
    return +phases
