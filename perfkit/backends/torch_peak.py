"""The high-water mark of tensor memory during one call: by CUDA's allocator, on CPU by torch's profiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from perfkit._quantity import Quantity
from perfkit.backends.torch_profiler import profiled
from perfkit.kernels._torch import counting_allocations


def peak_during(call: Callable[[], Any], device: str) -> Quantity:
    """Bytes above what was held before the call."""
    return _cuda_peak(call) if device == "cuda" else _profiled_peak(call, device)


def _cuda_peak(call: Callable[[], Any]) -> Quantity:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    call()
    peak = torch.cuda.max_memory_allocated() - held
    return Quantity(peak, "B", method="CUDA allocator: peak during one call above what was held before it")


def _profiled_peak(call: Callable[[], Any], device: str) -> Quantity:
    if device != "cpu":
        return Quantity.missing("B", f"no tensor memory accounting for device {device!r}")
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with profiled(activities=cpu, profile_memory=True) as profile, counting_allocations():
        kept = call()  # noqa: F841 - the outputs count until the profile ends
    try:
        events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
        changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    except AttributeError as error:
        return Quantity.missing("B", f"this torch's profiler does not tell allocations ({error})")
    if not changes:
        return Quantity.missing("B", "torch's profiler recorded no allocation")
    return Quantity(
        float(np.cumsum(changes).max(initial=0)),
        "B",
        method="torch.profiler allocations: peak during one call above what was held before it",
    )
