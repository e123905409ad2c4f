"""What a profile holds, as plain data: no framework, no behaviour beyond showing itself.

Times are of one call (inference) or one training step, in milliseconds from its start. Sizes are in bytes. A number
that could not be measured is a `Quantity` without a value and with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perfkit._report import Environment, Latency, Quantity, plain, written

if TYPE_CHECKING:
    from perfkit.profiling.diff import ProfileDiff

SCHEMA_VERSION = 1

PHASES = ("forward", "loss", "backward", "optimizer", "other")
CATEGORIES = ("parameters", "gradients", "optimizer state", "inputs", "activations", "temporaries", "other")


@dataclass(frozen=True)
class Op:
    """An operation of the framework, or a kernel of the device, at one place in the model; summed over one step.

    Args:
        name: as the framework calls it: "aten::convolution", "dot_general".
        kind: "op" on the host, or "kernel" on a device.
        module: path of the innermost module that called it: "encoder.0.fc1"; "" outside of all.
        phase: one of `PHASES`.
        calls: how often, per step.
        self_ms: its own time, without that of operations within it.
        flops: floating-point operations, two for a multiply-add; of the mathematics, not of what a kernel pads.
        moved_bytes: inputs and outputs, each once: the least that it must read and write.
        shapes: of its inputs, for reading: "float32[64, 1, 28, 28], float32[32, 1, 3, 3]".
    """

    name: str
    kind: str
    module: str
    phase: str
    calls: float
    self_ms: float
    flops: float = 0.0
    moved_bytes: float = 0.0
    shapes: str = ""


@dataclass(frozen=True)
class Module:
    """A module of the model, with everything within it.

    Args:
        path: "" for the model itself.
        kind: its class.
        forward_ms, backward_ms: time within it, of its operations and those of the modules in it.
        self_ms: of its own operations alone, forward and backward.
        flops: forward and backward, with the modules in it.
        parameters: their number, with the modules in it, tied ones once.
        saved_bytes: activations that it keeps for the backward pass; 0 in inference.
        output_bytes: what it returns.
    """

    path: str
    kind: str
    calls: float
    forward_ms: float
    backward_ms: float
    self_ms: float
    flops: float
    parameters: int
    saved_bytes: float
    output_bytes: float


@dataclass(frozen=True)
class Span:
    """Something that went on from `start_ms` to `start_ms + duration_ms` of one profiled step.

    Args:
        track: where: "host", "host: autograd", "device 0: stream 7".
        depth: how deep it is nested in the spans of its track.
        kind: "module", "op", "kernel", "copy", "phase" or "wait".
    """

    name: str
    track: str
    kind: str
    start_ms: float
    duration_ms: float
    depth: int = 0
    module: str = ""


@dataclass(frozen=True)
class Time:
    """Where the time of a step goes.

    Args:
        step: whole steps, timed without the profiler.
        first_call_s: the first call: compilation, lazy set-up.
        compile_s: what of it was compilation.
        recompiles: compilations during the steps that should need none.
        phases_ms: time by phase; of what the profiler attributes to none, "other".
        busy: share of the step in which the device computes: the union of its kernels. On a CPU: of its operations.
        idle_ms: the longest gaps between device kernels, longest first.
        waiting: share of the step in which the host waits for the device (synchronizing).
        attributed: share of the profiled step that the operations account for.
        overhead: time of a profiled step as a multiple of one that is not.
        flops: of one step, all operations.
        utilization: flops / step time / the machine's ceiling for the dtype (model FLOPs utilization).
    """

    step: Latency
    first_call_s: Quantity
    compile_s: Quantity
    recompiles: int
    phases_ms: dict[str, float]
    busy: Quantity
    idle_ms: tuple[float, ...]
    waiting: Quantity
    attributed: Quantity
    overhead: Quantity
    flops: Quantity
    utilization: Quantity
    ops: tuple[Op, ...] = ()
    modules: tuple[Module, ...] = ()
    spans: tuple[Span, ...] = ()


@dataclass(frozen=True)
class MemoryPoint:
    """Bytes held at one moment of a step, by category."""

    at_ms: float
    bytes_by_category: dict[str, float]


@dataclass(frozen=True)
class Allocation:
    """A piece of memory that was held at the peak.

    Args:
        category: one of `CATEGORIES`.
        module: whose; "" where unknown.
        op: the operation that allocated it.
        born_ms: when; negative for before the step.
        freed_ms: when it was freed; None where it outlived the step.
    """

    bytes: float
    category: str
    module: str = ""
    op: str = ""
    shape: str = ""
    born_ms: float = -1.0
    freed_ms: float | None = None


@dataclass(frozen=True)
class Memory:
    """Where the memory of a step goes.

    Args:
        peak: most tensor memory held at once, what was held before the step included.
        by_category: what is held at that moment; adds up to `peak`.
        by_module: activations held at that moment, by the module that made them.
        timeline: the step, point by point; thinned to at most some hundreds.
        largest: at the peak, largest first.
        growth: bytes that each further step leaves behind: a leak where it is not 0.
        process_high_water: how far the resident memory of the process rises during a step.
        native_heap: what the C library's allocator holds in use, above the tensors.
        reserved: held by the framework's caching allocator (CUDA).
        device_used: of the card, by everything (NVML).
        fragmentation: share of `reserved` that is not allocated at the peak.
        program: what the compiler says of its program, by name: "temp", "arguments", "output", "alias" (JAX).
    """

    peak: Quantity
    by_category: dict[str, float]
    by_module: dict[str, float]
    timeline: tuple[MemoryPoint, ...]
    largest: tuple[Allocation, ...]
    growth: Quantity
    process_high_water: Quantity
    native_heap: Quantity
    reserved: Quantity
    device_used: Quantity
    fragmentation: Quantity
    program: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches at best, measured just now: the roofs of the roofline.

    Args:
        gflops: of a large matrix product, by dtype: "float32", "bfloat16", "int8".
        bandwidth_gb_s: of a stream that is larger than the caches (triad: two reads and a write).
    """

    gflops: dict[str, Quantity]
    bandwidth_gb_s: Quantity


@dataclass(frozen=True)
class Series:
    """One reading of a device over time."""

    name: str
    unit: str
    at_s: tuple[float, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class DeviceState:
    """One card, or the processor, during the run.

    Args:
        name: "NVIDIA H100 80GB HBM3 (0)"; "CPU package 0".
        readings: by name, each with its unit or why it is not supported: "temperature", "power", "sm clock", …
        reasons: why the clock was held down, if it was.
        processes: others that compute on the card.
        series: readings over time.
    """

    name: str
    readings: dict[str, Quantity]
    reasons: tuple[str, ...] = ()
    processes: tuple[str, ...] = ()
    series: tuple[Series, ...] = ()


@dataclass(frozen=True)
class Energy:
    """Energy of a step.

    Args:
        step_j: above idle, per step, all devices.
        mean_w, idle_w: power while working and before.
        window_s: how long was measured, in whole ticks of the counter.
        source: the counter: "NVML energy counter, 1 card", "RAPL package-0".
    """

    step_j: Quantity
    mean_w: Quantity
    idle_w: Quantity
    window_s: float
    source: str


@dataclass(frozen=True)
class Finding:
    """Something that costs time or memory, why, and what addresses it.

    Args:
        kind: in two or three words: "launch-bound", "activations dominate".
        told: one sentence with the number.
        where: modules or operations; empty for the whole step.
        share: of the step's time or of the peak that is at stake.
        resource: "time" or "memory".
        recipe: a chain for `optimize` that addresses it; empty where the cause is in the caller's code.
        advice: what to do, in a sentence.
        predicted: by how much the whole step gets faster, or the peak smaller (2.0: half), if it is addressed.
    """

    kind: str
    told: str
    where: tuple[str, ...]
    share: float
    resource: str
    recipe: str
    advice: str
    predicted: Quantity


@dataclass(frozen=True)
class Profile:
    """Where the time, the memory and the energy of a model go.

    Args:
        outcome: "complete", "interrupted" or "failed": what was collected until then is here all the same.
        explanation: why it is not complete; empty where it is.
        time, memory: None where the run ended before they were measured.
        ceilings: None where they were not measured.
        devices: what the cards said of themselves; empty where there is none.
        findings: the costliest first.
        command: what optimizes the same model, but for the recipe: "perfkit optimize cnn --mode training"; empty where
            the model was not named on the command line.
    """

    model: str
    framework: str
    mode: str
    device: str
    inputs: str
    environment: Environment
    outcome: str
    explanation: str
    time: Time | None
    memory: Memory | None
    ceilings: Ceilings | None
    energy: Energy | None
    devices: tuple[DeviceState, ...] = ()
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()
    command: str = ""
    created: str = ""
    perfkit_version: str = ""
    schema_version: int = field(default=SCHEMA_VERSION)

    @classmethod
    def from_json(cls, source: str | Path) -> Profile:
        """The profile that `to_json` wrote, from its path or its text.

        Raises:
            InvalidInputError: it is no profile, or one of another version.
        """
        from perfkit.profiling import _reading

        return _reading.from_json(source)

    def diff(self, after: Profile) -> ProfileDiff:
        """What changed from this profile to `after`, operation by operation.

        Raises:
            InvalidInputError: one of them has no times to compare.
        """
        from perfkit.profiling import diff

        return diff.diff(self, after)

    def to_dict(self) -> dict[str, Any]:
        """The profile as JSON-ready data; numbers that are not finite become None."""
        return plain(self)

    def to_json(self, path: str | Path | None = None) -> str:
        """The profile as canonical JSON (sorted keys); written to `path` if one is given."""
        import json

        return written(json.dumps(self.to_dict(), sort_keys=True, indent=1, allow_nan=False) + "\n", path)

    def to_html(self, path: str | Path | None = None) -> str:
        """The profile as one self-contained HTML page: no network is needed to view it."""
        from perfkit.reporting import profile_html

        return written(profile_html.render(self), path)

    def to_trace(self, path: str | Path | None = None) -> str:
        """The profiled step as a Chrome trace, which ui.perfetto.dev and chrome://tracing open."""
        from perfkit.profiling import trace

        return written(trace.render(self), path)

    def __rich__(self):
        from perfkit.reporting import profile_terminal

        return profile_terminal.render(self)

    def __str__(self) -> str:
        from perfkit.reporting import profile_terminal

        return profile_terminal.plain(self)

    def _repr_html_(self) -> str:
        from perfkit.reporting import profile_html

        return profile_html.embedded(self)
