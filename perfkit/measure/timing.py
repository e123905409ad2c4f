"""Timing two variants of a call interleaved in one run, and whether one of them is faster."""

from __future__ import annotations

import dataclasses
import gc
import math
import random
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from perfkit._errors import PerfkitWarning
from perfkit._quantity import Comparison, Latency, Quantity, Verdict
from perfkit.measure import statistics
from perfkit.measure._scheduler import Interruptions, waited_s
from perfkit.measure.calls import BLOCK_S, MOST_CALLS, Call, milliseconds, quickest_s, quiet_gc, timed, warm_up
from perfkit.parallel.world import ALONE, World

CONFIDENCE = 0.99

UNWARMED_S = 0.1
"""A call that lasts longer is timed as it comes: what the other side did to the caches is small against it."""

SETTLED = 0.01
"""Sampling ends before the budget does once the half-width of the ratio's interval is below this."""

SETTLED_PAIRS = 20
"""Not before so many pairs: a few that agree by luck would end it early, and on a lucky estimate."""

OVERRUN = 4.0
PATIENCE_S = 20.0
"""Up to `max(OVERRUN * budget_s, PATIENCE_S)` is spent to reach the pairs without which nothing can be said."""

CONTENDED = 0.5
"""Threads that wait for a processor for longer than this share of the time measure the scheduler, not the model.

On two cores with nothing beside them torch's waited for up to 0.05 of it, XLA's for up to 0.25.
"""


@dataclass(frozen=True)
class Paired:
    """Two variants, timed in alternating blocks.

    Args:
        original_ms, variant_ms: (pairs,), the median call of each block in ms, in the order taken; pair i is
            `original_ms[i]` with `variant_ms[i]`.
        original_samples_ms, variant_samples_ms: every timed call in ms, in the order taken.
        contaminated: how many of the blocks the operating system or the hypervisor interrupted. They are kept.
        waited: seconds that this process' threads, together, waited for a processor, per second.
        seconds: what all of it took.
        shortfall: why there are too few pairs; empty where there are enough.
    """

    original_ms: tuple[float, ...]
    variant_ms: tuple[float, ...]
    original_samples_ms: tuple[float, ...]
    variant_samples_ms: tuple[float, ...]
    contaminated: Quantity
    waited: Quantity
    seconds: float
    shortfall: str = ""


def paired(
    original: Call,
    variant: Call,
    *,
    baseline: str,
    variant_name: str,
    budget_s: float,
    seed: int = 0,
    world: World = ALONE,
    steps: int = 1,
) -> tuple[Latency, Latency, Comparison]:
    """Warm up both, time them interleaved, and return the latency of each and their comparison.

    "No significant change" becomes "too noisy" where the threads waited for a processor for more than `CONTENDED` of
    the time: a call then takes as many of the scheduler's time slices on one side as on the other, whatever it does.

    Args:
        original, variant: one whole, synchronized call each. They may be the same object.
        baseline, variant_name: their names in the report.
        budget_s: seconds for all of it; see `interleave` for when less or more is used.
        world: the processes that make the calls together. What rank 0 measured is returned on all.
        steps: how many steps one call makes: latencies are of one, on average.

    Warns:
        PerfkitWarning: calls so slow that the budget and its overrun bought too few pairs for a verdict.
    """
    for call in (original, variant):
        warm_up(call, budget_s=budget_s / 10, world=world)
    times = interleave(original, variant, budget_s=budget_s * 0.8, seed=seed, world=world)
    if times.shortfall:
        warnings.warn(times.shortfall, PerfkitWarning, stacklevel=2)
    comparison = statistics.compare(
        times.original_ms,
        times.variant_ms,
        baseline=baseline,
        variant=variant_name,
        confidence=CONFIDENCE,
        seed=seed,
    )
    waited = times.waited.value
    contended = comparison.verdict == Verdict.SAME and (waited or 0.0) > CONTENDED
    verdict = Verdict.NOISY if contended else comparison.verdict
    comparison = dataclasses.replace(comparison, verdict=verdict, waited=waited)
    before, after = (
        statistics.latency([sample / steps for sample in samples])
        for samples in (times.original_samples_ms, times.variant_samples_ms)
    )
    return world.agree((before, after, comparison))


def interleave(
    original: Call,
    variant: Call,
    *,
    budget_s: float,
    seed: int = 0,
    block_s: float = BLOCK_S,
    world: World = ALONE,
) -> Paired:
    """Time two variants in alternating blocks, so that drift and bursts of the machine hit both alike.

    Four blocks make a quadruple, ABBA or BAAB, the two kinds equally often in random order. A block is as many calls as
    last `block_s` seconds; each call is timed on its own and the block counts as its median call. Sampling ends when
    the interval of the ratio is narrower than ±1 % and p90 is supported, or when `budget_s` seconds are spent, but
    not before there are enough pairs for a verdict, unless those would cost more than `max(4 * budget_s, 20 s)`. What
    is sampled past the budget goes without the untimed calls.

    Garbage is collected between quadruples and never inside a block.

    Args:
        original, variant: one whole, synchronized call each, warmed up. What they raise ends the sampling.
        seed: of the order.
        world: the processes that make the calls together, block by block. Each times itself, rank 0 decides.
    """
    began, waited_before = time.perf_counter(), waited_s()
    sides = (original, variant)
    quickest = world.agree([quickest_s(call, world) for call in sides])
    calls = _calls_per_block(quickest, block_s)
    warms = [seconds < UNWARMED_S for seconds in quickest]
    medians: tuple[list[float], list[float]] = ([], [])
    samples: tuple[list[int], list[int]] = ([], [])
    contaminated = 0
    needed = statistics.pairs_needed(CONFIDENCE)
    enough_samples = statistics.samples_needed(90)
    next_look = max(SETTLED_PAIRS, needed)
    late = False
    patience = max(OVERRUN * budget_s, PATIENCE_S)

    with quiet_gc(), Interruptions() as interruptions:
        for order in orders(seed):
            for side in order:
                world.barrier()
                before = interruptions.count()
                times = _block(sides[side], calls, warms[side] and not late)
                contaminated += interruptions.count() != before
                samples[side].extend(times)
                medians[side].append(float(np.median(times)))
            gc.collect()
            elapsed = time.perf_counter() - began
            pairs = len(medians[0])
            done = elapsed >= budget_s and (pairs >= needed or elapsed >= patience)
            if pairs >= next_look:
                # Looking after every quadruple would find a lucky moment to stop; every fifth more pairs is enough.
                next_look = math.ceil(1.2 * pairs)
                done |= len(samples[0]) >= enough_samples and _settled(medians)
            done, late = world.agree((done, elapsed >= budget_s))
            if done:
                break
        method = interruptions.method

    return Paired(
        original_ms=milliseconds(medians[0]),
        variant_ms=milliseconds(medians[1]),
        original_samples_ms=milliseconds(samples[0]),
        variant_samples_ms=milliseconds(samples[1]),
        contaminated=_contaminated(contaminated, method),
        waited=_waited(waited_before, elapsed),
        seconds=time.perf_counter() - began,
        shortfall=_shortfall(pairs, needed, elapsed),
    )


def _block(call: Call, calls: int, warms: bool) -> list[int]:
    """Nanoseconds of each of `calls` calls.

    If `warms`, one more goes before them untimed: it finds the caches as the other side left them, which costs small
    models 5 to 10 % of a call, and a model of 2 ms after one of 40 ms as much as half.
    """
    if warms:
        call()
    return timed(call, calls)


def _calls_per_block(quickest: list[float], block_s: float) -> int:
    """How many calls make a block: the same number for both sides, or position within the block would favour one.

    So many that the faster side's block lasts `block_s` seconds, unless the slower side's would last ten times that.
    """
    quick, slow = sorted(quickest)
    return max(1, min(math.ceil(block_s / quick), int(10 * block_s / slow), MOST_CALLS))


def orders(seed: int) -> Iterator[tuple[int, int, int, int]]:
    """Quadruples of sides (0 original, 1 variant): as many ABBA as BAAB, which of two comes first drawn at random."""
    draw = random.Random(seed)
    while True:
        both = [(0, 1, 1, 0), (1, 0, 0, 1)]
        draw.shuffle(both)
        yield from both


def _settled(medians: tuple[list[float], list[float]]) -> bool:
    """Whether the interval is narrow already. The exact one: it costs microseconds where the bootstrap costs more."""
    ratios = np.log(np.maximum(medians[0], 1)) - np.log(np.maximum(medians[1], 1))
    low, high = statistics.order_statistic_interval(ratios, CONFIDENCE)
    return (high - low) / 2 < SETTLED and statistics.autocorrelation(ratios) <= statistics.AUTOCORRELATED


def _contaminated(blocks: int, method: str) -> Quantity:
    if not method:
        return Quantity.missing("blocks", "this platform counts neither context switches nor stolen time")
    return Quantity(float(blocks), "blocks", method=method)


def _waited(before: float | None, seconds: float) -> Quantity:
    after = waited_s()
    if before is None or after is None:
        return Quantity.missing(
            "ratio", "/proc/self/task/*/schedstat is not there: it needs Linux with scheduler statistics"
        )
    # Threads that ended meanwhile took their waiting with them.
    return Quantity(
        max(after - before, 0.0) / seconds, "ratio", method="run-queue time of all threads (schedstat), and stolen time"
    )


def _shortfall(pairs: int, needed: int, seconds: float) -> str:
    if pairs >= needed:
        return ""
    return (
        f"{pairs} pairs of calls took {seconds:.0f} s, and a verdict needs {needed}: "
        f"give a budget_s of {math.ceil(seconds / pairs * needed)}, or a smaller example batch"
    )
