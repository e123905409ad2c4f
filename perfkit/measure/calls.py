"""Timing one callable by itself: its first call, its warm-up, its quickest call, and what its calls take.

A callable makes one whole call: it returns when the result is there (synchronized), not when the work is queued.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from perfkit._quantity import Latency
from perfkit.measure import statistics
from perfkit.parallel.world import ALONE, World

Call = Callable[[], Any]

BLOCK_S = 0.002
"""A block lasts at least this long: shorter ones drown in timer ticks."""

MOST_CALLS = 1000
"""Calls per block at most: what is quicker than 2 µs is no model, and calibration may have been wrong."""

CALIBRATION_CALLS = 3
CALIBRATION_S = 0.1

ALONE_CALLS = 3
WARM_WINDOW = 5
WARM_SPREAD = 1.05


def first_call(call: Call) -> tuple[float, Any]:
    """Make the first call, compilation and lazy set-up included; return its seconds and its result."""
    start = time.perf_counter_ns()
    result = call()
    return (time.perf_counter_ns() - start) / 1e9, result


def warm_up(call: Call, *, budget_s: float, world: World = ALONE) -> int:
    """Call until the rolling median is stable or `budget_s` seconds are spent, at least twice; return how often.

    Stable: the medians of the last three windows of five calls lie within 5 % of each other.
    """
    times: list[int] = []
    clock = time.perf_counter_ns
    end = clock() + int(budget_s * 1e9)
    while True:
        start = clock()
        call()
        now = clock()
        times.append(now - start)
        if world.agree((len(times) >= 2 and now >= end) or _stable(times)):
            return len(times)


def _stable(times: list[int]) -> bool:
    if len(times) < 3 * WARM_WINDOW:
        return False
    recent = np.median(np.reshape(times[-3 * WARM_WINDOW :], (3, WARM_WINDOW)), axis=1)
    return recent.max() <= WARM_SPREAD * recent.min()


def alone(call: Call, *, budget_s: float) -> Latency:
    """Warm up and time one variant by itself, for what a step takes; to compare two there is `timing.paired`.

    Sampling ends when p99 is supported or three quarters of `budget_s` seconds are spent, but not before three calls
    are timed.
    """
    warm_up(call, budget_s=budget_s / 4)
    block = max(1, min(int(BLOCK_S / quickest_s(call)), MOST_CALLS))
    times: list[int] = []
    with quiet_gc():
        end = time.perf_counter() + 0.75 * budget_s
        while len(times) < ALONE_CALLS or (time.perf_counter() < end and len(times) < statistics.samples_needed(99)):
            times += timed(call, block)
            gc.collect()
    return statistics.latency(milliseconds(times))


def timed(call: Call, calls: int) -> list[int]:
    """Nanoseconds of each of `calls` calls. The loop holds nothing that is not needed: models can take 50 µs."""
    clock = time.perf_counter_ns
    times = [0] * calls
    for i in range(calls):
        start = clock()
        call()
        times[i] = clock() - start
    return times


def quickest_s(call: Call, world: World = ALONE) -> float:
    """Seconds of the quickest of a few calls: the others may have been interrupted."""
    times: list[int] = []
    while world.agree(len(times) < CALIBRATION_CALLS and sum(times) < CALIBRATION_S * 1e9):
        times += timed(call, 1)
    return max(min(times), 1) / 1e9


def milliseconds(nanoseconds: list[int] | list[float]) -> tuple[float, ...]:
    # A call below the timer's resolution reads 0, which has no logarithm.
    return tuple(max(value, 1) / 1e6 for value in nanoseconds)


@contextlib.contextmanager
def quiet_gc() -> Iterator[None]:
    """Collect once, then keep the collector out of the measurement; give it back as it was, also on a raise.

    Freezing makes the collections between blocks cheap: they visit only what was allocated since.
    """
    enabled = gc.isenabled()
    # What the caller froze could not be told from what is frozen here, and would be thawed with it.
    freeze = gc.get_freeze_count() == 0
    try:
        gc.collect()
        gc.disable()
        if freeze:
            gc.freeze()
        yield
    finally:
        if freeze:
            gc.unfreeze()
        if enabled:
            gc.enable()
