"""Questions that several readers of a profile ask: which operations cost most, and what share of a step is theirs."""

from __future__ import annotations

from dataclasses import dataclass

from perfkit.profiling._profile import Ceilings, Op, Time


def on_device(time: Time) -> bool:
    """Whether a device's kernels were recorded: the host's operations then run beside them, and are not added."""
    return any(op.kind == "kernel" for op in time.ops)


def hottest(time: Time) -> tuple[Op, ...]:
    """The operations that the step consists of, longest first: a device's kernels where there are any."""
    kind = "kernel" if on_device(time) else "op"
    return tuple(sorted((op for op in time.ops if op.kind == kind), key=lambda op: -op.self_ms))


def whole_ms(time: Time) -> float:
    """What the times of operations are parts of.

    The profiler slows the host, so the host's operations are parts of a step that it slowed; a kernel takes as long
    as it would without.
    """
    if on_device(time):
        return time.step.median_ms
    return sum(time.phases_ms.values()) or time.step.median_ms


def share(ms: float, time: Time) -> float:
    """What part of a step `ms` is, where `ms` is the time of an operation or a module."""
    whole = whole_ms(time)
    return ms / whole if whole else 0.0


@dataclass(frozen=True)
class Place:
    """Where an operation lies under the roofs.

    Args:
        intensity: FLOPs per byte that it must move.
        gflops: what it reaches.
        roof_gflops: what this machine would reach at that intensity.
        bound: "compute" or "memory": which roof is the lower one there.
    """

    intensity: float
    gflops: float
    roof_gflops: float
    bound: str

    @property
    def reached(self) -> float:
        return self.gflops / self.roof_gflops


def placed(op: Op, ceilings: Ceilings | None) -> Place | None:
    """The operation under the roofs; None where it does no arithmetic, took no time, or a roof was not measured."""
    if ceilings is None or not (op.flops > 0 and op.moved_bytes > 0 and op.self_ms > 0):
        return None
    flat, bandwidth = roof(ceilings, op), ceilings.bandwidth_gb_s.value
    if not flat or not bandwidth:
        return None
    intensity = op.flops / op.moved_bytes
    sloped = intensity * bandwidth
    return Place(intensity, op.flops / op.self_ms / 1e6, min(flat, sloped), "compute" if flat < sloped else "memory")


def roof(ceilings: Ceilings, op: Op) -> float | None:
    """The ceiling for the dtype of the operation's inputs, or float32's where there is none for it."""
    known = {name: value.value for name, value in ceilings.gflops.items() if value.value}
    return known.get(op.shapes.partition("[")[0]) or known.get("float32")
