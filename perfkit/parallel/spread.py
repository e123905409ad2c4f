"""How a model is spread over several devices: plain data, filled in by the recipes that spread it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """How a workload's model is spread.

    Args:
        shares: into how many parts the example batch was divided, of which the workload's inputs are one.
        parts: what is spread along which axis, one line each: "data: the batch in 2 parts, gradients averaged".
        balance: share of the work of each pipeline stage, adding up to 1; empty without a pipeline.
        bubble: share of a pipeline's time in which a stage waits, by its schedule; 0 without one.
    """

    shares: int = 1
    parts: tuple[str, ...] = ()
    balance: tuple[float, ...] = ()
    bubble: float = 0.0
