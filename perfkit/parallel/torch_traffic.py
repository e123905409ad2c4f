"""What a torch process exchanges with others in one call, told by torch's profiler."""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from perfkit._quantity import Quantity
from perfkit.backends.adapter import Traffic
from perfkit.backends.torch_profiler import profiled

_OPERATION = re.compile(r"(?:gloo|nccl|xccl|mpi|ucc):(\w+)(?: .*)?")
_BYTES = {"float": 4, "double": 8, "c10::BFloat16": 2, "c10::Half": 2, "long int": 8, "int": 4, "bool": 1}
"""By the profiler's names of dtypes; of others a byte each."""


def traffic(call: Callable[[], Any], steps: int = 1) -> Traffic:
    """The collective operations and sends of one call of so many steps, prepared before, for one step.

    Every process must make the call. The backend's own events are counted (gloo builds a reduce-scatter of an
    all-reduce, say), each from when it was asked for until it was done, the waiting for others included; what is
    received from one process is counted as sent there.
    """
    with profiled(record_shapes=True) as profile:
        began = time.perf_counter_ns()
        call()
        took = time.perf_counter_ns() - began
    events = [(_OPERATION.fullmatch(event.name()), event) for event in profile.profiler.kineto_results.events()]
    found = [(match[1], event) for match, event in events if match]
    if not found:
        reason = "torch's profiler saw no collective operation"
        return Traffic(Quantity.missing("B", reason), Quantity.missing("ratio", reason))
    sent = [(kind, event) for kind, event in found if kind != "recv"]
    told = ", ".join(f"{count} × {kind}" for kind, count in Counter(kind for kind, _ in sent).items())
    over = f" in {steps} steps" if steps > 1 else ""
    spans = [(event.start_ns(), event.start_ns() + event.duration_ns()) for _, event in found]
    size = sum(_size(event) for _, event in sent) / steps
    return Traffic(
        Quantity(size, "B", method=f"handed to {told}{over}, by torch's profiler"),
        Quantity(min(covered(spans) / took, 1.0), "ratio", method="time under way, of a step under torch's profiler"),
    )


def _size(event: Any) -> int:
    pairs = zip(event.shapes(), event.dtypes(), strict=False)
    return sum(math.prod(shape) * _BYTES.get(dtype, 1) for shape, dtype in pairs if dtype)


def covered(spans: Iterable[tuple[int, int]]) -> int:
    """The length of the union of intervals."""
    total, reached = 0, None
    for start, end in sorted(spans):
        start = start if reached is None else max(start, reached)
        total += max(end - start, 0)
        reached = end if reached is None else max(end, reached)
    return total
