"""What a machine reaches at best: matrix products by dtype, and a stream. Measured in the framework that is profiled.

The best of many short calls is taken, in turns: whatever else runs here makes calls slower, never faster. The first
processes on a machine each measure, and the best of all is kept; then it is only read.
"""

from __future__ import annotations

import functools
import importlib
import json
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path

from perfkit._quantity import Quantity
from perfkit._showing import plain, written
from perfkit.kernels._cache import cache_folder
from perfkit.measure.environment import environment
from perfkit.profiling._profile import Ceilings
from perfkit.profiling._time_data import Op
from perfkit.profiling.roofline import exceeded, placed

DTYPES = ("float32", "bfloat16", "float16", "int8")
BUDGET_S = 1.0
LEAST_CALLS = 3
PROCESSES = 5
"""So many measure; the moment that one of them had may have been a bad one."""
FLOAT16 = ("avx512_fp16", "amx_fp16", "fphp")
"""A processor without any of these computes float16 by way of float32, an element at a time."""
STREAM_BYTES = 96 * 2**20
"""Of the three arrays together at least; four times the last cache where that is more, up to 1 GiB."""

Call = Callable[[], object]


class Unsupported(Exception):
    """No kernel for this product here; the message says why."""


class Bench(ABC):
    """What a framework is made to compute.

    Args:
        sizes: sides of the square matrices, the smallest first.
    """

    sizes: tuple[int, ...]

    @abstractmethod
    def product(self, dtype: str, size: int) -> Call:
        """A call that multiplies two matrices and is done when it returns. Raises `Unsupported`."""

    @abstractmethod
    def triad(self, elements: int) -> Call:
        """A call that writes a = b + s·c over arrays of so many float32 and is done when it returns."""

    @abstractmethod
    def name(self) -> str:
        """What it runs on, as its maker calls it."""

    def cache_bytes(self) -> int:
        """The size of the last cache; 0 where it is not known."""
        return 0


@functools.cache
def measured(framework: str, device: str) -> Ceilings:
    """The ceilings of this machine, in about a second, or at once where processes before this one measured them.

    Args:
        framework: "torch" or "jax".
        device: as a workload names it: "cpu", "cuda", …

    Example:
        >>> measured("torch", "cpu").gflops["float32"].value
        154.2
    """
    bench = _bench(framework, device)
    path = _file(framework, bench.name())
    kept, times = _read(path)
    return kept if kept is not None and times >= PROCESSES else _raised(bench, path)


def above(ops: Iterable[Op], framework: str, device: str) -> Ceilings:
    """The ceilings, measured once more where an operation of a profile computes faster than they say."""
    found = measured(framework, device)
    return remeasured(framework, device) if exceeded(placed(ops, found), found) else found


def remeasured(framework: str, device: str) -> Ceilings:
    """Measured once more, for who saw something faster than the ceilings."""
    bench = _bench(framework, device)
    measured.cache_clear()
    return _raised(bench, _file(framework, bench.name()))


def _raised(bench: Bench, path: Path) -> Ceilings:
    kept, times = _read(path)
    found = now(bench)
    if kept is not None:
        found = highest(kept, found)
    _write(path, found, times + 1)
    return found


def now(bench: Bench, budget_s: float = BUDGET_S, clock: Callable[[], float] = time.perf_counter) -> Ceilings:
    """Every ceiling, as it is at this moment."""
    calls: dict[tuple[str, int], Call] = {}
    refused = {}
    for dtype in DTYPES:
        try:
            calls |= {(dtype, size): bench.product(dtype, size) for size in bench.sizes}
        except Unsupported as reason:
            refused[dtype] = str(reason)
    elements = min(max(STREAM_BYTES, 4 * bench.cache_bytes()), 2**30) // 12
    calls["triad", elements] = bench.triad(elements)
    shortest_s = _shortest(calls, budget_s, clock)
    gflops = {}
    for dtype in DTYPES:
        reached = [(2 * size**3 / shortest_s[dtype, size] / 1e9, size) for size in bench.sizes if dtype not in refused]
        gflops[dtype] = (
            Quantity(max(reached)[0], "GFLOP/s", method="{0} × {0} product, best call".format(max(reached)[1]))
            if reached
            else Quantity.missing("GFLOP/s", refused[dtype])
        )
    method = f"triad over {12 * elements / 2**20:.0f} MiB, two reads and a write, best call"
    return Ceilings(gflops, Quantity(12 * elements / shortest_s["triad", elements] / 1e9, "GB/s", method=method))


def _shortest(
    calls: dict[tuple[str, int], Call], budget_s: float, clock: Callable[[], float]
) -> dict[tuple[str, int], float]:
    """Each call's shortest time, in seconds.

    All have the same share of the time and take turns, so that a bad moment is not one call's alone, and short calls,
    which find quiet moments on a busy machine, are many.
    """
    for call in calls.values():
        call()  # sets up
    found = dict.fromkeys(calls, float("inf"))
    spent, done = dict.fromkeys(calls, 0.0), dict.fromkeys(calls, 0)
    end = clock() + budget_s
    while clock() < end or min(done.values()) < LEAST_CALLS:
        key = min(calls, key=lambda key: spent[key] if done[key] >= LEAST_CALLS else -1.0)
        start = clock()
        calls[key]()
        seconds = clock() - start
        found[key], spent[key], done[key] = min(found[key], seconds), spent[key] + seconds, done[key] + 1
    return found


def highest(one: Ceilings, other: Ceilings) -> Ceilings:
    """Of two measurements of one machine, the higher one of each."""
    gflops = {dtype: _higher(one.gflops[dtype], other.gflops[dtype]) for dtype in one.gflops}
    return Ceilings(gflops, _higher(one.bandwidth_gb_s, other.bandwidth_gb_s))


def _higher(one: Quantity, other: Quantity) -> Quantity:
    return max(one, other, key=lambda told: -1.0 if told.value is None else told.value)


def last_cache_bytes(root: str | Path = "/sys/devices/system/cpu/cpu0/cache") -> int:
    """The processor's largest cache, as Linux tells it; 0 where it does not."""
    units = {"K": 2**10, "M": 2**20}
    found = [0]
    for path in Path(root).glob("index*/size"):
        try:
            text = path.read_text().strip()
            found.append(int(text[:-1]) * units[text[-1]])
        except (OSError, ValueError, KeyError, IndexError):
            continue
    return max(found)


def float16_missing(instructions: tuple[str, ...]) -> str:
    """Why float16 is not computed as such by a processor; empty where it is."""
    return "" if set(instructions) & set(FLOAT16) else "this processor has no float16 arithmetic"


def _bench(framework: str, device: str) -> Bench:
    return importlib.import_module(f"perfkit.profiling.{framework}_ceilings").bench(device)


def _file(framework: str, name: str) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return cache_folder("ceilings") / f"{framework}-{slug}-{environment().fingerprint}.json"


def _read(path: Path) -> tuple[Ceilings | None, int]:
    """What is kept, and how often it was measured; nothing where nothing can be read."""
    try:
        kept = json.loads(path.read_text())
        gflops = {dtype: Quantity(**kept["gflops"][dtype]) for dtype in DTYPES}
        return Ceilings(gflops, Quantity(**kept["bandwidth_gb_s"])), int(kept["times"])
    except (OSError, ValueError, KeyError, TypeError):
        return None, 0


def _write(path: Path, found: Ceilings, times: int) -> None:
    """Keep it where the folder can be written; elsewhere every process measures."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        written(json.dumps(plain(found) | {"times": times}, sort_keys=True), path)
    except OSError:
        return
