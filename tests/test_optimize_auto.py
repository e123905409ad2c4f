"""`optimize` without a recipe: the fastest chain, or the original."""

import pytest
from sample_models import arguments, torch_models

import perfkit
from perfkit import InvalidInputError

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("hasty")


def test_auto_returns_the_fastest_or_the_original():
    model, example_inputs = torch_models()["packed_lstm"]
    result = perfkit.optimize(model, example_inputs=example_inputs)
    report = result.report
    assert report.speedup.low >= 1
    assert report.candidates
    won = [candidate for candidate in report.candidates if candidate.outcome == "won"]
    if report.outcome == "original returned":
        assert not won
        assert result.model is model
    else:
        assert [candidate.recipe for candidate in won] == [report.recipe]
    for candidate in report.candidates:
        assert candidate.reason or candidate.outcome == "won"


def test_auto_in_jax_beats_eager():
    pytest.importorskip("jax")
    result = perfkit.optimize(**arguments("jax", "linen"), budget_s=1000)  # however busy the machine is
    assert "compile" in result.report.recipe
    assert result.report.speedup.low > 1
    assert result.report.against_compiled is not None


def test_auto_tries_one_chain_whatever_the_budget_and_tells_how_many_it_left_out():
    pytest.importorskip("jax")
    report = perfkit.optimize(**arguments("jax", "function"), budget_s=1e-3).report
    left = [item for item in report.candidates if "was used up" in item.reason]
    tried = [item for item in report.candidates if item.outcome in ("won", "lost", "failed")]
    assert len(tried) == 1
    assert left
    if report.outcome == "original returned":
        assert f"none of 1 chains is faster than the original, and for {len(left)} more" in report.explanation


def test_auto_needs_inputs():
    with pytest.raises(InvalidInputError, match="example_inputs"):
        perfkit.optimize(torch.nn.Linear(2, 2))
