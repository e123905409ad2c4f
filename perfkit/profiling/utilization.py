"""How much of what the machine can compute a step uses."""

from __future__ import annotations

import dataclasses
from collections import defaultdict

from perfkit._quantity import Quantity
from perfkit.profiling._profile import Ceilings
from perfkit.profiling._time_data import Time


def utilized(time: Time, ceilings: Ceilings) -> Time:
    """The same time with `utilization`: FLOPs of the model / time of an unprofiled step / ceiling.

    The ceiling is that of the dtype which most of the FLOPs are in, as the operations' inputs tell.
    """
    return dataclasses.replace(time, utilization=_utilization(time, ceilings))


def _utilization(time: Time, ceilings: Ceilings) -> Quantity:
    if not time.flops.value:
        return Quantity.missing("ratio", time.flops.unavailable or "nothing in a step counts as floating-point work")
    work: defaultdict[str, float] = defaultdict(float)
    for op in time.ops:
        work[op.shapes.partition("[")[0]] += op.flops
    dtype = max(work, key=lambda name: work[name], default="")
    dtype = dtype if work[dtype] and dtype else "float32"
    ceiling = ceilings.gflops.get(dtype)
    if ceiling is None or not ceiling.value:
        reason = ceiling.unavailable if ceiling is not None else None
        return Quantity.missing("ratio", reason or f"no ceiling was measured for {dtype}")
    reached = time.flops.value / time.step.median_ms / 1e6
    method = f"{reached:.3g} GFLOP/s at the median / {ceiling.value:.3g} GFLOP/s, the ceiling for {dtype}"
    return Quantity(reached / ceiling.value, "ratio", method=method)
