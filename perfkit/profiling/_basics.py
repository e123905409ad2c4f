"""What is known of a step before any profiler is attached."""

from __future__ import annotations

from dataclasses import dataclass

from perfkit._quantity import Latency, Quantity
from perfkit.profiling._time_data import Time


@dataclass(frozen=True)
class Basics:
    """A step as it is without profilers, in either framework.

    Args:
        step: whole steps, timed after warm-up.
        first_call_s: the first call: compilation, lazy set-up.
        compile_s: what of it was compilation.
        recompiles: compilations after the first call.
        as_one: see `Time`.
    """

    step: Latency
    first_call_s: Quantity
    compile_s: Quantity
    recompiles: int
    as_one: Latency | None = None


def unprofiled(basics: Basics, reason: str) -> Time:
    """The time of a step of which nothing else is known, and why."""
    missing = Quantity.missing("ratio", reason)
    return Time(
        step=basics.step,
        first_call_s=basics.first_call_s,
        compile_s=basics.compile_s,
        recompiles=basics.recompiles,
        phases_ms={},
        busy=missing,
        idle_ms=(),
        waiting=missing,
        attributed=missing,
        overhead=missing,
        flops=Quantity.missing("FLOP", reason),
        utilization=missing,
        as_one=basics.as_one,
    )
