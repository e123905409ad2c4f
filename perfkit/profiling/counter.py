"""Counters of energy that devices keep."""

from __future__ import annotations

from abc import ABC, abstractmethod

from perfkit.profiling.nvml import Card, Refused, Source
from perfkit.profiling.nvml_readings import energy_j, power_w


class Unavailable(Exception):
    """There is no energy counter to read; the message says why."""


class Counter(ABC):
    """Energy that only grows.

    Args:
        source: what it is, for people.
        window_s: how long to measure at least.
    """

    source: str
    window_s: float

    @abstractmethod
    def joules(self) -> float:
        """The energy until now. Raises `Unavailable`."""

    def watts(self) -> float | None:
        """The power by another sensor, to compare with; None where there is none."""
        return None


class NvmlCounter(Counter):
    """Whole cards, added up; the card's counter is updated about every 100 ms."""

    def __init__(self, source: Source, cards: tuple[Card, ...], window_s: float = 5.0):
        self._nvml, self.window_s = source, window_s
        self._cards = [card.uuid for card in cards if card.part is None]
        if not self._cards:
            raise Unavailable("the energy counter is of a whole card, and this process has parts of one (MIG)")
        self.source = f"NVML energy counter, {len(self._cards)} card{'s' if len(self._cards) > 1 else ''}"

    def joules(self) -> float:
        try:
            return sum(energy_j(self._nvml, card) for card in self._cards)
        except Refused as refused:
            raise Unavailable(f"the card's energy counter: {refused}") from None

    def watts(self) -> float | None:
        try:
            return sum(power_w(self._nvml, card) for card in self._cards)
        except Refused:
            return None
