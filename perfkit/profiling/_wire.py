"""Reading protocol buffers by field number: XLA gives out what its compiler decided as serialized ones.

Source: https://protobuf.dev/programming-guides/encoding
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class Message:
    """A serialized message; fields by number, as XLA's .proto files number them."""

    def __init__(self, data: bytes):
        self.fields: dict[int, list[Any]] = {}
        for number, value in _fields(memoryview(data)):
            self.fields.setdefault(number, []).append(value)

    def integer(self, number: int, default: int = 0) -> int:
        return self.fields.get(number, [default])[-1]

    def text(self, number: int) -> str:
        return bytes(self.fields.get(number, [b""])[-1]).decode("utf-8", "replace")

    def messages(self, number: int) -> list[Message]:
        return [Message(value) for value in self.fields.get(number, ())]

    def integers(self, number: int) -> list[int]:
        """A repeated integer, packed or not."""
        found: list[int] = []
        for value in self.fields.get(number, ()):
            found.extend([value] if isinstance(value, int) else _varints(value))
        return found


def _fields(data: memoryview) -> Iterator[tuple[int, Any]]:
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == 2:
            length, at = _varint(data, at)
        else:
            length = {1: 8, 5: 4}[kind]
        yield key >> 3, data[at : at + length]
        at += length


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _varints(data: memoryview) -> list[int]:
    found, at = [], 0
    while at < len(data):
        value, at = _varint(data, at)
        found.append(value)
    return found
