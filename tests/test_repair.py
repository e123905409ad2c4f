"""Accuracy repair: layers whose rounding costs too much are given back, and the report says which and why."""

import pytest

import perfkit
from perfkit import FidelityError

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("hasty")


class Uneven(torch.nn.Module):
    """`middle` cannot be rounded to 8 bits: one weight of each row, for an input that is 0, dwarfs the others."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = (torch.nn.Linear(16, 16) for _ in range(3))
        with torch.no_grad():
            self.first.weight[0] = 0
            self.first.bias[0] = 0
            self.middle.weight[:, 0] = 1e4

    def forward(self, x):
        return self.last(torch.relu(self.middle(torch.relu(self.first(x)))))


@pytest.fixture
def given():
    return {"model": Uneven().eval(), "example_inputs": (torch.randn(32, 16),)}


def test_the_sensitive_layer_is_given_back_and_the_others_are_kept(given):
    report = perfkit.optimize(**given, recipe="int8").report
    effect = report.steps[0].effect
    assert effect.touched == ("first", "last")
    (skipped,) = [item for item in effect.skipped if item.name == "middle"]
    assert skipped.reason.startswith("given back: with this layer alone, the relative error is ")
    assert float(skipped.reason.rsplit(maxsplit=1)[1]) > report.fidelity.limit
    assert report.fidelity.ok
    assert report.recipe == "int8(exclude=('middle',))"


def test_the_callers_metric_decides_where_there_is_one(given):
    model, (x,) = given["model"], given["example_inputs"]
    with torch.no_grad():
        wanted = model(x)

    def closeness(candidate):
        with torch.no_grad():
            return -float((candidate(x) - wanted).norm() / wanted.norm())

    report = perfkit.optimize(**given, recipe="int8", evaluate=closeness, max_drop=0.05).report
    assert report.metric.ok
    assert report.steps[0].effect.touched == ("first", "last")
    assert "evaluate() falls by" in report.steps[0].effect.skipped[0].reason
    careless = perfkit.optimize(**given, recipe="int8", evaluate=lambda _: 1.0).report
    assert careless.steps[0].effect.touched == ("first", "middle", "last"), "the metric sees nothing wrong"


def test_what_cannot_be_repaired_is_refused_and_an_error_in_strict(given):
    result = perfkit.optimize(**given, recipe="int8", tolerance=1e-7)
    assert result.model is given["model"]
    assert result.report.outcome == "original returned"
    assert result.report.recipe == "int8"
    assert "did not help" in result.report.explanation
    with pytest.raises(FidelityError, match="did not help") as refused:
        perfkit.optimize(**given, recipe="int8", tolerance=1e-7, strict=True)
    assert refused.value.report.recipe == "int8"


def test_in_jax_too():
    jax = pytest.importorskip("jax")
    keys = jax.random.split(jax.random.key(0), 3)
    params = {name: jax.random.normal(key, (16, 16)) for name, key in zip(("a", "b", "c"), keys, strict=True)}
    params["a"] = params["a"].at[:, 0].set(0.0)
    params["b"] = params["b"].at[0].set(1e4)  # dwarfs the others of its column, for an input that is 0

    def model(params, x):
        for name in ("a", "b"):
            x = jax.numpy.tanh(x @ params[name])
        return x @ params["c"]

    x = jax.random.normal(jax.random.key(1), (32, 16))
    report = perfkit.optimize(model, "int8", params=params, example_inputs=(x,)).report
    assert report.steps[0].effect.touched == ("a", "c")
    assert report.steps[0].effect.skipped[0].reason.startswith("given back")
    assert report.fidelity.ok
