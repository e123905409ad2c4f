"""What a profile holds of a step's memory, in bytes, as plain data: what is held when, and at the peak."""

from __future__ import annotations

from dataclasses import dataclass, field

from perfkit._quantity import Quantity

CATEGORIES = ("parameters", "gradients", "optimizer state", "inputs", "activations", "temporaries", "other")


@dataclass(frozen=True)
class MemoryPoint:
    """Bytes held at one moment of a step, by category."""

    at_ms: float
    bytes_by_category: dict[str, float]


@dataclass(frozen=True)
class Allocation:
    """A piece of memory that was held at the peak.

    Args:
        category: one of `CATEGORIES`.
        module: whose; "" where unknown.
        op: the operation that allocated it.
        born_ms: when; negative for before the step.
        freed_ms: when it was freed; None where it outlived the step.
    """

    bytes: float
    category: str
    module: str = ""
    op: str = ""
    shape: str = ""
    born_ms: float = -1.0
    freed_ms: float | None = None


@dataclass(frozen=True)
class Memory:
    """Where the memory of a step goes.

    Args:
        peak: most tensor memory held at once, what was held before the step included.
        by_category: what is held at that moment; adds up to `peak`.
        by_module: activations held at that moment, by the module that made them.
        timeline: the step, point by point; thinned to at most some hundreds.
        largest: at the peak, largest first.
        growth: bytes that each further step leaves behind: a leak where it is not 0.
        process_high_water: how far the resident memory of the process rises during a step.
        native_heap: what the C library's allocator holds in use, above the tensors.
        reserved: held by the framework's caching allocator (CUDA).
        device_used: of the card, by everything (NVML).
        fragmentation: share of `reserved` that is not allocated at the peak.
        program: of the step as a whole, by name. JAX: what the compiler says, "temp", "arguments", "output", "alias".
            PyTorch on a CPU: "anew", the pages that a step touches for the first time, counted, where those it frees
            go back to the system.
    """

    peak: Quantity
    by_category: dict[str, float]
    by_module: dict[str, float]
    timeline: tuple[MemoryPoint, ...]
    largest: tuple[Allocation, ...]
    growth: Quantity
    process_high_water: Quantity
    native_heap: Quantity
    reserved: Quantity
    device_used: Quantity
    fragmentation: Quantity
    program: dict[str, float] = field(default_factory=dict)
