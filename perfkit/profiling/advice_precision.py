"""Advice on the width of numbers."""

from __future__ import annotations

from collections.abc import Iterator

from perfkit.profiling._profile import Finding
from perfkit.profiling._time_data import Op
from perfkit.profiling.facts import Facts, is_copy, names, sped
from perfkit.reporting._format import format_percent

LEAST_SHARE = 0.01
WORTH = 1.3
"""bfloat16 is advised where the machine multiplies it so many times faster than float32."""
CAST = 1.5
"""Casting a float32 array reads it and writes half of it."""


def float64(facts: Facts) -> Iterator[Finding]:
    """Numbers of 64 bits, which are rarely meant: a Python or numpy number found its way into the model."""
    share = facts.share(facts.float64)
    if share < LEAST_SHARE:
        return
    yield Finding(
        kind="float64",
        told=f"{len(facts.float64)} operations compute in float64: {format_percent(share)} of the step",
        where=names(op for op in facts.float64 if not is_copy(op))[:5],
        share=share,
        resource="time",
        recipe="",
        advice="find where float64 comes in (a numpy array, a .double(), a parameter of one) and make it float32",
        predicted=sped(share, 2.0, "half the bytes and twice the numbers an instruction in float32"),
    )


def float32_products(facts: Facts) -> Iterator[Finding]:
    """Products in float32 on a machine that multiplies bfloat16 faster."""
    wide, narrow, bandwidth = facts.peak("float32"), facts.peak("bfloat16"), facts.bandwidth
    if not wide or not narrow or not bandwidth or narrow < WORTH * wide or {"bf16", "half", "fp16"} & facts.applied:
        return
    bound = [op for op in facts.products if op.flops and "float32" in op.shapes and _computes(facts, op)]
    share = facts.share(bound)
    if not share:
        return
    now_ms = sum(op.self_ms for op in bound)
    casts_ms = CAST * sum(op.moved_bytes for op in bound) / bandwidth / 1e6
    then_ms = now_ms * wide / narrow + casts_ms
    if then_ms >= now_ms:
        return
    yield Finding(
        kind="products in float32",
        told=f"matrix products and convolutions take {format_percent(share)} of the step in float32, and this machine "
        f"multiplies bfloat16 {narrow / wide:.1f} times faster",
        where=names(bound)[:5],
        share=share,
        resource="time",
        recipe="bf16",
        advice="compute products in bfloat16, the rest in float32",
        predicted=sped(share, now_ms / then_ms, f"{now_ms / then_ms:.1f} times faster, casts at each call included"),
    )


def _computes(facts: Facts, op: Op) -> bool:
    found = facts.placed(op)
    return found is not None and found.bound == "compute"


RULES = (float64, float32_products)
