"""Numbers read well, and never claim more than they hold."""

from __future__ import annotations

import math

import pytest

from perfkit import _proof
from perfkit._quantity import Quantity, Verdict
from perfkit.reporting import _format


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1,023 B"),
        (1024, "1.00 KiB"),
        (1023.99 * 1024, "1.00 MiB"),
        (32.7 * 2**20, "32.7 MiB"),
        (-5 * 2**20, "−5.00 MiB"),
        (3 * 2**60, "3,072 PiB"),
        (math.inf, "not finite"),
    ],
)
def test_bytes(value, told):
    assert _format.format_bytes(value) == told


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (0, "0 ms"),
        (2.5e-4, "250 ns"),
        (0.85, "850 µs"),
        (0.9999, "1.00 ms"),
        (12.345, "12.3 ms"),
        (999.9, "1.00 s"),
        (4500, "4.50 s"),
        (192_000, "3.2 min"),
        (math.nan, "not finite"),
    ],
)
def test_milliseconds(value, told):
    assert _format.format_ms(value) == told


@pytest.mark.parametrize(
    ("value", "told"),
    [(1.8449, "1.84×"), (0.05, "0.05×"), (12.34, "12.3×"), (1234.5, "1,234×"), (math.inf, "not finite")],
)
def test_ratio(value, told):
    assert _format.format_ratio(value) == told


@pytest.mark.parametrize(
    ("value", "told"),
    [(0, "0"), (1234.5, "1,234"), (12.345, "12.3"), (0.00123, "0.00123"), (3.2e-6, "3.2e-6"), (-2.5, "−2.50")],
)
def test_number(value, told):
    assert _format.format_number(value) == told


@pytest.mark.parametrize(("ratio", "told"), [(672.8, "673"), (12.34, "12.3"), (1.0, "1.00"), (0.0291, "0.029")])
def test_a_ratio_reads_the_same_wherever_it_stands(make, ratio, told):
    compared = make.comparison(ratio, spread=0.1, verdict=Verdict.FASTER)
    assert _format.format_interval(compared)[0] == f"{told}×"
    assert str(compared).startswith(f"{told}× [")
    assert f" {told}× faster" in _proof._explained(make.report(speedup=compared))


@pytest.mark.parametrize(
    ("value", "told"), [(0, "0"), (0.0123, "0.012"), (3.14e-3, "3.1e-3"), (1.2e-7, "1.2e-7"), (math.nan, "not finite")]
)
def test_error(value, told):
    assert _format.format_error(value) == told


@pytest.mark.parametrize(
    ("share", "told"),
    [(0, "0%"), (1, "100%"), (0.5, "50.0%"), (0.9996, "99.96%"), (1 - 1e-9, "nearly 100%"), (1e-7, "under 0.1%")],
)
def test_only_all_reads_as_all(share, told):
    assert _format.format_percent(share) == told


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        (2.0, 1.0, "−50.0%"),
        (1.0, 1.841, "+84.1%"),
        (1.0, 182.0, "×182"),
        (3, 3, "same"),
        (1e6, 1e6 + 1, "about same"),
        (0, 5, ""),
        (5, math.nan, ""),
    ],
)
def test_change(before, after, told):
    assert _format.format_change(before, after) == told


@pytest.mark.parametrize(
    ("quantity", "told"),
    [
        (Quantity(2**20, "B"), "1.00 MiB"),
        (Quantity(0.0451, "s"), "45.1 ms"),
        (Quantity(0.0, "s"), "0 s"),
        (Quantity(3.0, "ms"), "3.00 ms"),
        (Quantity(0.9984, "ratio"), "99.8%"),
        (Quantity(0.2, "calls"), "1 call"),
        (Quantity(1673.2, "calls"), "1,674 calls"),
        (Quantity(50.1, "dB"), "50.1 dB"),
        (Quantity(math.inf, "dB"), "not finite (dB)"),
        (Quantity.missing("B", "why"), "unavailable"),
    ],
)
def test_quantity(quantity, told):
    assert _format.format_quantity(quantity) == told


def test_interval_gets_a_third_decimal_only_where_two_hide_it(make):
    assert _format.format_interval(make.comparison(1.84)) == ("1.84×", "[1.80, 1.88]")
    tight = make.comparison(1.004, 0.003, Verdict.SAME)
    assert _format.format_interval(tight) == ("1.004×", "[1.001, 1.007]")


def test_clean_leaves_one_safe_line():
    assert _format.clean("a\n b\tc") == "a b c"
    assert _format.clean("\x1b[31mred\x00") == "\ufffd[31mred\ufffd"
    assert _format.clean("safe\u202egnp.exe\u202c") == "safegnp.exe"
    assert _format.clean("\ud800\ufffe\x9b") == "\ufffd" * 3
    assert _format.clean("👩‍🔬 模型 é") == "👩‍🔬 模型 é"


def test_chain_breaks_between_recipes_only():
    assert _format.spaced("bf16+compile(flags='a+b')+prune") == "bf16 + compile(flags='a+b') + prune"


def test_shorten_and_listing_say_what_they_left_out():
    assert _format.shorten("abcdef", 4) == "abc…"
    assert _format.shorten("abcd", 4) == "abcd"
    assert _format.listing("abcd", 2) == "a, b and 2 more"
    assert _format.listing("ab", 2) == "a, b"
