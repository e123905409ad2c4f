"""What devices say of themselves while a model runs on them: clocks, temperature, power, what holds them down.

Asking takes time of the host's: it is not done while something is timed.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from perfkit._quantity import Quantity
from perfkit.profiling import host_state, nvml
from perfkit.profiling._profile import DeviceState, Series
from perfkit.profiling.nvml import Card, Refused, Source
from perfkit.profiling.nvml_readings import HELD_DOWN, READINGS, held_down, name_of, others, quantity

PERIOD_S = 0.05
NVIDIA = ("cuda", "gpu")


class Watch(ABC):
    """What is being read, until the context ends."""

    @abstractmethod
    def states(self) -> tuple[DeviceState, ...]:
        """Each device with what it has told until now."""

    @abstractmethod
    def sample(self) -> None:
        """Ask for what varies."""


@contextmanager
def watching(device: str, period_s: float = PERIOD_S) -> Iterator[Watch]:
    """Read the devices that a model runs on while the context lasts, from a thread.

    Args:
        device: as a workload names it: "cpu", "cuda", "gpu", "tpu", …

    Example:
        >>> with watching("cuda") as watch:
        ...     model(x)
        >>> watch.states()
    """
    with ExitStack() as stack:
        yield stack.enter_context(_sampled(_watch(device, stack), period_s))


def _watch(device: str, stack: ExitStack) -> Watch:
    if device == "cpu":
        return Host()
    if device not in NVIDIA:
        return Unknown(device, f"not supported: perfkit reads NVIDIA's cards and processors, and this is a {device}")
    try:
        live = stack.enter_context(nvml.opened())
        return Cards(live, own_cards(live))
    except Refused as refused:
        return Unknown(device, f"not supported: {refused}{_other_makers()}")


@contextmanager
def _sampled(watch: Watch, period_s: float) -> Iterator[Watch]:
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(period_s):
            watch.sample()

    watch.sample()
    thread = threading.Thread(target=repeat, name="perfkit telemetry", daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        over.set()
        thread.join()


def own_cards(source: Source, visible: str | None = None) -> tuple[Card, ...]:
    """The cards that this process may use, with their parts: those that CUDA_VISIBLE_DEVICES names, or all.

    Args:
        visible: numbers or UUIDs, which may be shortened, as CUDA reads them up to the first that it does not know;
            the environment's where it is None.
    """
    cards = source.cards()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") if visible is None else visible
    if visible is None:
        return cards
    chosen: list[Card] = []
    for entry in filter(None, (part.strip() for part in visible.split(","))):
        named = [
            card for card in cards if (card.part is None and entry == str(card.index)) or card.uuid.startswith(entry)
        ]
        if not named or (entry.isdecimal() and named[0].part is not None):
            break
        chosen += [named[0], *(card for card in cards if card.parent == named[0].uuid)]
    return tuple(dict.fromkeys(chosen))


def _other_makers() -> str:
    """What to say of a card that CUDA's names stand for and NVML knows nothing of."""
    if os.path.exists("/dev/kfd"):
        return "; this is an AMD card, which perfkit does not read: rocm-smi shows its clocks and power"
    return ""


class Unknown(Watch):
    """A device that cannot be asked."""

    def __init__(self, name: str, reason: str):
        self._state = DeviceState(name, {"power": Quantity.missing("W", reason)})

    def states(self) -> tuple[DeviceState, ...]:
        return (self._state,)

    def sample(self) -> None:
        """Nothing varies."""


class Host(Watch):
    """The processor."""

    def __init__(self):
        self._history = History()

    def states(self) -> tuple[DeviceState, ...]:
        readings = host_state.readings()
        return (DeviceState(host_state.name(), self._history.over(readings), (), (), self._history.series(readings)),)

    def sample(self) -> None:
        self._history.add(host_state.varying())


class Cards(Watch):
    """NVIDIA's cards, and the parts of divided ones."""

    def __init__(self, source: Source, cards: Iterable[Card]):
        self.source, self.cards = source, tuple(cards)
        if not self.cards:
            raise Refused("NVML finds no card that this process may use")
        self._histories = {card.uuid: History() for card in self.cards}
        self._held_down = dict.fromkeys(self._histories, 0)

    def states(self) -> tuple[DeviceState, ...]:
        return tuple(map(self._state, self.cards))

    def sample(self) -> None:
        for card in self.cards:
            found = {}
            for reading in READINGS:
                if reading.varies and (told := quantity(reading, self.source, card.uuid)).value is not None:
                    found[reading.name] = told.value
            self._histories[card.uuid].add(found)
            self._held_down[card.uuid] |= held_down(self.source, card.uuid)

    def _state(self, card: Card) -> DeviceState:
        history = self._histories[card.uuid]
        readings = {reading.name: quantity(reading, self.source, card.uuid) for reading in READINGS}
        bits = self._held_down[card.uuid]
        return DeviceState(
            name_of(self.source, card),
            history.over(readings),
            tuple(reason for bit, reason in HELD_DOWN.items() if bits & bit),
            others(self.source, card.uuid),
            history.series(readings),
        )


class History:
    """What varied, over time."""

    def __init__(self):
        self._start = time.monotonic()
        self._points: dict[str, list[tuple[float, float]]] = {}

    def add(self, found: dict[str, float]) -> None:
        at_s = time.monotonic() - self._start
        for name, value in found.items():
            self._points.setdefault(name, []).append((at_s, value))

    def over(self, readings: dict[str, Quantity]) -> dict[str, Quantity]:
        """The readings, with those that varied as their medians."""
        return readings | {name: self._middle(name, told) for name, told in readings.items() if name in self._points}

    def _middle(self, name: str, told: Quantity) -> Quantity:
        values = [value for _at_s, value in list(self._points[name])]
        method = f"median of {len(values)}, {min(values):.6g} to {max(values):.6g}"
        return Quantity(statistics.median(values), told.unit, method="; ".join(filter(None, (method, told.method))))

    def series(self, readings: dict[str, Quantity]) -> tuple[Series, ...]:
        found = {name: list(points) for name, points in self._points.items() if name in readings}
        return tuple(
            Series(name, readings[name].unit, *map(tuple, zip(*points, strict=True))) for name, points in found.items()
        )
