"""Where the memory of a torch model's step goes: from every allocation of it, on the processor and on a card alike."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from perfkit._quantity import Quantity
from perfkit._workload import Workload
from perfkit.backends.adapter import Finished
from perfkit.measure import kept_memory, memory
from perfkit.profiling import torch_snapshot
from perfkit.profiling._memory_data import Allocation, Memory, MemoryPoint
from perfkit.profiling.torch_trace import BEFORE, Block, Trace, held, traced

STEPS = 5
"""One in which things settle, the one that is shown, and three to see whether something is left behind."""

SHOWN = 1
LARGEST = 30
MOST_POINTS = 400


def collected(work: Workload, finished: Finished) -> Memory:
    """Follow the allocations of a few steps; then measure what the process and the card hold, in steps of their own.

    Args:
        work: holds a copy of the caller's model; its state is as before when this returns or raises.
    """
    if work.device not in ("cpu", "cuda"):
        return _unknown(f"no allocations are told of device {work.device!r}")
    trace = traced(work, finished, STEPS)
    start, end = trace.steps[SHOWN]
    moments = list(_moments(trace, start, end))
    at_peak = max(moments, key=lambda moment: moment[1].total())[0]
    living = [block for block in trace.blocks if block.lives_at(at_peak)]
    categories: Counter[str] = Counter()
    made_by: Counter[str] = Counter()
    for block in living:
        categories[block.category] += block.bytes
        if block.category == "activations":
            made_by[block.module] += block.bytes
    call = work.backend.caller(work, finished)
    with finished.keeping_state():
        high_water = memory.process_high_water(call)
        own = sum(thing.bytes for thing in held(work).values()) if work.device == "cpu" else 0
        heap = memory.native_heap(own)
        card = _card(call, work.device)
        counted = work.device == "cpu" and work.world.alone and not kept_memory.settled()
        program = {"anew": float(kept_memory.touched_anew(call))} if counted else {}
    return Memory(
        peak=Quantity(float(sum(categories.values())), "B", method=_method(work.device, card)),
        by_category={name: float(size) for name, size in categories.items()},
        by_module={path: float(size) for path, size in made_by.most_common()},
        timeline=_timeline(moments, at_peak, start),
        largest=tuple(_allocation(block, start) for block in _largest(living)),
        growth=_growth(trace),
        process_high_water=high_water,
        native_heap=heap,
        reserved=card["reserved"],
        device_used=card["device_used"],
        fragmentation=card["fragmentation"],
        program=program,
    )


def _unknown(reason: str) -> Memory:
    missing = Quantity.missing("B", reason)
    return Memory(
        peak=missing,
        by_category={},
        by_module={},
        timeline=(),
        largest=(),
        growth=missing,
        process_high_water=missing,
        native_heap=missing,
        reserved=missing,
        device_used=missing,
        fragmentation=Quantity.missing("ratio", reason),
    )


def snapshot(work: Workload, finished: Finished, path: Path) -> None:
    """Write the allocations of a step as a file that pytorch.org/memory_viz opens."""
    torch_snapshot.write(work, finished, path)


def _moments(trace: Trace, start: int, end: int) -> Iterator[tuple[int, Counter[str]]]:
    """Bytes by category at the start of a step and after each change in it."""
    changes = []
    now: Counter[str] = Counter()
    for block in trace.blocks:
        if block.lives_at(start):
            now[block.category] += block.bytes
        elif start < block.born_ns <= end:
            changes.append((block.born_ns, 1, block))
        if block.freed_ns is not None and start < block.freed_ns <= end:
            changes.append((block.freed_ns, 0, block))
    yield start, now.copy()
    for at, grows, block in sorted(changes, key=lambda change: change[:2]):
        now[block.category] += block.bytes if grows else -block.bytes
        yield at, now.copy()


def _timeline(moments: list[tuple[int, Counter[str]]], at_peak: int, start: int) -> tuple[MemoryPoint, ...]:
    step = max(1, -(-len(moments) // MOST_POINTS))
    kept = [moment for index, moment in enumerate(moments) if index % step == 0 or moment[0] == at_peak]
    return tuple(
        MemoryPoint((at - start) / 1e6, {name: float(size) for name, size in now.items() if size}) for at, now in kept
    )


def _largest(living: list[Block]) -> list[Block]:
    return sorted(living, key=lambda block: block.bytes, reverse=True)[:LARGEST]


def _allocation(block: Block, start: int) -> Allocation:
    return Allocation(
        bytes=float(block.bytes),
        category=block.category,
        module=block.module,
        op=block.op,
        shape=block.shape,
        born_ms=-1.0 if block.born_ns == BEFORE else (block.born_ns - start) / 1e6,
        freed_ms=None if block.freed_ns is None else (block.freed_ns - start) / 1e6,
    )


def _growth(trace: Trace) -> Quantity:
    left = [sum(block.bytes for block in trace.blocks if block.lives_at(end)) for _, end in trace.steps[SHOWN:]]
    growth = statistics.median(after - before for before, after in itertools.pairwise(left))
    return Quantity(float(growth), "B", method=f"tensors held after each of {len(left)} steps: median difference")


def _method(device: str, card: dict[str, Quantity]) -> str:
    told = "allocations told by torch's profiler, and what was held before"
    allocated = card["allocated"].value
    return told if device != "cuda" or allocated is None else f"{told}; the CUDA allocator: {allocated:.0f} B"


def _card(call: Callable[[], Any], device: str) -> dict[str, Quantity]:
    """What the caching allocator and the card hold, in a step without profilers."""
    names = {"allocated": "B", "reserved": "B", "device_used": "B", "fragmentation": "ratio"}
    if device != "cuda":
        return {
            name: Quantity.missing(unit, f"device {device!r} has no caching allocator") for name, unit in names.items()
        }
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    call()
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    free, total = torch.cuda.mem_get_info()
    return {
        "allocated": Quantity(float(allocated), "B", method="torch.cuda.max_memory_allocated, all of the process"),
        "reserved": Quantity(float(reserved), "B", method="torch.cuda.max_memory_reserved, after emptying the cache"),
        "device_used": Quantity(float(total - free), "B", method="cudaMemGetInfo: by all processes"),
        "fragmentation": Quantity(
            1 - allocated / max(reserved, 1), "ratio", method="1 - peak allocated / peak reserved"
        ),
    }
