"""Advice on what a compiler takes away: gaps, small operations, trips through memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from perfkit._quantity import Quantity
from perfkit.profiling._profile import Finding
from perfkit.profiling._time_data import Op
from perfkit.profiling.facts import Facts, is_host, names
from perfkit.reporting._format import format_bytes, format_percent

IDLE = 0.2
"""Gaps between a device's kernels that are worth a graph."""
LEAST_SHARE = 0.2
FUSED = 6.0
"""Elementwise work and pools get so many times faster within their neighbours: what fits the
reference CNN, whose whole call got 2.4 and 2.6 times faster (bench/results, batch 64 and 512)."""
STARTING = {"torch": 5.0, "jax": 50.0}
"""Starting operations one by one, Python included, against starting the compiled program."""
CALLING_MS = {"torch": 0.15, "jax": 0.1}
"""What the compiled program looks at on each call, before it does anything, and starting it."""


def launch_bound(facts: Facts) -> Iterator[Finding]:
    """The device waits between kernels for the host to start the next."""
    time = facts.profile.time
    if not facts.on_device or time is None or time.busy.value is None or not facts.by_operation:
        return
    idle = 1 - time.busy.value
    if idle < IDLE:
        return
    torch = facts.profile.framework == "torch"
    kernels = sum(op.calls for op in facts.ops)
    yield Finding(
        kind="launch-bound",
        told=f"the device is idle for {format_percent(idle)} of the step, between {kernels:.0f} kernels "
        f"of {1e3 * time.busy.value * facts.step_ms / max(kernels, 1):.0f} µs on average",
        where=(),
        share=idle,
        resource="time",
        recipe="compile(mode='reduce-overhead')" if torch else "compile",
        advice="start the whole step at once, as a CUDA graph" if torch else "compile the step into one program",
        predicted=_predicted(facts, idle),
    )


def by_operation(facts: Facts) -> Iterator[Finding]:
    """On a processor: starting operations one by one, and taking what is between them through memory."""
    time = facts.profile.time
    if facts.on_device or time is None or not facts.by_operation or _slower_compiled(facts):
        return
    small, moving = facts.share(_small(facts)) + facts.outside, facts.share(_moving(facts))
    if small + moving < LEAST_SHARE:
        return
    yield _starting(facts, small) if small >= moving else _through_memory(facts, moving)


def _starting(facts: Facts, share: float) -> Finding:
    small = _small(facts)
    return Finding(
        kind="small operations",
        told=f"{format_percent(share)} of the step goes into Python and into starting "
        f"{sum(op.calls for op in small):.0f} small operations",
        where=names(op for op in small if not is_host(op))[:5],
        share=share,
        resource="time",
        recipe="compile",
        advice="compile the model into one program",
        predicted=_predicted(facts, share),
    )


def _through_memory(facts: Facts, share: float) -> Finding:
    moving = _moving(facts)
    return Finding(
        kind="unfused operations",
        told=f"{sum(op.calls for op in moving):.0f} elementwise operations and pools move "
        f"{format_bytes(sum(op.moved_bytes for op in moving))} through memory: {format_percent(share)} of the step",
        where=names(moving)[:5],
        share=share,
        resource="time",
        recipe="compile",
        advice="let the compiler write them into the operations before and behind them",
        predicted=_predicted(facts, share),
    )


def _predicted(facts: Facts, share: float) -> Quantity:
    if facts.as_one is not None:
        return Quantity(1 / facts.as_one, "ratio", method=timed_as_one(facts))
    method = f"Amdahl: {share:.0%} of the step; {compiled_how(facts)}"
    return Quantity(1 / after_compiling(facts), "ratio", method=method)


def compiled_how(facts: Facts) -> str:
    """What `after_compiling` assumes."""
    return f"operations started {STARTING[facts.profile.framework]:g} times cheaper, elementwise work {FUSED:g} times"


def timed_as_one(facts: Facts) -> str:
    """What the step's length as one program rests on."""
    as_one = facts.profile.time.as_one
    return f"timed by itself: as one program the step takes {as_one.median_ms:.3g} ms"


def after_compiling(facts: Facts, faster: Mapping[Op, float] | None = None) -> float:
    """The part of the step's time that is left once it is compiled, where that was not timed.

    Args:
        faster: operations that get faster by something else, and by how much.
    """
    faster = faster or {}
    small, moving, starting = set(_small(facts)), set(_moving(facts)), STARTING[facts.profile.framework]
    left = facts.outside / starting
    for op in facts.ops:
        factor = faster.get(op) or (starting if op in small else FUSED if op in moving else 1.0)
        left += facts.share([op]) / factor
    return left + CALLING_MS[facts.profile.framework] / facts.profile.time.step.median_ms


def _small(facts: Facts) -> list[Op]:
    return [op for op in facts.ops if is_host(op)] + [op for op in facts.fusable if _starts(facts, op)]


def _moving(facts: Facts) -> list[Op]:
    return [op for op in facts.fusable if not _starts(facts, op)]


def _starts(facts: Facts, op: Op) -> bool:
    """Whether an operation's time is that of starting it."""
    found = facts.placed(op)
    return not op.moved_bytes or (found is not None and found.bound == "overhead")


def _slower_compiled(facts: Facts) -> bool:
    """A torch training step on a processor with pools: torch.compile's were measured to be slower, 0.6 to 0.7×."""
    pools = any("pool" in op.name for op in facts.ops)
    return facts.trains and facts.profile.framework == "torch" and pools


RULES = (launch_bound, by_operation)
