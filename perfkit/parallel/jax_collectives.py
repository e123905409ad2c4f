"""What a compiled XLA program sends between devices, read from its HLO.

Source: https://openxla.org/xla/operation_semantics (the operations); their bytes are those of the result's type.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

SENT = {
    "all-reduce": lambda given, ranks: 2 * given * (ranks - 1) / ranks,
    "all-gather": lambda given, ranks: given * (ranks - 1) / ranks,
    "reduce-scatter": lambda given, ranks: given * (ranks - 1),
    "all-to-all": lambda given, ranks: given * (ranks - 1) / ranks,
    "collective-permute": lambda given, _: given,
}
"""Bytes that leave one device for an operation whose result is `given` bytes, by the ring that libraries use.

The result of a reduce-scatter is one part of what was reduced.
"""

VIEWS = ("bitcast", "get-tuple-element", "tuple")
"""Operations that write nothing."""

_OPERATION = re.compile(rf"= (\(.*?\)|\S+) ({'|'.join(SENT)})(-start)?\(")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(body|condition|to_apply|calls|\w+_computations?)=\{?((?:%[\w.\-]+(?:, )?)+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_MADE = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(([^)]*)\)")
_ARRAY = re.compile(r"\b(pred|bf16|[sufc]\d+\w*)\[([\d,]*)\]")


@dataclass(frozen=True)
class Collective:
    """One operation of a program in which devices send each other data.

    Args:
        kind: "all-reduce", "all-gather", …
        bytes: of its result on one device.
        ranks: how many devices take part in one group.
        times: how often it runs in one call; None where it stands in a loop whose length the program does not tell.
        looped: whether it stands in a loop.
    """

    kind: str
    bytes: int
    ranks: int
    times: int | None
    looped: bool = False

    @property
    def runs(self) -> int:
        """How often it is counted: of a loop of unknown length one round."""
        return 1 if self.times is None else self.times

    @property
    def sent_bytes(self) -> float:
        """What leaves one device in one call."""
        return SENT[self.kind](self.bytes, self.ranks) * self.runs


def collectives(hlo: str, devices: int) -> tuple[Collective, ...]:
    """The collective operations of a compiled program's text, in its order.

    Args:
        hlo: `Compiled.as_text()`.
        devices: how many the program runs on: the size of a group that the text leaves open.
    """
    bodies = dict(_computations(hlo))
    found = []
    for name, times, looped in _runs(bodies):
        for line in bodies.get(name, ()):
            if match := _OPERATION.search(line):
                size = _bytes(match[1], halves=bool(match[3]) and match[2] != "all-reduce")
                found.append(Collective(match[2], size, _ranks(line, devices), times, looped))
    return tuple(item for item in found if item.ranks > 1)


def told(found: tuple[Collective, ...]) -> str:
    """What a program sends, by kind: "3 all-reduces of 2.8 MB"."""
    parts = []
    for kind in dict.fromkeys(item.kind for item in found):
        items = [item for item in found if item.kind == kind]
        runs, looped = (sum(item.runs for item in some) for some in (items, [item for item in items if item.looped]))
        size = _size(sum(item.bytes * item.runs for item in items))
        where = f" ({looped} in loops)" if looped else ""
        parts.append(f"{runs} {kind}{'s' if runs > 1 else ''}{where} of {size}")
    if any(item.times is None for item in found):
        parts.append("loops of unknown length counted as one round")
    return ", ".join(parts) or "no collective operation"


def filled_first(hlo: str) -> int:
    """Bytes that a program fills out of constants alone, where it meets a collective operation before any loop; else 0.

    Most of them are what loops begin with. Nothing has to be there for them, so they come first; but the thread of a
    device that has come to the operation waits in it, and the others' arrays are filled by what threads are left.
    """
    filled, meets, free = 0, False, set()
    for line in dict(_computations(hlo)).get("ENTRY", ()):
        if not (made := _MADE.match(line)):
            continue
        name, type_, operation, operands = made.groups()
        if operation == "while":
            break
        meets |= operation.removesuffix("-start") in SENT
        if operation == "constant":
            free.add(name)
        elif (read := re.findall(r"%([\w.\-]+)", operands)) and free.issuperset(read):
            free.add(name)
            filled += 0 if operation in VIEWS else _bytes(type_, halves=False)
    return filled if meets else 0


def _size(count: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count} B"


def _computations(hlo: str) -> Iterator[tuple[str, list[str]]]:
    """The program's functions by name with their lines; the one it begins with is called "ENTRY"."""
    name, lines = "", []
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            name, lines = "ENTRY" if match[1] else match[2], []
        elif line.startswith("}"):
            yield name, lines
        else:
            lines.append(line)


def _runs(bodies: dict[str, list[str]]) -> Iterator[tuple[str, int | None, bool]]:
    """Each function that runs in a call of the program, by name, once for each place that it is called from.

    With how often it runs, None where that is in a loop of unknown length; and whether it is in a loop at all.
    """
    waiting: list[tuple[str, int | None, bool]] = [("ENTRY", 1, False)]
    while waiting:
        name, runs, looped = waiting.pop()
        yield name, runs, looped
        for line in bodies.get(name, ()):
            for role, called in _CALLED.findall(line):
                loop, rounds = role in ("body", "condition"), _TRIPS.search(line)
                each = 1 if not loop else int(rounds[1]) if rounds else None
                for inner in re.findall(r"%([\w.\-]+)", called):
                    waiting.append((inner, None if runs is None or each is None else runs * each, looped or loop))


def _bytes(type_: str, halves: bool) -> int:
    """Bytes of a result's type; of an operation that has started it holds operands, results and empty contexts."""
    type_, sizes = type_.replace("u32[]", "") if halves else type_, []
    for dtype, shape in _ARRAY.findall(type_):
        bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
        sizes.append(math.prod(int(length) for length in shape.split(",") if length) * bits // 8)
    return sum(sizes[len(sizes) // 2 :] if halves else sizes)


def _ranks(line: str, devices: int) -> int:
    """How many devices make one group, in each of the ways in which XLA writes groups down."""
    if "source_target_pairs" in line:
        return devices
    if match := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part) if part else sizes[name] for name, part in axes)
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return match[1].count(",") + 1
    return devices
