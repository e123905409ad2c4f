"""What a profile holds of the time of a step, as plain data: operations, modules, what went on when.

Times are of one call (inference) or one training step, in milliseconds from its start.
"""

from __future__ import annotations

from dataclasses import dataclass

from perfkit._quantity import Latency, Quantity

PHASES = ("forward", "loss", "backward", "optimizer", "other")


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
        as_one: whole steps as one compiled program, timed by themselves; None where the step is one, or none was made.
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
    as_one: Latency | None = None
