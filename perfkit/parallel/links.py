"""What it takes to send: an alpha-beta model of a link, or one that was measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

KINDS = ("all_reduce", "average", "all_gather", "gather_inside", "reduce_scatter", "send")
"""`average` is an all-reduce of gradients, which are divided and copied into one message first; `gather_inside` is an
all-gather along another than the first dimension, after which parts are put side by side."""


class Link(ABC):
    """What lies between devices."""

    @abstractmethod
    def seconds(self, kind: str, size: float, ranks: int) -> float:
        """What one operation takes.

        Args:
            kind: one of `KINDS`.
            size: bytes of what is reduced, gathered (the whole) or sent.
            ranks: how many devices take part.
        """


@dataclass(frozen=True)
class Ring(Link):
    """Devices in a ring: every message takes `latency_s`, and its bytes over `bytes_per_s`.

    Source: Thakur, Rabenseifner, Gropp: Optimization of collective communication operations in MPICH (2005)
    """

    latency_s: float
    bytes_per_s: float

    def seconds(self, kind: str, size: float, ranks: int) -> float:
        if ranks == 1:
            return 0.0
        if kind == "send":
            return self.latency_s + size / self.bytes_per_s
        rounds = (2 if kind in ("all_reduce", "average") else 1) * (ranks - 1)
        return rounds * (self.latency_s + size / ranks / self.bytes_per_s)


@dataclass(frozen=True)
class Measured(Link):
    """Times of operations between the processes that were there, by kind: (bytes, seconds), on lines in between.

    For fewer processes than were there, a ring's rounds are counted.
    """

    ranks: int
    points: Mapping[str, Sequence[tuple[float, float]]]

    def seconds(self, kind: str, size: float, ranks: int) -> float:
        if ranks == 1:
            return 0.0
        scale = 1.0 if kind == "send" else (ranks - 1) / (self.ranks - 1)
        return on_a_line(self.points[kind], size) * scale


def on_a_line(points: Sequence[tuple[float, float]], size: float) -> float:
    """Between the two points around a size; beyond the ends as between the two that are nearest."""
    if len(points) == 1:
        return points[0][1]
    above = next((index for index, (other, _) in enumerate(points) if other >= size), len(points) - 1)
    (low, low_s), (high, high_s) = points[max(above, 1) - 1], points[max(above, 1)]
    return max(low_s + (high_s - low_s) * (size - low) / (high - low), min(seconds for _, seconds in points))
