"""Advice on the optimizer's part of a training step."""

from __future__ import annotations

from collections.abc import Iterator

from perfkit.profiling._profile import Finding
from perfkit.profiling.facts import Facts, sped
from perfkit.reporting._format import format_percent

MANY = 20
LEAST_SHARE = 0.05
FUSED = 3.0
"""A fused Adam against one in single operations, on the reference CNN's weights."""


def optimizer_in_pieces(facts: Facts) -> Iterator[Finding]:
    """An optimizer that updates each tensor by itself, an operation at a time."""
    if facts.profile.framework != "torch" or not facts.trains:
        return
    pieces = [op for op in facts.ops if op.phase == "optimizer" and "_fused" not in op.name]
    calls, share = sum(op.calls for op in pieces), facts.share(pieces)
    if calls < MANY or share < LEAST_SHARE or any("_fused" in op.name for op in facts.profile.time.ops):
        return
    together = "_foreach" in "".join(op.name for op in pieces)
    yield Finding(
        kind="an optimizer in pieces",
        told=f"the optimizer is {calls:.0f} {'' if together else 'small '}operations: {format_percent(share)} of the "
        "step",
        where=("optimizer",),
        share=share,
        resource="time",
        recipe="fused_optimizer",
        advice="update each parameter in one pass, which torch.optim.Adam, AdamW, SGD and Adagrad can (fused=True)",
        predicted=sped(share, FUSED, f"{FUSED:g} times faster when fused"),
    )


RULES = (optimizer_in_pieces,)
