"""Where operations stand below the machine's roofs.

An operation of F FLOPs that moves B bytes takes at least max(F / peak, B / bandwidth). Its share of the roof is that
least time over its own. Bytes are the least that it must move, so intensities are estimates from above.

Source: Williams, Waterman, Patterson, "Roofline", CACM 52 (2009).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from perfkit.profiling._profile import Ceilings
from perfkit.profiling._time_data import Op

FAR_BELOW = 0.25
"""Below this share of its roof, an operation that is short too is bound by the overhead of starting it."""
SHORT_MS = 0.05
"""What starting an operation costs is some microseconds on a device, some tens on a host."""
NARROW = ("float32", "bfloat16", "float16", "int8")
"""Dtypes with a ceiling; products of others are held against the nearest of these."""


@dataclass(frozen=True)
class Placed:
    """An operation and its roof.

    Args:
        intensity: FLOPs per byte.
        gflops, gb_s: what it attains.
        roof_gflops: what it could attain at its intensity.
        least_ms: the least time, per step, by both roofs.
        share: `least_ms` over its own time; above 1 where its data stays in caches.
        bound: "compute" or "memory" by the roof that it stands under, "overhead" where it is far below and short.
    """

    op: Op
    dtype: str
    intensity: float
    gflops: float
    gb_s: float
    roof_gflops: float
    least_ms: float
    share: float
    bound: str


def placed(ops: Iterable[Op], ceilings: Ceilings) -> tuple[Placed, ...]:
    """Every operation that can be placed, those with the most time first.

    Left out: those whose bytes and FLOPs are not known, or whose dtype and bandwidth have no ceiling.
    """
    found = [place(op, ceilings) for op in sorted(ops, key=lambda op: -op.self_ms)]
    return tuple(place for place in found if place is not None)


def place(op: Op, ceilings: Ceilings) -> Placed | None:
    """One operation; None where it cannot be placed."""
    dtype, bandwidth = dtype_of(op), ceilings.bandwidth_gb_s.value
    told = ceilings.gflops.get(dtype) or ceilings.gflops.get("float32")
    peak = told.value if told else None
    if op.self_ms <= 0 or op.moved_bytes <= 0 or not bandwidth or (op.flops and not peak):
        return None
    computing_ms = op.flops / peak / 1e6 if op.flops else 0.0
    moving_ms = op.moved_bytes / bandwidth / 1e6
    least_ms = max(computing_ms, moving_ms)
    intensity = op.flops / op.moved_bytes
    return Placed(
        op=op,
        dtype=dtype,
        intensity=intensity,
        gflops=op.flops / op.self_ms / 1e6,
        gb_s=op.moved_bytes / op.self_ms / 1e6,
        roof_gflops=min(peak, intensity * bandwidth) if op.flops else 0.0,
        least_ms=least_ms,
        share=least_ms / op.self_ms,
        bound=_bound(op, computing_ms, moving_ms),
    )


def _bound(op: Op, computing_ms: float, moving_ms: float) -> str:
    short = op.self_ms / max(op.calls, 1.0) < SHORT_MS
    if short and max(computing_ms, moving_ms) < FAR_BELOW * op.self_ms:
        return "overhead"
    return "compute" if computing_ms > moving_ms else "memory"


def dtype_of(op: Op) -> str:
    """The dtype of an operation's first input, "float32" where its shapes do not tell."""
    found = re.search(r"\b(float64|float32|bfloat16|float16|int8|uint8)\b", op.shapes)
    return found[1] if found else "float32"


def exceeded(places: Iterable[Placed], ceilings: Ceilings) -> bool:
    """Whether something computes faster than the peak: it was measured in a bad moment, and has to be once more."""
    peaks = {dtype: told.value for dtype, told in ceilings.gflops.items() if told.value}
    return any(place.gflops > 1.05 * peaks[place.dtype] for place in places if place.dtype in peaks)
