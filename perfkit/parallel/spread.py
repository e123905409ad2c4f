"""How a model is spread over several devices: plain data, filled in by the recipes that spread it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """How a workload's model is spread.

    Args:
        parts: what is spread along which axis, one line each: "data: the batch in 2 parts, gradients averaged".
        balance: share of the work of each pipeline stage, adding up to 1; empty without a pipeline.
        bubble: share of a pipeline's time in which a stage waits, by its schedule; 0 without one.
        period: training steps from one exchange to the next.
    """

    parts: tuple[str, ...] = ()
    balance: tuple[float, ...] = ()
    bubble: float = 0.0
    period: int = 1


def split_in_words(ways: Mapping[str, Sequence[str]], parts: int) -> str:
    """Layers split along "tensor", in one line: "tensor: 2 layers in 2 parts (fc1 by columns; fc2 by rows)".

    Args:
        ways: the layers' names, by how they are split.
    """
    listed = "; ".join(f"{_few(names)} by {way}" for way, names in ways.items())
    layers = sum(map(len, ways.values()))
    return f"tensor: {layers} layer{'' if layers == 1 else 's'} in {parts} parts ({listed})"


def _few(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(name or "the model" for name in names[:most]) + more
