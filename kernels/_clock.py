"""How long calls take on a device: by its own events on CUDA, its cache emptied before each call; by the host's clock
elsewhere.

Source: https://developer.nvidia.com/blog/how-implement-performance-metrics-cuda-cc/
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

Call = Callable[[], Any]

LEAST_S = 0.002
"""A block of calls lasts about so long at least."""

MOST_CALLS = 100
"""Of a block."""

QUEUED_CYCLES = 2_000_000
"""About a millisecond of a GPU's clock."""


def block_ms(call: Call, calls: int, device: str, *, queued: bool = False) -> list[float]:
    """Milliseconds of each of `calls` calls, one after the other.

    On "cuda" the time between two events in the stream: what the host is late with is in it, what the device waits for
    the host at the end is not. Before each call as much is written as its second-level cache holds twice, and that is
    not timed. `call` need not wait for the device.

    Args:
        device: "cuda" of torch, or "cpu".
        queued: the device waits a millisecond before each call, in which the host has told it everything: the time is
            then the device's alone, of calls that the host is not longer at.
    """
    if device != "cuda":
        return [_host_ms(call) for _ in range(calls)]
    import torch

    cache = _cache(torch.cuda.current_device())
    events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(calls)]
    for start, end in events:
        cache.zero_()
        if queued:
            torch.cuda._sleep(QUEUED_CYCLES)
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def calls_per_block(call: Call, device: str) -> int:
    """How many calls last `LEAST_S`, by the quickest of three; at least one, at most `MOST_CALLS`."""
    quickest = max(min(block_ms(call, 3, device)) / 1e3, 1e-6)
    return max(1, min(round(LEAST_S / quickest), MOST_CALLS))


def _host_ms(call: Call) -> float:
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) / 1e6


@functools.cache
def _cache(index: int) -> Any:
    """Bytes to write over what a device's second-level cache holds."""
    import torch

    size = torch.cuda.get_device_properties(index).L2_cache_size
    return torch.empty(2 * size, dtype=torch.int8, device=f"cuda:{index}")
