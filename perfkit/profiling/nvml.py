"""NVML, the library of NVIDIA's driver, asked for plain data. What it refuses is a reason, never a crash.

A card is named by its UUID, a part of a card (MIG) by its own. What a source answers can be kept as JSON, and be
answered again without a card: `Recording`, `Replay`.
"""

from __future__ import annotations

import ctypes
import json
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NOT_INSTALLED = "NVIDIA cards are not asked: pip install 'perfkit[nvidia]'"


class Refused(Exception):
    """NVML, or this card, does not answer; the message says why."""


@dataclass(frozen=True)
class Card:
    """A card, or a part of one.

    Args:
        index: of the card, as nvidia-smi counts.
        part: number of the part where the card is divided (MIG); None for a whole card.
        parent: UUID of the card that a part belongs to.
    """

    uuid: str
    index: int
    part: int | None = None
    parent: str = ""


class Source(ABC):
    """Something that answers as NVML does."""

    @abstractmethod
    def cards(self) -> tuple[Card, ...]:
        """Every card, each followed by its parts. Raises `Refused` where they cannot be listed."""

    @abstractmethod
    def ask(self, function: str, card: str = "", *arguments: int) -> Any:
        """What a function of pynvml returns, as JSON-ready data: structures are dicts of their fields.

        Args:
            card: UUID of whom to ask; "" where the function is about no card.

        Raises:
            Refused: not supported, not permitted, not in this driver, the card is gone, …
        """


class Live(Source):
    """This machine's driver.

    Raises:
        Refused: no binding, no driver, or it does not start.
    """

    def __init__(self):
        try:
            import pynvml
        except ImportError:
            raise Refused(NOT_INSTALLED) from None
        self._nvml = pynvml
        self._handles: dict[str, Any] = {}
        self._call(pynvml.nvmlInit)

    def close(self) -> None:
        self._call(self._nvml.nvmlShutdown)

    def cards(self) -> tuple[Card, ...]:
        nvml, found = self._nvml, []
        for index in range(self._call(nvml.nvmlDeviceGetCount)):
            try:
                handle = self._call(nvml.nvmlDeviceGetHandleByIndex, index)
                card = Card(self._call(nvml.nvmlDeviceGetUUID, handle), index)
            except Refused:  # a card that is lost, or another user's: the others are still there
                continue
            self._handles[card.uuid] = handle
            found += [card, *self._parts(card, handle)]
        return tuple(found)

    def _parts(self, card: Card, handle: Any) -> list[Card]:
        nvml, found = self._nvml, []
        try:
            divided, _pending = self._call(nvml.nvmlDeviceGetMigMode, handle)
            places = self._call(nvml.nvmlDeviceGetMaxMigDeviceCount, handle) if divided else 0
        except Refused:
            return []
        for place in range(places):
            try:
                part = self._call(nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, place)
                uuid = self._call(nvml.nvmlDeviceGetUUID, part)
            except Refused:  # no part in this place
                continue
            self._handles[uuid] = part
            found.append(Card(uuid, card.index, place, card.uuid))
        return found

    def ask(self, function: str, card: str = "", *arguments: int) -> Any:
        called = getattr(self._nvml, function, None)
        if called is None:
            raise Refused(f"this version of nvidia-ml-py has no {function}")
        if card and card not in self._handles:
            self.cards()
        if card and card not in self._handles:
            raise Refused(f"no card {card} here")
        if function == "nvmlDeviceGetFieldValues":
            return _plain(self._call(called, self._handles[card], list(arguments)))
        return _plain(self._call(called, *([self._handles[card]] if card else []), *arguments))

    def _call(self, function: Any, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except self._nvml.NVMLError as error:
            raise Refused(str(error)) from None
        except self._nvml.NVMLLibraryMismatchError:  # no NVMLError
            raise Refused(f"this driver is older than {function.__name__}") from None


@contextmanager
def opened() -> Iterator[Live]:
    """This machine's driver, for a while. Raises `Refused` as `Live` does."""
    live = Live()
    try:
        yield live
    finally:
        live.close()


class Recording(Source):
    """Another source, whose answers are kept with their times."""

    def __init__(self, source: Source):
        self.source = source
        self.answers: list[dict[str, Any]] = []
        self._start = time.monotonic()
        self._lock = threading.Lock()

    def cards(self) -> tuple[Card, ...]:
        found = self.source.cards()
        self._keep({"function": "cards", "value": [vars(card) for card in found]})
        return found

    def ask(self, function: str, card: str = "", *arguments: int) -> Any:
        asked = {"function": function, "card": card, "arguments": list(arguments)}
        try:
            value = self.source.ask(function, card, *arguments)
        except Refused as refused:
            self._keep(asked | {"refused": str(refused)})
            raise
        self._keep(asked | {"value": value})
        return value

    def _keep(self, answer: dict[str, Any]) -> None:
        with self._lock:
            self.answers.append({"at_s": round(time.monotonic() - self._start, 6)} | answer)

    def write(self, path: str | Path, **about: Any) -> None:
        """Keep it as JSON, an answer a line, with what else is to be known of it."""
        head = json.dumps(about, indent=1, sort_keys=True).removesuffix("\n}").removesuffix("}")
        lines = ",\n  ".join(json.dumps(answer) for answer in self.answers)
        Path(path).write_text(f'{head}{"," if about else ""}\n "answers": [\n  {lines}\n ]\n}}\n')


class Replay(Source):
    """Answers that were recorded: each question's in their order, the last one again and again where `endless`.

    Args:
        path: a file of `Recording.write`.
        endless: else a question that has no further answer is refused, so that nobody waits for a counter to move.
    """

    def __init__(self, path: str | Path, endless: bool = True):
        recorded = json.loads(Path(path).read_text())
        self.endless = endless
        self._left: dict[tuple, list[dict[str, Any]]] = {}
        for answer in recorded["answers"]:
            self._left.setdefault(_question(answer), []).append(answer)
        self._at_s = 0.0

    def clock(self) -> float:
        """The time of the latest answer, in seconds: what to measure durations by."""
        return self._at_s

    def cards(self) -> tuple[Card, ...]:
        return tuple(Card(**card) for card in self._next({"function": "cards"}))

    def ask(self, function: str, card: str = "", *arguments: int) -> Any:
        return self._next({"function": function, "card": card, "arguments": list(arguments)})

    def _next(self, question: dict[str, Any]) -> Any:
        left = self._left.get(_question(question), [])
        if not left:
            raise Refused(f"the recording has no answer of {question['function']}")
        answer = left.pop(0) if len(left) > 1 or not self.endless else left[0]
        self._at_s = max(self._at_s, answer["at_s"])
        if "refused" in answer:
            raise Refused(answer["refused"])
        return answer["value"]


def _question(answer: dict[str, Any]) -> tuple:
    return answer["function"], answer.get("card", ""), tuple(answer.get("arguments", ()))


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, ctypes.Union):
        return {field[0]: getattr(value, field[0]) for field in value._fields_}
    if isinstance(value, ctypes.Structure):
        return {field[0]: _plain(getattr(value, field[0])) for field in value._fields_}
    if isinstance(value, (ctypes.Array, list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "__dict__"):  # nvmlFriendlyObject
        return {name: _plain(item) for name, item in vars(value).items()}
    return value
