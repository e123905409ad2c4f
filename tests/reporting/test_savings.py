"""A recipe for memory: time is its price, and saving none is its failure."""

import dataclasses

import pytest

from perfkit._chain import chain_of
from perfkit._quantity import Quantity, Verdict
from perfkit.reporting import _facts

from .conftest import comparison, fast, measurement


def report(before=310.0, after=100.0, ratio=0.75, **changes):
    sides = {"before": measurement("original", peak=before), "after": measurement("result", peak=after)}
    return dataclasses.replace(
        fast(), recipe="checkpoint", mode="training", aim="memory", speedup=comparison(ratio), candidates=(), **sides
    )


def test_what_is_saved_is_the_headline_and_time_its_price():
    found = report()
    assert not found.failing
    assert found.savings[0].ratio == pytest.approx(3.1)
    assert _facts.headline(found).text == "3.1× less tensor peak at 1.33× the time"
    assert _facts.headline(found).tone == "good"


def test_saving_nothing_is_a_failure_whatever_the_time():
    assert "saves no memory" in report(after=309.0, ratio=1.2).failing


def test_what_was_not_measured_is_no_saving():
    found = report()
    unknown = dataclasses.replace(found.after, tensor_peak_bytes=Quantity.missing("B", "no accounting"))
    assert "none of it was measured (no accounting)" in dataclasses.replace(found, after=unknown).failing


def test_elsewhere_slower_is_the_failure():
    found = dataclasses.replace(report(), aim="speed")
    assert found.savings == ()
    assert found.speedup.verdict == Verdict.SLOWER
    assert "slower here" in found.failing


def test_a_chain_with_a_recipe_for_memory_aims_at_memory():
    assert (chain_of("bf16").aim, chain_of("bf16+accumulate(4)").aim) == ("speed", "memory")
