"""Where a chain of operations is cut into stages that take equally long."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SLACK = 1.05
"""Stages may be this much longer than the best possible where that sends less."""


@dataclass(frozen=True)
class Costs:
    """What is known of a chain of operations.

    Args:
        seconds: time of each operation, backward included where the model trains.
        held_bytes: what each operation keeps in memory: its weights and what belongs to them, and its outputs.
        sent_bytes: what would be sent in one micro-batch, by place: a cut at place 3 is before operation 3. Places that
            are not there cannot be cut.
    """

    seconds: Sequence[float]
    held_bytes: Sequence[int]
    sent_bytes: Mapping[int, int]

    def shares(self, cuts: Sequence[int]) -> tuple[float, ...]:
        """Share of the time of each stage, adding up to 1."""
        total = sum(self.seconds)
        return tuple(sum(self.seconds[start:end]) / total for start, end in spans(cuts, len(self.seconds)))

    def held(self, cuts: Sequence[int]) -> tuple[int, ...]:
        """Bytes that each stage keeps."""
        return tuple(sum(self.held_bytes[start:end]) for start, end in spans(cuts, len(self.held_bytes)))


def spans(cuts: Sequence[int], length: int) -> list[tuple[int, int]]:
    """The stages between cuts: first operation, and the one behind the last."""
    return list(itertools.pairwise((0, *cuts, length)))


def balanced(costs: Costs, stages: int, capacity_bytes: float = math.inf) -> tuple[int, ...] | None:
    """The cuts of which the longest stage is the shortest; of those that are nearly as good, the ones that send least.

    Args:
        capacity_bytes: what a stage may hold.

    Returns:
        One place fewer than there are stages; None where there are too few places, or the stages do not fit.
    """
    least = _cuts(costs, stages, capacity_bytes, math.inf, lambda longest, time, _sent: (max(longest, time), 0))
    if least is None:
        return None
    longest = max(sum(costs.seconds[start:end]) for start, end in spans(least, len(costs.seconds)))
    return _cuts(costs, stages, capacity_bytes, longest * SLACK, lambda total, time, sent: (total + sent, time))


def _cuts(costs: Costs, stages: int, capacity: float, longest: float, cost) -> tuple[int, ...] | None:
    """The cheapest cuts, where no stage takes longer; `cost(before, seconds, sent)` adds a stage: (cost, tie-break)."""
    length = len(costs.seconds)
    times = list(itertools.accumulate(costs.seconds, initial=0.0))
    sizes = list(itertools.accumulate(costs.held_bytes, initial=0))
    best: dict[int, tuple[tuple, tuple[int, ...]]] = {0: ((0, 0), ())}
    for stage in range(1, stages + 1):
        ends = [length] if stage == stages else sorted(place for place in costs.sent_bytes if 0 < place < length)
        found: dict[int, tuple[tuple, tuple[int, ...]]] = {}
        for end in ends:
            for start, (before, cuts) in best.items():
                seconds, size = times[end] - times[start], sizes[end] - sizes[start]
                if start >= end or seconds > longest or size > capacity:
                    continue
                now = cost(before[0], seconds, costs.sent_bytes.get(start, 0))
                if end not in found or now < found[end][0]:
                    found[end] = now, (*cuts, start)
        best = found
    return best[length][1][1:] if length in best else None


def bubble(devices: int, micro_batches: int, stages: int) -> float:
    """Share of a step in which a device waits, if all stages take equally long.

    Filling and draining takes devices - 1 of the stages' turns, of which a device has one for each micro-batch and
    stage of its own.

    Source: https://arxiv.org/abs/2104.04473 (sections 2.2.1, 2.2.2)
    """
    return (devices - 1) / (devices - 1 + micro_batches * stages // devices)
