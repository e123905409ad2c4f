"""What the caller of `optimize` decided beside model and recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Settings:
    """The arguments of `optimize` that say how a result is judged, and for how long it is measured."""

    budget_s: float
    tolerance: float | None = None
    evaluate: Callable[[Any], float] | None = None
    max_drop: float = 0.0
    strict: bool = False
    measure: bool = True
    on_slower: str = "warn"
    progress: Callable[[str], Any] = str  # a function that does nothing with the message
