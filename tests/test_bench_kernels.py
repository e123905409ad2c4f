"""Other runtimes are compared from processes of their own; a quick run of the kernels' benchmark keeps nothing."""

import ast

import pytest

pytest.importorskip("torch")

from bench import kernels, peers
from perfkit.measure import timing
from perfkit.measure.statistics import pairs_needed


def no_such_runtime():
    """Stands for a runtime that is not installed, or does not take the model."""


def test_a_side_is_compared_with_itself():
    comparison, error = peers.compared("lstm", 1, peers.eager, budget_s=0.1)
    assert error == 0
    assert comparison.pairs >= pairs_needed(timing.CONFIDENCE)
    assert comparison.low <= comparison.ratio <= comparison.high


def test_what_a_runtime_says_when_it_cannot_is_kept():
    with pytest.raises(peers.Refused, match="KeyError: 'no_such_runtime'"):
        peers.compared("lstm", 1, no_such_runtime, budget_s=0.1)


def test_a_quick_run_tells_every_row_and_writes_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(kernels, "RESULTS", tmp_path)
    monkeypatch.setattr(peers, "PEERS", (no_such_runtime,))
    kernels.main(["--quick", "--frameworks", "torch"])
    recipe, peer = map(ast.literal_eval, capsys.readouterr().out.splitlines())
    assert recipe["recipe"] == "fused_kernels"
    assert recipe["low"] <= recipe["ratio"] <= recipe["high"]
    assert peer == {"peer": "no_such_runtime", "refused": "KeyError: 'no_such_runtime'"}
    assert not list(tmp_path.iterdir())
