"""Which operation of one profile is which of another, by ever looser rules, and what became of it."""

from __future__ import annotations

import difflib
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

SIMILAR = 0.6
"""Names that are less alike than this (difflib's ratio) are not taken for one operation under two names."""

# Paths that wrappers put around a model: torch.compile, DistributedDataParallel, DataParallel.
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|module)(?=\.|$)")


@dataclass(frozen=True)
class Change:
    """An operation, a module or a category of memory, before and after.

    Args:
        name: what it is called after; before, where it is gone.
        was: what it was called before, where that is another name; else "".
        module, phase: where it is; "" for what has none.
        status: "added", "removed", "changed", or "same" where neither time nor bytes differ.
        before_ms, after_ms: per step; 0 where it is not there, and for categories of memory.
        before_bytes, after_bytes: of an operation what it must move, of a module what it keeps for the backward pass
            (in inference: returns), of a category what is held at the peak.
        before_calls, after_calls: per step.
    """

    name: str
    was: str
    module: str
    phase: str
    status: str
    before_ms: float
    after_ms: float
    before_bytes: float = 0.0
    after_bytes: float = 0.0
    before_calls: float = 0.0
    after_calls: float = 0.0

    @property
    def saved_ms(self) -> float:
        return self.before_ms - self.after_ms

    @property
    def saved_bytes(self) -> float:
        return self.before_bytes - self.after_bytes


@dataclass(frozen=True)
class Part:
    """One operation or module of one profile; a module has its class as its name and no phase."""

    name: str
    module: str
    phase: str
    ms: float
    bytes: float
    calls: float
    flops: float


def aligned(before: Sequence[Part], after: Sequence[Part]) -> list[Change]:
    """Each part of one side with its counterpart on the other, found by ever looser rules."""
    found: list[Change] = []
    old, new = list(before), list(after)
    rules: tuple[Callable[[Part], Any], ...] = (
        lambda part: (part.name, part.module, part.phase),
        lambda part: (part.name, _unwrapped(part.module), part.phase),
    )
    for rule in rules:
        old, new = _matched(found, old, new, rule)
    old, new = _renamed(found, old, new)
    found += [_change(part, None) for part in old]
    found += [_change(None, part) for part in new]
    return found


def _matched(
    found: list[Change], old: list[Part], new: list[Part], rule: Callable[[Part], Any]
) -> tuple[list[Part], list[Part]]:
    """Pair those for which the rule says the same, in order; what is left of each side."""
    waiting: dict[Any, list[Part]] = defaultdict(list)
    for part in new:
        waiting[rule(part)].append(part)
    left = []
    for part in old:
        if others := waiting[rule(part)]:
            found.append(_change(part, others.pop(0)))
        else:
            left.append(part)
    return left, [part for others in waiting.values() for part in others]


def _renamed(found: list[Change], old: list[Part], new: list[Part]) -> tuple[list[Part], list[Part]]:
    """Pair what is left in the same place by how alike it is: the same arithmetic, or nearly the same name."""
    places: dict[Any, tuple[list[Part], list[Part]]] = defaultdict(lambda: ([], []))
    for index, side in enumerate((old, new)):
        for part in side:
            places[_unwrapped(part.module), part.phase][index].append(part)
    left: tuple[list[Part], list[Part]] = ([], [])
    for ours, theirs in places.values():
        scores = [(_likeness(a, b), i, j) for i, a in enumerate(ours) for j, b in enumerate(theirs)]
        used_old, used_new = set(), set()
        for score, i, j in sorted(scores, key=lambda item: (-item[0], item[1], item[2])):
            if score >= SIMILAR and i not in used_old and j not in used_new:
                found.append(_change(ours[i], theirs[j]))
                used_old.add(i)
                used_new.add(j)
        left[0].extend(part for i, part in enumerate(ours) if i not in used_old)
        left[1].extend(part for j, part in enumerate(theirs) if j not in used_new)
    return left


def _likeness(one: Part, other: Part) -> float:
    """How sure it is that two parts in the same place are the same one; above 1 where they do the same arithmetic."""
    if not one.phase:  # modules: there is one at a path
        return 1
    names = difflib.SequenceMatcher(None, _stem(one.name), _stem(other.name)).ratio()
    if one.flops and math.isclose(one.flops, other.flops, rel_tol=1e-6):
        return 1 + names
    return names


def _stem(name: str) -> str:
    """The name without its namespace, template arguments and the numbers that generators append."""
    return re.sub(r"<.*>|\d+", "", name.rpartition("::")[2]).strip("_")


def _unwrapped(path: str) -> str:
    return _WRAPPERS.sub("", path).strip(".")


def _change(before: Part | None, after: Part | None) -> Change:
    shown = after or before
    values = [getattr(part, field) if part else 0.0 for field in ("ms", "bytes", "calls") for part in (before, after)]
    if before and after:
        was = before.name if before.name != after.name else ""
        alike = math.isclose(values[0], values[1], rel_tol=1e-9) and values[2] == values[3]
        told = "same" if alike else "changed"
    else:
        was, told = "", "removed" if before else "added"
    return Change(shown.name, was, shown.module, shown.phase, told, *values)


def ranked(changes: Iterable[Change]) -> tuple[Change, ...]:
    return tuple(sorted(changes, key=lambda change: (-abs(change.saved_ms), -abs(change.saved_bytes), change.name)))


def status(before: float, after: float) -> str:
    if math.isclose(before, after, rel_tol=1e-9):
        return "same"
    return "changed" if before and after else "removed" if before else "added"
