"""The memory of a model that runs as one XLA program: as XLA planned it, buffer by buffer."""

from __future__ import annotations

from collections.abc import Iterator

import jax

from perfkit._errors import UnsupportedError
from perfkit._quantity import Quantity
from perfkit.profiling import jax_hlo, jax_trace
from perfkit.profiling._memory_data import Allocation
from perfkit.profiling.jax_buffers import Buffer, Buffers, buffers
from perfkit.profiling.jax_held import Moment, argument, argument_names, described
from perfkit.profiling.jax_hlo import Program
from perfkit.profiling.jax_run import Run

TRACED_STEPS = 3
MOST_MOMENTS = 400
SMALLEST = 1024
"""Temporaries below this many bytes are told in sum."""


def moments(run: Run) -> tuple[list[Moment], Quantity, dict[str, float]]:
    """The moments of a step, the peak, and what the compiler says of the program."""
    compiled = run.compiled if run.work.trains else run.again(None)
    executable = compiled.runtime_executable()
    told, program = compiled.memory_analysis(), jax_hlo.program(executable)
    assignment = executable.get_compiled_memory_stats().serialized_buffer_assignment_proto
    sizes = {
        "temp": float(told.temp_size_in_bytes),
        "arguments": float(told.argument_size_in_bytes),
        "output": float(told.output_size_in_bytes),
        "alias": float(told.alias_size_in_bytes),
    }
    peak = sizes["arguments"] + sizes["output"] + sizes["temp"] - sizes["alias"]
    library = compiled.as_text().count("kind=kCustom") if run.work.device == "cpu" else 0
    method = "XLA's memory analysis: arguments + outputs + temporaries - what outputs take over from arguments"
    if library:
        method += (
            f"; what a library allocates within {library} fusion(s) is not in it: see the process' high-water mark"
        )
    if not assignment:
        return [_unplanned(run, sizes)], Quantity(peak, "B", method=f"{method}; it gives no plan of buffers"), sizes
    found = buffers(program, assignment)
    return list(_moments(run, program, found)), Quantity(peak, "B", method=method), sizes


def _unplanned(run: Run, sizes: dict[str, float]) -> Moment:
    """Where XLA does not tell its buffers: the arguments that it was given, and in sum what else it says it holds."""
    held = []
    for name, leaf in zip(argument_names(run), jax.tree.leaves(run.arguments), strict=True):
        category, module = argument(name)
        held.append(Allocation(float(leaf.nbytes), category, module, "argument", described(leaf)))
    unused = sizes["arguments"] - sum(each.bytes for each in held)
    rest = {"temporaries": sizes["temp"], "other": sizes["output"] - sizes["alias"] + unused}
    return Moment(0.0, (*held, *(Allocation(size, category) for category, size in rest.items())), peak=True)


def _moments(run: Run, program: Program, found: Buffers) -> Iterator[Moment]:
    """What is held at each place in the schedule.

    The arena is held as a whole from beginning to end: what no value is in at a moment is "other".
    """
    starts = _starts(run, program, found)
    always = [*_arguments(found), *_outputs(run, program, found)]
    kept = {id(buffer): _temporary(run, program, buffer, starts) for buffer in found.temporaries}
    peak = sum(buffer.bytes for buffer in found.temporaries if buffer.at_peak)
    living = {position: list(found.living(position)) for position in _positions(found)}
    fullest = max(living, key=lambda position: sum(size for _, size in living[position]), default=0)
    for position, pairs in living.items():
        if position == fullest:
            pairs = [(buffer, buffer.bytes) for buffer in found.temporaries if buffer.at_peak]
        held = [_sized(kept[id(buffer)], size) for buffer, size in pairs if size >= SMALLEST]
        rest = sum(size for _, size in pairs if size < SMALLEST)
        unused = (found.arena - peak if position == fullest else found.arena - sum(size for _, size in pairs)) + rest
        gap = Allocation(max(unused, 0.0), "other", op="unused in XLA's arena, and buffers under 1 kB", born_ms=0.0)
        at_ms = starts[position] if position else 0.0  # the arena is there before the program begins
        yield Moment(at_ms, (*always, *held, gap), peak=position == fullest)


def _positions(found: Buffers) -> list[int]:
    """Where something is written or given up, thinned."""
    edges = {0} | {place for buffer in found.temporaries for place in (buffer.first, buffer.last)}
    peak = [buffer for buffer in found.temporaries if buffer.at_peak]
    ordered = sorted(edges)
    step = max(1, -(-len(ordered) // MOST_MOMENTS))
    return sorted({*ordered[::step], *([max(buffer.first for buffer in peak)] if peak else [])})


def _arguments(found: Buffers) -> Iterator[Allocation]:
    for buffer in found.arguments:
        category, module = argument(buffer.argument)
        yield Allocation(buffer.bytes, category, module, "argument", _shape(buffer))


def _outputs(run: Run, program: Program, found: Buffers) -> Iterator[Allocation]:
    """New parameters and optimizer state beside the old ones; in inference, what the model returns."""
    names = argument_names(run)
    state = [name for name in names if name.startswith("state")]
    results = len(run.jaxpr.jaxpr.outvars)
    root = program.instructions[program.computations[program.entry].root]
    complete = results == (len(root.operands) if root.opcode == "tuple" else 1)
    for buffer in found.outputs:
        category, module, op = "activations" if not run.work.trains else "other", "", "output"
        if complete and buffer.output is not None and buffer.output < len(state):
            category, module = argument(state[buffer.output])
            op = "output: the new one beside the old"
        yield Allocation(buffer.bytes, category, module, op, _shape(buffer), born_ms=0.0)


def _temporary(run: Run, program: Program, buffer: Buffer, starts: list[float]) -> Allocation:
    at = run.place(program.op_name(buffer.maker))
    category = "activations" if at.phase in ("forward", "loss") else "temporaries"
    if at.phase == "backward" and _for_optimizer(run, program, buffer):
        category = "gradients"
    name = at.primitive or buffer.maker.opcode
    freed = starts[min(buffer.last + 1, len(starts) - 1)]
    return Allocation(buffer.bytes, category, at.module, name, _shape(buffer), starts[buffer.first], freed)


def _for_optimizer(run: Run, program: Program, buffer: Buffer) -> bool:
    users = [program.instructions[user] for user in program.users.get(buffer.maker.id, ())]
    return bool(users) and all(run.place(program.op_name(user)).phase == "optimizer" for user in users)


def _starts(run: Run, program: Program, found: Buffers) -> list[float]:
    """When each place in the schedule is reached, in ms: as traced; between two that were, the later one's.

    All 0 where another profiler keeps this one from running.
    """
    try:
        trace = jax_trace.taken(run.call, TRACED_STEPS)
    except UnsupportedError:
        return [0.0] * max(len(found.order), 1)
    step = min(trace.steps, key=lambda step: step[1] - step[0])
    seen: dict[str, float] = {}
    for event in trace.events:
        if step[0] <= event.start_ms < step[1]:
            seen.setdefault(event.name, event.start_ms - step[0])
    found_ms: list[float] = []
    latest = step[1] - step[0]
    for key in reversed(found.order):
        latest = min(latest, seen.get(program.instructions[key].name, latest))
        found_ms.append(latest)
    return found_ms[::-1] or [0.0]


def _shape(buffer: Buffer) -> str:
    fits = [array for array in buffer.maker.arrays if array.bytes == buffer.bytes]
    return str(fits[0]) if fits else ""


def _sized(held: Allocation, size: float) -> Allocation:
    return held if held.bytes == size else Allocation(**{**vars(held), "bytes": size})
