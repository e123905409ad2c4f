"""The rows of a profile's tables, as words and numbers ready to lay out: operations, modules, memory, methods.

Nothing here is escaped or shortened: each renderer does that in its own way, at its own edge.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from perfkit._quantity import Quantity
from perfkit.profiling import _views, roofline
from perfkit.profiling._memory_data import CATEGORIES, Memory
from perfkit.profiling._profile import DeviceState, Profile
from perfkit.profiling._time_data import PHASES, Module, Op
from perfkit.reporting import _profile_facts
from perfkit.reporting._format import (
    format_bytes,
    format_count,
    format_ms,
    format_number,
    format_quantity,
    listing,
)


@dataclass(frozen=True)
class OpFacts:
    """One operation in words, with the numbers that a table is sorted by.

    Args:
        share: of the step.
        rate: GFLOP/s; empty where it does no arithmetic that is counted.
        bound: the roof that it stands under and how much of it is reached, "memory 88%"; empty where not known.
        reached: the same share as a number.
    """

    op: Op
    ms: str
    calls: str
    share: float
    rate: str
    bound: str
    reached: float


@dataclass(frozen=True)
class ModuleFacts:
    """One module in words, with the numbers that a table is sorted by."""

    module: Module
    path: str
    share: float
    self_share: float


def op_facts(profile: Profile) -> tuple[OpFacts, ...]:
    """Every operation, longest first; on a device its kernels in place of the host's operations."""
    if profile.time is None:
        return ()
    found = []
    for op in _views.hottest(profile.time):
        place = roofline.place(op, profile.ceilings) if profile.ceilings else None
        bound = f"{place.bound} {place.share:.0%}" if place else ""
        rate = format_number(op.flops / op.self_ms / 1e6) if op.flops and op.self_ms else ""
        share = _views.share(op.self_ms, profile.time)
        calls = format_count(op.calls) if op.calls == round(op.calls) else format_number(op.calls)
        found.append(OpFacts(op, format_ms(op.self_ms), calls, share, rate, bound, place.share if place else 0.0))
    return tuple(found)


def module_facts(profile: Profile) -> tuple[ModuleFacts, ...]:
    """Every module, in the order of the model."""
    if (time := profile.time) is None:
        return ()
    return tuple(
        ModuleFacts(
            module,
            module.path or f"{module.kind} (whole model)",
            _views.share(module.forward_ms + module.backward_ms, time),
            _views.share(module.self_ms, time),
        )
        for module in time.modules
    )


def phase_rows(profile: Profile) -> tuple[tuple[str, str, float], ...]:
    """Phase, time and share, in the order in which they happen."""
    if profile.time is None:
        return ()
    phases = profile.time.phases_ms
    total = sum(phases.values())
    ordered = [*(name for name in PHASES if name in phases), *(name for name in phases if name not in PHASES)]
    return tuple((name, format_ms(phases[name]), phases[name] / total if total else 0.0) for name in ordered)


def category_rows(memory: Memory) -> tuple[tuple[str, str, float], ...]:
    """Category, bytes and share of the peak, in the fixed order of categories."""
    total = sum(memory.by_category.values())
    return tuple(
        (name, format_bytes(memory.by_category[name]), memory.by_category[name] / total)
        for name in categories(memory)
        if total and memory.by_category.get(name)
    )


def categories(memory: Memory) -> list[str]:
    """The categories that anything is held in at any time, in their fixed order; unknown ones last."""
    held = {name for point in memory.timeline for name, value in point.bytes_by_category.items() if value}
    held |= {name for name, value in memory.by_category.items() if value}
    return [*(name for name in CATEGORIES if name in held), *sorted(held - set(CATEGORIES))]


def by_module(memory: Memory) -> str:
    """Which modules' activations are held at the peak, the largest first."""
    ranked = sorted(memory.by_module.items(), key=lambda item: -item[1])
    return listing((f"{path or 'outside of modules'} {format_bytes(size)}" for path, size in ranked if size), 6)


def memory_pairs(memory: Memory) -> Iterator[tuple[str, Quantity]]:
    """The sizes beside the peak."""
    yield "growth per step", memory.growth
    yield "process high-water", memory.process_high_water
    yield "native heap above tensors", memory.native_heap
    yield "reserved by the allocator", memory.reserved
    yield "fragmentation", memory.fragmentation
    yield "device memory used", memory.device_used
    for name, value in sorted(memory.program.items()):
        yield f"compiled program: {name}", Quantity(value, "B")


def quantities(profile: Profile) -> Iterator[tuple[str, Quantity]]:
    """Every number that may be unavailable, with its label."""
    if (time := profile.time) is not None:
        yield "p90", time.step.p90_ms
        yield "p99", time.step.p99_ms
        yield "first call", time.first_call_s
        yield "compilation", time.compile_s
        yield "device busy", time.busy
        yield "host waiting", time.waiting
        yield "attributed to operations", time.attributed
        yield "profiler's overhead", time.overhead
        yield "arithmetic", time.flops
        yield "utilization", time.utilization
    if (memory := profile.memory) is not None:
        yield "peak memory", memory.peak
        yield from memory_pairs(memory)
    if (energy := profile.energy) is not None:
        yield f"energy per {_profile_facts.per(profile)}", energy.step_j
        yield "power", energy.mean_w
        yield "idle power", energy.idle_w
    if profile.ceilings is not None:
        for name, roof in profile.ceilings.gflops.items():
            yield f"{name} ceiling", roof
        yield "bandwidth ceiling", profile.ceilings.bandwidth_gb_s


def missing(profile: Profile) -> tuple[tuple[str, str], ...]:
    """What could not be measured and why; numbers with the same reason stand together."""
    reasons: dict[str, list[str]] = {}
    for label, quantity in quantities(profile):
        if quantity.value is None:
            reasons.setdefault(quantity.unavailable, []).append(label)
    return tuple((", ".join(labels), reason) for reason, labels in reasons.items())


def methods(profile: Profile) -> tuple[tuple[str, str], ...]:
    """How each number was measured, where it says."""
    found = {label: quantity.method for label, quantity in quantities(profile) if quantity.method}
    return tuple(found.items())


def overhead(profile: Profile) -> str:
    """What profiling costs, in a sentence."""
    if profile.time is None:
        return ""
    value = profile.time.overhead.value
    if value is None:
        return f"The profiler's own cost is not known: {profile.time.overhead.unavailable}."
    return (
        f"A profiled {_profile_facts.per(profile)} takes {format_number(value)} times as long as one that is not; "
        "the headline is timed without the profiler."
    )


def reading_rows(device: DeviceState) -> tuple[tuple[str, str], ...]:
    """What a device said of itself; where it said nothing, why."""
    return tuple(
        (name, value.unavailable if value.value is None else format_quantity(value))
        for name, value in device.readings.items()
    )


def parameters(count: int) -> str:
    """A number of parameters: `692,352`, `1.2 M` beyond a million."""
    for size, unit in ((1e9, "G"), (1e6, "M")):
        if count >= size:
            return f"{format_number(count / size)} {unit}"
    return format_count(count)
