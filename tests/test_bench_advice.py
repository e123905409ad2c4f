"""What `python -m bench.advice` writes down, and what of it is in the page."""

from __future__ import annotations

import json

import pytest

from bench import advice, pages
from perfkit._chain import chain_of
from perfkit._quantity import Quantity
from perfkit.profiling._profile import Finding

FINDING = Finding(
    "a kind", "told", (), 0.5, "time", "channels_last", "do it", Quantity(1.5, "ratio", method="Amdahl: half of it")
)
ROW = {"framework": "torch", "model": "cnn", "mode": "training", "batch_size": 64} | advice.told(FINDING)


def test_a_finding_is_tried():
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU())
    arguments = {"model": model, "example_inputs": (torch.randn(2, 3, 8, 8),), "mode": "inference"}
    row = advice.told(FINDING) | advice.gained(FINDING, arguments, 0.1)
    assert (row["predicted"], row["because"], row["recipe"]) == (1.5, "Amdahl: half of it", "channels_last")
    assert row["low"] <= row["gained"] <= row["high"]
    assert "refused" in advice.gained(FINDING, arguments | {"model": torch.nn.ReLU()}, 0.1) or row["verdict"]


def test_agreement_is_by_a_factor_in_either_direction():
    pairs = [(1.0, 1.4), (1.4, 1.0), (1.0, 1.6), (3.0, 1.0), (None, 2.0), (2.0, None)]
    rows = [{"predicted": predicted, "gained": gained} for predicted, gained in pairs]
    assert advice.agreement(rows) == (2, 4)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"gained": 1.25, "low": 1.2, "high": 1.3, "verdict": "faster"}, "| 1.50× | 1.25× [1.20, 1.30] faster |"),
        ({"gained": 1.2, "low": 0.0, "high": None, "verdict": "too noisy"}, "| 1.50× | 1.20× [0.00, ?] too noisy |"),
        ({"refused": "no such layer"}, "| 1.50× | refused: no such layer |"),
        ({"predicted": None, "gained": 1.0}, "| not predicted | 1.00× |"),
        ({"gained": None}, "| 1.50× | – |"),
    ],
)
def test_a_line_of_the_page(more, expected):
    assert advice.line(ROW | more) == "| cnn, 64, training | torch | a kind | `channels_last` " + expected


def test_a_profile_that_failed_is_told():
    told = advice.line({key: ROW[key] for key in ("framework", "model", "mode", "batch_size")} | {"failed": "why"})
    assert "profile failed: why" in told


@pytest.mark.parametrize("path", sorted(advice.RESULTS.glob("advice-*.json")), ids=lambda path: path.stem)
def test_what_was_recorded_can_be_read(path):
    rows = json.loads(path.read_text())["rows"]
    assert {row["model"] for row in rows} <= {case[0] for case in advice.CASES}
    for row in rows:
        if "recipe" in row:
            chain_of(row["recipe"])
            assert ("gained" in row) != ("refused" in row)


def test_the_page_holds_what_was_recorded():
    written = pages.between(advice.PAGE, advice.MARKS)
    assert written.strip("\n") == "\n".join(advice.measured()).strip("\n")
