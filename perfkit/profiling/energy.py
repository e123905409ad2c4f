"""The energy of a step, from the device's own counter, over whole ticks of it, what it uses idle subtracted.

Never power limit times time. Where a device has no counter there is no number, but the reason.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from perfkit._quantity import Quantity
from perfkit.profiling import nvml, telemetry
from perfkit.profiling._profile import Energy
from perfkit.profiling.counter import Counter, NvmlCounter, Unavailable
from perfkit.profiling.nvml import Refused
from perfkit.profiling.rapl import Rapl

TICKS = 50
"""Over so many the counter's resolution is 2 %."""
PATIENCE_S = 2.0
"""A counter that has not moved for so long, and during one call, does not count."""
DISAGREE = 0.15
"""The counter and the power sensor are both told of where they differ by more."""


@dataclass(frozen=True)
class Window:
    """Energy from a tick of the counter to a later one, and how often it ticked between.

    Args:
        sensed_w: the power by another sensor, read at the ticks.
    """

    seconds: float
    joules: float
    calls: int
    ticks: int
    sensed_w: tuple[float, ...] = ()

    @property
    def watts(self) -> float:
        return self.joules / self.seconds


def measured(call: Callable[[], Any], device: str, idle_s: float = 1.0) -> Energy:
    """The energy of one call, above what the device uses idle.

    Args:
        call: one whole, synchronized step, warmed up. It is repeated for some seconds.
        device: as a workload names it.
        idle_s: how long to look at the device doing nothing, before.
    """
    try:
        with _counter(device) as counter:
            return told(counter, *windows(call, counter, idle_s))
    except Unavailable as reason:
        return missing(str(reason))


def source(device: str) -> str:
    """The counter that there is for a device, or why there is none."""
    try:
        with _counter(device) as counter:
            counter.joules()
            return counter.source
    except Unavailable as reason:
        return f"unavailable: {reason}"


def missing(reason: str) -> Energy:
    """No energy, and why."""
    step, mean, idle = (Quantity.missing(unit, reason) for unit in ("J", "W", "W"))
    return Energy(step, mean, idle, 0.0, "")


@contextmanager
def _counter(device: str) -> Iterator[Counter]:
    if device == "cpu":
        yield Rapl()
        return
    if device not in telemetry.NVIDIA:
        raise Unavailable(
            f"not supported: perfkit reads counters of NVIDIA's cards and of processors, not of a {device}"
        )
    try:
        with nvml.opened() as live:
            yield NvmlCounter(live, telemetry.own_cards(live))
    except Refused as refused:
        raise Unavailable(f"not supported: {refused}") from None


def windows(
    call: Callable[[], Any], counter: Counter, idle_s: float, clock: Callable[[], float] = time.monotonic
) -> tuple[Window, Window]:
    """The counter over some time of idleness, then over repeated calls.

    Raises:
        Unavailable: it does not move, or cannot be read.
    """
    idle = _window(lambda: time.sleep(0.001), counter, idle_s, 2, clock)
    return idle, _window(call, counter, counter.window_s, TICKS, clock)


def _window(
    call: Callable[[], Any], counter: Counter, least_s: float, ticks: int, clock: Callable[[], float]
) -> Window:
    """From a tick to a tick with nothing but calls between: the device never waits for the counter.

    Calls that are longer than a tick see it move at each: twice `least_s` are enough then.
    """
    begun_s, begun_j, _calls = _next_tick(call, counter, clock, counter.joules())
    at_s, at_j, calls, seen = begun_s, begun_j, 0, 0
    sensed: list[float] = []
    while at_s - begun_s < least_s or (seen < ticks and at_s - begun_s < 2 * least_s):
        at_s, at_j, more = _next_tick(call, counter, clock, at_j)
        calls, seen = calls + more, seen + 1
        power = counter.watts()
        sensed += [] if power is None else [power]
    return Window(at_s - begun_s, at_j - begun_j, calls, seen, tuple(sensed))


def _next_tick(
    call: Callable[[], Any], counter: Counter, clock: Callable[[], float], last_j: float
) -> tuple[float, float, int]:
    """Call until the counter has moved: when that was, what it shows, and how many calls it took."""
    start_s, calls = clock(), 0
    while True:
        call()
        calls += 1
        now_j, now_s = counter.joules(), clock()
        if now_j != last_j:
            return now_s, now_j, calls
        if now_s - start_s > PATIENCE_S:
            raise Unavailable(f"{counter.source} has not moved for {now_s - start_s:.1f} s")


def told(counter: Counter, idle: Window, busy: Window) -> Energy:
    """Both windows as what a step costs."""
    how = f"{busy.calls} steps, {busy.ticks} ticks (resolution {1 / busy.ticks:.1%}), above idle"
    step_j = (busy.joules - idle.watts * busy.seconds) / busy.calls
    step = (
        Quantity(step_j, "J", method=how)
        if step_j > 0
        else Quantity.missing("J", f"the device uses no more than idle ({busy.watts:.4g} W against {idle.watts:.4g} W)")
    )
    return Energy(step, _mean_w(busy), Quantity(idle.watts, "W", method="before"), busy.seconds, counter.source)


def _mean_w(busy: Window) -> Quantity:
    how = f"counter over {busy.seconds:.1f} s"
    if busy.sensed_w:
        sensed = statistics.fmean(busy.sensed_w)
        if abs(sensed - busy.watts) > DISAGREE * busy.watts:
            how += f"; the power sensor says {sensed:.4g} W"
    return Quantity(busy.watts, "W", method=how)
