"""Some steps under JAX's profiler, and what it recorded, with times in ms from the first step's start.

XLA notes each operation that it runs, on CPUs as on GPUs, by the name of its HLO instruction; the host's calls and
waits are in the same trace. It goes through a file in a temporary folder, which is read and removed.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData

from perfkit._errors import UnsupportedError
from perfkit.profiling._wire import Message

STEP = "perfkit step"
_WAITS = re.compile(r"::Await$|BlockHostUntilReady|SynchronizeAllActivity|cuStreamSynchronize|cuEventSynchronize")
_LAUNCHED = re.compile(r"^PjitFunction\((.*)\)$|^(ExecuteReplicated|pmap_lib)")
_NUMBERED = re.compile(r"\((\d+)\)$")
_COMPILES = re.compile(r"^(backend_compile\w*|lower_sharding_computation)$")
_COPIES = re.compile(r"memcpy|memset", re.IGNORECASE)


@dataclass(frozen=True)
class Event:
    """Something that XLA ran.

    Args:
        name: of the HLO instruction; of a copy or a kernel outside of programs, its own.
        track: where: "XLA", "XLA 2", "device 0: Stream #14".
        program: the number of the program that it belongs to; 0 where it is in none.
        run: the number of that program's run.
        copies: whether it moves memory and computes nothing.
        module: where the host was as it was launched, of programs launched one operation at a time; else "".
        phase: of the step, where a recorded step tells it; else "".
        number: by which a CPU's trace tells when it was done, where XLA went on before it was.
    """

    name: str
    track: str
    start_ms: float
    end_ms: float
    program: int = 0
    run: int = 0
    copies: bool = False
    module: str = ""
    phase: str = ""
    number: int = -1


@dataclass(frozen=True)
class Host:
    """Something that the host's thread did: "module", "dispatch", "compile" or "wait"."""

    name: str
    kind: str
    start_ms: float
    end_ms: float
    module: str = ""
    phase: str = ""


@dataclass(frozen=True)
class Trace:
    """What was recorded.

    Args:
        steps: beginning and end of each.
        events: what XLA ran, by start.
        host: what the host did, by start.
        device: whether `events` are of a device with a memory of its own; else they ran on this processor.
        programs: names by number.
        compiled: the programs that were loaded meanwhile, each a serialized HloModuleProto, by number.
    """

    steps: tuple[tuple[float, float], ...]
    events: tuple[Event, ...]
    host: tuple[Host, ...]
    device: bool
    programs: dict[int, str]
    compiled: dict[int, bytes] = field(default_factory=dict)


def taken(call: Callable[[], Any], steps: int) -> Trace:
    """Make `steps` calls under the profiler.

    Args:
        call: one whole, synchronized call, warmed up.

    Raises:
        UnsupportedError: another of JAX's profilers runs in this process; no call was made.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory(prefix="perfkit-trace-") as folder:
        try:
            jax.profiler.start_trace(folder, profiler_options=options)
        except RuntimeError as error:
            raise UnsupportedError(f"JAX's profiler does not start ({error}): stop the one that runs") from error
        try:
            for number in range(steps):
                with jax.profiler.StepTraceAnnotation(STEP, step_num=number):
                    call()
        finally:
            jax.profiler.stop_trace()
        (path,) = Path(folder).rglob("*.xplane.pb")
        serialized = path.read_bytes()
    trace = read(ProfileData.from_serialized_xspace(serialized))
    return replace(trace, compiled=_compiled(serialized, set(trace.programs)))


def read(data: ProfileData) -> Trace:
    """A trace of whatever device."""
    planes = list(data.planes)
    on_device = [plane for plane in planes if plane.name.startswith("/device:") and _works(plane)]
    (host_plane,) = [plane for plane in planes if plane.name == "/host:CPU"]
    main = next(line for line in host_plane.lines if any(event.name == STEP for event in line.events))
    stepped = [event for event in main.events if event.name == STEP]
    zero = stepped[0].start_ns

    def ms(ns: float) -> float:
        return (ns - zero) / 1e6

    found: list[Event] = []
    programs: dict[int, str] = {}
    ends: dict[int, float] = {}
    for number, plane in enumerate(on_device or [host_plane]):
        for line in _lines(plane, bool(on_device)):
            track = f"device {number}: {line.name}" if on_device else "XLA"
            for event in line.events:
                stats = dict(event.stats)
                start, end = ms(event.start_ns), ms(event.start_ns + event.duration_ns)
                if event.name.startswith("end: ") and "_c" in stats:
                    ends[stats["_c"]] = end
                if "hlo_op" not in stats and not (on_device and event.duration_ns):
                    continue
                program = int(stats.get("program_id", 0))
                programs[program] = str(stats.get("hlo_module", "")).partition("(")[0]
                name = str(stats.get("hlo_op", event.name))
                copies = bool(on_device) and bool(_COPIES.search(event.name))
                own = stats.get("_p", -len(found) - 1)
                found.append(Event(name, track, start, end, program, int(stats.get("run_id", 0)), copies, number=own))
    found = [replace(event, end_ms=max(event.end_ms, ends.get(event.number, 0.0))) for event in found]
    found = [event for event in found if event.start_ms >= 0]
    steps = tuple((ms(event.start_ns), ms(event.end_ns)) for event in stepped)
    host = _host(main.events, ms)
    return Trace(steps, _at_their_modules(found, host, programs), host, bool(on_device), programs)


def _compiled(serialized: bytes, wanted: set[int]) -> dict[int, bytes]:
    """The programs that a trace carries with it; ProfileData does not give them out.

    Source: openxla/xla, xla/tsl/profiler/protobuf/xplane.proto and xla/service/hlo.proto, for the fields' numbers.
    """
    found: dict[int, bytes] = {}
    for plane in Message(serialized).messages(1):
        if plane.text(2) != "/host:metadata":
            continue
        for entry in plane.messages(4):
            (program,) = entry.messages(2)
            number = _NUMBERED.search(program.text(2))
            if number and int(number[1]) in wanted:
                for stat in program.messages(5):
                    for hlo in stat.messages(6):
                        found[int(number[1])] = bytes(hlo.fields[1][0])
    return found


def _works(plane: Any) -> bool:
    return any(event.duration_ns for line in _lines(plane, True) for event in line.events)


def _lines(plane: Any, device: bool) -> Iterable[Any]:
    """The lines on which operations stand: of a TPU one, of a GPU its streams, of a CPU XLA's threads and the host's.

    Of a GPU the lines that tools derive from the streams would count everything twice.
    """
    lines = list(plane.lines)
    streams = [line for line in lines if line.name.startswith("Stream")]
    return streams or [line for line in lines if line.name == "XLA Ops"] if device else lines


def _host(events: Iterable[Any], ms: Callable[[float], float]) -> tuple[Host, ...]:
    found: list[Host] = []
    modules: list[tuple[str, float]] = []
    waits: dict[int, float] = {}
    busy_until = 0.0
    for event in sorted(events, key=lambda event: (event.start_ns, -event.duration_ns)):
        start, end = ms(event.start_ns), ms(event.end_ns)
        if end < 0:
            continue
        while modules and modules[-1][1] <= start:
            modules.pop()
        module = modules[-1][0] if modules else ""
        if event.name.startswith("{") and event.name.endswith("}"):
            modules.append((event.name[1:-1], end))
            found.append(Host(event.name[1:-1], "module", start, end, event.name[1:-1]))
        elif launched := _LAUNCHED.match(event.name):
            if start >= busy_until:  # the same launch is noted at several depths
                busy_until = end
                found.append(Host(launched[1] or event.name, "dispatch", start, end, module))
        elif _COMPILES.search(event.name):
            found.append(Host(event.name, "compile", start, end, module))
        elif _WAITS.search(event.name):
            stats = dict(event.stats)
            if "_p" in stats:
                waits[stats["_p"]] = start
            elif "_c" in stats and stats["_c"] in waits:
                found.append(Host("wait", "wait", waits.pop(stats["_c"]), end, module))
            elif "_c" not in stats:
                found.append(Host("wait", "wait", start, end, module))
    return tuple(sorted(found, key=lambda item: (item.start_ms, -item.end_ms)))


def _at_their_modules(events: list[Event], host: tuple[Host, ...], programs: dict[int, str]) -> tuple[Event, ...]:
    """The events, each with the module from which the host launched its program: the n-th launch by the n-th run.

    Only where the launches of a name are as many as its runs; where they are not, nothing is said.
    """
    events = _numbered(sorted(events, key=lambda event: event.start_ms))
    launches: dict[str, list[str]] = {}
    for item in host:
        if item.kind == "dispatch":
            launches.setdefault(item.name, []).append(item.module)
    runs: dict[str, dict[tuple[int, int], None]] = {}
    for event in events:
        runs.setdefault(programs.get(event.program, "").removeprefix("jit_"), {})[event.program, event.run] = None
    module_of: dict[tuple[int, int], str] = {}
    for name, ordered in runs.items():
        made = launches.get(name, [])
        if len(made) == len(ordered):
            module_of |= dict(zip(ordered, made, strict=True))
    return tuple(Event(**{**vars(event), "module": module_of.get((event.program, event.run), "")}) for event in events)


def _numbered(events: list[Event]) -> list[Event]:
    """The events with numbers for runs where the device gives none: one ends where another program or itself begins."""
    found: list[Event] = []
    program, run, seen = 0, 0, set[str]()
    for event in events:
        if not event.run and event.program:
            if event.program != program or event.name in seen:
                program, run, seen = event.program, run + 1, set()
            seen.add(event.name)
            event = replace(event, run=-run)
        found.append(event)
    return found
