"""Where the time of a JAX model's step goes: XLA's operations as its profiler times them, by module and phase."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable
from typing import Any

import jax

from perfkit._errors import UnsupportedError
from perfkit._quantity import Quantity
from perfkit._workload import Workload
from perfkit.backends.adapter import Finished
from perfkit.backends.jax_inputs import READS_VALUES
from perfkit.profiling import jax_flops, jax_hlo, jax_ops, jax_recorded, jax_shares, jax_trace
from perfkit.profiling._basics import Basics, unprofiled
from perfkit.profiling._time_data import PHASES, Op, Time
from perfkit.profiling.facts import READS_AT
from perfkit.profiling.jax_modules import modules
from perfkit.profiling.jax_ops import Reader
from perfkit.profiling.jax_placing import placed
from perfkit.profiling.jax_run import WITHOUT_LIBRARY_FUSIONS, Run, marking
from perfkit.profiling.jax_scopes import Place
from perfkit.profiling.jax_shares import Shares
from perfkit.profiling.jax_spans import spans
from perfkit.profiling.jax_trace import Event, Trace

PROFILED_S = 0.5
FEWEST, MOST = 5, 20
"""So many steps are profiled, about PROFILED_S long together."""

MOST_GAPS = 5


def by_operation(finished: Finished, error: Exception) -> bool:
    """Whether a step that raised this runs operation by operation from now on: one that reads a value in Python."""
    reads = finished.trainer is not None and isinstance(error.__cause__ or error, READS_VALUES)
    if reads:
        jax_recorded.by_operation(finished)
    return reads


def collected(work: Workload, finished: Finished, basics: Basics, note: Callable[[str], Any] = str) -> Time:
    """Time by operation, module and phase.

    Args:
        work: what is profiled. A copy of it runs, with a scope around every call of a module.
        finished: it as it was timed; it is not called.
        basics: its steps without a profiler.
        note: called with what must be said of how the model runs.
    """
    del finished
    with marking(work) as run:
        if run.read_at:
            note(f"{READS_AT}{run.read_at}")
        count = jax_flops.counted(run.jaxpr, work.trains, run.scopes)
        steps = max(FEWEST, min(MOST, round(PROFILED_S / (basics.step.median_ms / 1e3))))
        run.call()
        try:
            trace = jax_trace.taken(run.call, steps)
        except UnsupportedError as error:
            return unprofiled(basics, str(error))
        if run.read_at:
            trace = placed(trace, run.jaxpr.eqns, run.place)
        reader, split = _reader(run, trace, count)
        return _time(run, trace, reader, split, count, basics)


def _time(run: Run, trace: Trace, reader: Reader, split: str, count: jax_flops.Counted, basics: Basics) -> Time:
    lengths = [end - start for start, end in trace.steps]
    ops = jax_ops.ops([_swept(trace, reader, step) for step in trace.steps], reader, count.by_place)
    attributed_ms = sum(op.self_ms for op in ops)
    step_ms = max(statistics.median(lengths), attributed_ms)
    covered = [_covered(trace, step) for step in trace.steps]
    waits = [(item.start_ms, item.end_ms) for item in trace.host if item.kind == "wait"]
    waiting = [jax_ops.union(waits, step) for step in trace.steps]
    typical = sorted(range(len(lengths)), key=lengths.__getitem__)[len(lengths) // 2]
    form = "one XLA program" if len(trace.programs) == 1 else f"{len(trace.programs)} XLA programs, one after another"
    how = f"XLA's own times of what it runs, {form}; medians of {len(trace.steps)} steps"
    nothing = None if trace.events else "the profiler recorded no operation of XLA's"
    return Time(
        step=basics.step,
        first_call_s=basics.first_call_s,
        compile_s=basics.compile_s,
        recompiles=basics.recompiles,
        phases_ms=_phases(ops, step_ms),
        busy=_share(_part(covered, lengths), nothing, f"union of XLA's operations / step; {how}"),
        idle_ms=_gaps(covered[typical], trace.steps[typical]),
        waiting=_share(_part(waiting, lengths), None, "the host's thread waits for results"),
        attributed=_share(attributed_ms / step_ms, nothing, f"{how}{split}"),
        overhead=Quantity(statistics.median(lengths) / basics.step.median_ms, "ratio", method="jax.profiler"),
        flops=Quantity(count.total, "FLOP", method=_counted_how(count)),
        utilization=Quantity.missing("ratio", "the machine's ceilings are measured later"),
        ops=ops,
        modules=modules(run, ops, count),
        spans=spans(run.work.model.name, trace, reader, trace.steps[typical]),
        as_one=basics.as_one,
    )


def _reader(run: Run, trace: Trace, count: jax_flops.Counted) -> tuple[Reader, str]:
    """What reads the trace, and how the time of fusions of whole layers was shared out."""
    alone = len(trace.programs) > 1
    programs = _programs(trace)
    if not alone:
        for program in programs.values():
            program.name_products(_missing(program, run, count))
    plain = Reader(programs, functools.partial(run.place, alone=alone), device=trace.device, alone=alone)
    fused = {
        (event.program, event.name): item
        for event in trace.events
        if (item := plain.instruction(event)) and jax_shares.holds_layers(programs[event.program], item, run.place)
    }
    if not fused:
        return plain, ""
    by_place = _apart(run) if not trace.device else {}
    shares: dict[str, Shares] = {}
    measured = 0
    for (number, name), item in fused.items():
        shares[name] = jax_shares.shares_by_time(programs[number], item, run.place, by_place)
        measured += bool(shares[name])
        shares[name] = shares[name] or jax_shares.shares_by_work(programs[number], item, run.place)
    told = f"; the time of {len(fused)} fusion(s) of several layers shared out among them "
    how = "as they take it where XLA does not fuse them" if measured == len(fused) else "by their operations and bytes"
    return Reader(programs, run.place, shares, device=trace.device), told + how


def _apart(run: Run) -> dict[Place, float]:
    """Times by place in the same program without a library's fusions; empty where XLA has no such option."""
    try:
        compiled = run.again(WITHOUT_LIBRARY_FUSIONS)
    except jax.errors.JaxRuntimeError:
        return {}

    def call() -> Any:
        owned = jax.tree.map(lambda leaf: leaf.copy(), run.arguments[0])  # which a step may take over
        return jax.block_until_ready(compiled(owned, *run.arguments[1:]))

    call()
    trace = jax_trace.taken(call, FEWEST)
    reader = Reader(_programs(trace), run.place)
    found: dict[Place, float] = {}
    for step in trace.steps:
        for item, ms in _swept(trace, reader, step):
            for row in reader.rows(item) if isinstance(item, Event) else ():
                at = Place(row.module, row.phase)
                found[at] = found.get(at, 0.0) + ms * row.share
    return found


def _missing(program: jax_hlo.Program, run: Run, count: jax_flops.Counted) -> dict[str, float]:
    """The products of the jaxpr that no named one in the program is of, by their names."""
    named = [item.op_name for item in program.instructions.values() if item.product_flops and "/" in item.op_name]
    there = {(at.module, at.phase) for at in map(run.place, named)}
    return {count.paths[key]: flops for key, flops in count.by_place.items() if key not in there}


def _programs(trace: Trace) -> dict[int, jax_hlo.Program]:
    return {number: jax_hlo.Program(serialized) for number, serialized in trace.compiled.items()}


def _swept(trace: Trace, reader: Reader, step: tuple[float, float]) -> Any:
    return jax_ops.swept(jax_ops.of_step(trace, step), trace.host, reader.controls, step)


def _covered(trace: Trace, step: tuple[float, float]) -> list[tuple[float, float]]:
    """When XLA ran anything."""
    return jax_ops.union(((event.start_ms, event.end_ms) for event in jax_ops.of_step(trace, step)), step)


def _part(covered: list[list[tuple[float, float]]], lengths: list[float]) -> float:
    """The share of a step that is covered: the median over steps."""
    shares = [sum(end - start for start, end in some) / ms for some, ms in zip(covered, lengths, strict=True)]
    return statistics.median(shares)


def _phases(ops: tuple[Op, ...], step_ms: float) -> dict[str, float]:
    """By phase; what is in none, and what no operation accounts for, is "other"."""
    found = {phase: sum(op.self_ms for op in ops if op.phase == phase) for phase in PHASES if phase != "other"}
    found = {phase: ms for phase, ms in found.items() if ms}
    return {**found, "other": max(step_ms - sum(found.values()), 0.0)}


def _gaps(covered: list[tuple[float, float]], step: tuple[float, float]) -> tuple[float, ...]:
    ends = [step[0], *(end for _, end in covered)]
    starts = [*(start for start, _ in covered), step[1]]
    gaps = sorted((start - end for end, start in zip(ends, starts, strict=True)), reverse=True)
    return tuple(gap for gap in gaps[:MOST_GAPS] if gap > 0)


def _share(value: float, missing: str | None, method: str) -> Quantity:
    if missing or not math.isfinite(value):
        return Quantity.missing("ratio", missing or "the step has no length")
    return Quantity(value, "ratio", method=method)


def _counted_how(count: jax_flops.Counted) -> str:
    told = "products in the jaxpr, two for a multiply-add, padding's taps counted, loops times their length"
    return "; ".join([told, *count.unknown])
