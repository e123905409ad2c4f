"""Which parts of a model to recompute in the backward pass, from what each saves and how long it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from perfkit._errors import InvalidInputError

SHARES = (1 / 2, 1 / 3, 1 / 4, 1 / 6, 1 / 8, 1 / 12, 1 / 16, 1 / 24, 1 / 32, 1 / 48, 1 / 64)
"""Sizes of a segment that are tried, as shares of all that is saved."""


@dataclass(frozen=True)
class Segment:
    """A part of the model that can be run again from what goes into it.

    Args:
        name: what the report calls it.
        saved_bytes: what it saves for its backward pass.
        input_bytes: what goes into it.
        seconds: of its forward pass.
        chunks: in how many pieces of time it runs; 1 for all that is not recurrent.
        fixed: why it cannot be run again; empty where it can.
        place: where in the model it is, as its framework needs to know.
    """

    name: str
    saved_bytes: float
    input_bytes: float
    seconds: float
    chunks: int = 1
    fixed: str = ""
    place: tuple[str, tuple[int, ...]] = ("", ())


@dataclass(frozen=True)
class Choice:
    """Segments in the order in which they run, and which of them are recomputed.

    Args:
        peak_bytes: what is held at most, by the sizes of the segments.
        seconds: what recomputing takes.
    """

    segments: tuple[Segment, ...]
    recomputed: tuple[bool, ...]
    peak_bytes: float
    seconds: float

    @property
    def chosen(self) -> tuple[Segment, ...]:
        return tuple(segment for segment, again in zip(self.segments, self.recomputed, strict=True) if again)


def budget_bytes(budget: float, saved_bytes: float) -> float:
    """A budget as `checkpoint` takes it, in bytes: up to 1 it is a share of what is saved."""
    return budget * saved_bytes if budget <= 1 else budget


def check_budget(budget: float) -> None:
    """Raises InvalidInputError where it is no share and no number of bytes."""
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not budget > 0:
        raise InvalidInputError(f"checkpoint(budget={budget!r}): expected a share up to 1, or a number of bytes")


def choose(saved_bytes: float, segmented: Callable[[float], Iterable[Segment]], limit_bytes: float) -> Choice | None:
    """The quickest choice within the limit; where none is, the one that holds least. None where nothing can be chosen.

    Args:
        saved_bytes: all that the model saves for its backward pass.
        segmented: cuts the model into segments that save no more than it is given, where they can be cut.
    """
    choices = []
    for share in SHARES:
        segments = tuple(segmented(share * saved_bytes))
        if any(not segment.fixed for segment in segments):
            last = sorted(range(len(segments)), reverse=True)
            slowest = sorted(last, key=lambda index: -segments[index].seconds)
            choices += [_fitted(segments, saved_bytes, limit_bytes, order) for order in (slowest, last)]
    fitting = [choice for choice in choices if choice.peak_bytes <= limit_bytes]
    if fitting:
        return min(fitting, key=lambda choice: choice.seconds)
    return min(choices, key=lambda choice: choice.peak_bytes, default=None)


def _fitted(segments: tuple[Segment, ...], saved_bytes: float, limit_bytes: float, order: Iterable[int]) -> Choice:
    """Recompute all; then give up one after the other, as long as the limit allows it or no more is held for it."""
    outside = saved_bytes - sum(segment.saved_bytes for segment in segments)
    again = [not segment.fixed for segment in segments]
    peak = _peak(segments, again, outside)
    for index in order:
        if again[index]:
            without = [*again[:index], False, *again[index + 1 :]]
            less = _peak(segments, without, outside)
            if less <= max(peak, limit_bytes):
                again, peak = without, less
    seconds = sum(_recomputing(segment) for segment, chosen in zip(segments, again, strict=True) if chosen)
    return Choice(segments, tuple(again), _peak(segments, again, outside), seconds)


def _peak(segments: tuple[Segment, ...], again: list[bool], outside: float) -> float:
    """What is held at most: the backward pass has freed all later segments when it recomputes one."""
    held = peak = outside
    for segment, chosen in zip(segments, again, strict=True):
        held += segment.input_bytes if chosen else segment.saved_bytes
        peak = max(peak, held + segment.saved_bytes / segment.chunks if chosen else held)
    return peak


def _recomputing(segment: Segment) -> float:
    """The last chunk in time is run backward at once, and never again."""
    return segment.seconds * (segment.chunks - 1) / segment.chunks if segment.chunks > 1 else segment.seconds
