"""Where the memory of a JAX model's step goes: XLA's plan of every buffer, and what the process really holds."""

from __future__ import annotations

import gc
import itertools
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from perfkit._quantity import Quantity
from perfkit._workload import Workload
from perfkit.backends.adapter import Finished
from perfkit.measure import memory
from perfkit.profiling import jax_program_memory, jax_results_memory
from perfkit.profiling._memory_data import Memory, MemoryPoint
from perfkit.profiling.jax_held import Moment
from perfkit.profiling.jax_run import marking

GROWTH_STEPS = 4
LARGEST = 30
MOST_POINTS = 400


def collected(work: Workload, finished: Finished) -> Memory:
    """What a step's program holds by category and module, and what of it stays.

    Args:
        work: holds a copy of the caller's model.
        finished: it as it was timed; its state is as before when this returns or raises.
    """
    with marking(work) as run:
        if run.compiled is None:
            moments, peak, program = jax_results_memory.moments(run)
        else:
            moments, peak, program = jax_program_memory.moments(run)
    at_peak = next(moment for moment in moments if moment.peak)
    call = work.backend.caller(work, finished)
    with finished.keeping_state():
        growth = _growth(call)
        high_water = memory.process_high_water(call)
        arrays = sum(array.nbytes for array in jax.live_arrays())
        heap = memory.native_heap(arrays if work.device == "cpu" else 0)
        card = _card(work.device)
    return Memory(
        peak=peak,
        by_category=_categories(at_peak),
        by_module=_sums((held.module, held.bytes) for held in at_peak.held if held.category == "activations"),
        timeline=_timeline(moments),
        largest=tuple(sorted(at_peak.held, key=lambda held: -held.bytes)[:LARGEST]),
        growth=growth,
        process_high_water=high_water,
        native_heap=heap,
        reserved=card["reserved"],
        device_used=card["device_used"],
        fragmentation=card["fragmentation"],
        program=program,
    )


def snapshot(work: Workload, finished: Finished, path: Path) -> None:
    """Write what is held after a step, by the line of Python that made it, as a file for `go tool pprof`."""
    call = work.backend.caller(work, finished)
    with finished.keeping_state():
        call()
        jax.profiler.save_device_memory_profile(str(path))


def _sums(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, size in pairs:
        found[name] = found.get(name, 0.0) + size
    return dict(sorted(((name, size) for name, size in found.items() if size), key=lambda each: -each[1]))


def _categories(moment: Moment) -> dict[str, float]:
    return _sums((held.category, held.bytes) for held in moment.held)


def _timeline(moments: list[Moment]) -> tuple[MemoryPoint, ...]:
    step = max(1, -(-len(moments) // MOST_POINTS))
    kept = [moment for index, moment in enumerate(moments) if index % step == 0 or moment.peak]
    return tuple(MemoryPoint(moment.at_ms, _categories(moment)) for moment in kept)


def _growth(call: Any) -> Quantity:
    """What a step leaves behind, in arrays of the whole process."""
    call()
    left = []
    for _ in range(GROWTH_STEPS):
        call()
        gc.collect()
        left.append(sum(array.nbytes for array in jax.live_arrays()))
    growth = statistics.median(after - before for before, after in itertools.pairwise(left))
    return Quantity(float(growth), "B", method=f"jax.live_arrays after each of {GROWTH_STEPS} steps: median difference")


def _card(device: str) -> dict[str, Quantity]:
    """What XLA's allocator holds of a card; it takes most of it at once unless XLA_PYTHON_CLIENT_PREALLOCATE=false."""
    told = jax.local_devices(backend=device)[0].memory_stats()
    if not told:
        why = f"device {device!r} keeps no statistics of its memory"
        return {
            "reserved": Quantity.missing("B", why),
            "device_used": Quantity.missing("B", why),
            "fragmentation": Quantity.missing("ratio", why),
        }
    pool, peak = float(told.get("pool_bytes") or told.get("bytes_reserved") or 0), float(told["peak_bytes_in_use"])
    nothing = "XLA's allocator does not tell how much it took"
    return {
        "reserved": Quantity(pool, "B", method="XLA's pool on the device") if pool else Quantity.missing("B", nothing),
        "device_used": Quantity(
            peak, "B", method="peak_bytes_in_use of this process' device, since it began: it cannot be reset"
        ),
        "fragmentation": Quantity(1 - peak / pool, "ratio", method="1 - peak in use / XLA's pool")
        if pool
        else Quantity.missing("ratio", nothing),
    }
