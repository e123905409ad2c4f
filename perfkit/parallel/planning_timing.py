"""Timing the parts of a step for `planning`: everything in turn, and what is short several times in a row."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from perfkit.parallel.pipeline_plan import MICRO_BATCHES
from perfkit.parallel.world import ALONE, World

FILLED_S, MOST = 0.06, 10
"""Shorter calls are made in a row until they fill this time, at most so many: one alone drowns in what wakes it up."""

LEAST_ROUNDS = 3


def needed_passes(rows: int, devices: int) -> dict[int, int]:
    """The batch sizes on one device that layouts of so many devices lead to, and how many passes it makes in a row.

    One over the data axis; in a pipeline its micro-batches, which find in the caches what the last one left there.
    """
    found = {}
    for pipeline in (parts for parts in range(2, devices + 1) if devices % parts == 0):
        micro_batches = pipeline * MICRO_BATCHES
        if rows % micro_batches == 0:
            found[rows // micro_batches] = micro_batches
    found |= {rows // parts: 1 for parts in range(1, devices + 1) if devices % parts == 0 and rows % parts == 0}
    return dict(sorted(found.items()))


def in_turn(
    calls: Mapping[Any, Callable[[], Any]],
    rounds: Iterable[int],
    world: World = ALONE,
    told: Callable[[str], Any] = str,
) -> dict[Any, list[float]]:
    """The seconds of each call, round by round, so that what else the machine does hits all alike.

    Processes meet before each, and every process makes the same calls: what is timed is how long one takes when all
    make it.

    Args:
        rounds: their numbers; `range(9)`, or `within(seconds)` in one process.
    """
    for call in calls.values():
        call()  # the first one is another's: it allocates, and compiles
    counts, times = {}, {name: [] for name in calls}
    for name, call in calls.items():
        world.barrier()
        longest_s = max(world.gather(seconds_of(call)))
        counts[name] = min(max(math.ceil(FILLED_S / longest_s), 1), MOST)
    for number in rounds:
        told(f"round {number + 1}")
        for name, call in calls.items():
            world.barrier()
            times[name].append(seconds_of(call, counts[name]))
    return times


def within(budget_s: float) -> Iterator[int]:
    """Numbers of rounds until the time is over, a few at least."""
    began = time.perf_counter()
    for number in itertools.count():
        if number >= LEAST_ROUNDS and time.perf_counter() - began > budget_s:
            return
        yield number


def seconds_of(call: Callable[[], Any], times: int = 1) -> float:
    """Of one of some calls."""
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times
