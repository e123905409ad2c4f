"""`apply`: a proven chain on the same model elsewhere gives the same model, and measures nothing."""

import copy
import io
import pickle
import re

import numpy as np
import pytest
from sample_models import arguments, training

import perfkit
from perfkit import InvalidInputError, NoEffectError, PerfkitWarning, UnsupportedError, backends
from perfkit._chain import chain_of
from perfkit._recipe_files import names

MODELS = {"torch": ("cnn", "packed_lstm"), "jax": ("function",)}
CASES = [(name, framework, model) for name in names() for framework in MODELS for model in MODELS[framework]]
CASES.append(("compile", "jax", "nnx_cnn"))
UNNAMED = dict.fromkeys(("params", "loss", "targets", "optimizer"))


def outputs(result, given):
    backend = backends.of(given["model"], given["example_inputs"])
    inputs = backend.bind(**(UNNAMED | given), mode="inference", seed=0).inputs
    with backend.without_gradients():
        return [backend.numpy(leaf) for leaf in backend.leaves(result(*inputs.args, **inputs.kwargs))]


@pytest.mark.parametrize(("recipe", "framework", "model"), CASES)
@pytest.mark.filterwarnings("ignore:these touched nothing:perfkit.PerfkitWarning")
def test_the_same_chain_gives_the_same_model(recipe, framework, model):
    """Bit for bit, also from its chain as it is written; copies and loaded weights too."""
    pytest.importorskip(framework)
    given = arguments(framework, model)
    if refusal := perfkit.plan(**given, recipe=recipe).steps[0].refusal:
        with pytest.raises(UnsupportedError, match=re.escape(refusal)):
            perfkit.apply(**given, recipe=recipe)
        return
    first = perfkit.apply(**given, recipe=recipe)
    assert first.report.speedup is None
    assert first.report.not_measured
    again = perfkit.apply(**given, recipe=first.recipe)
    expected = outputs(first, given)
    for a, b in zip(expected, outputs(again, given), strict=True):
        np.testing.assert_array_equal(a, b)
    if framework == "torch":
        again.model.load_state_dict(first.model.state_dict())
        for model in (again.model, copy.deepcopy(first.model)):
            for a, b in zip(expected, outputs(model, given), strict=True):
                np.testing.assert_array_equal(a, b)


def test_what_auto_found_can_be_applied(hasty):
    torch = pytest.importorskip("torch")
    model, x = torch.nn.Linear(4, 4), torch.randn(3, 4)
    found = perfkit.optimize(model, "auto", example_inputs=(x,), budget_s=0.1)
    elsewhere = perfkit.apply(model, found.recipe, example_inputs=(x,)).model
    assert torch.equal(elsewhere(x), found.model(x))
    assert (found.recipe == "nothing") == (found.report.outcome == "original returned")
    assert len(chain_of("nothing")) == 0


def test_auto_is_told_to_measure_first():
    torch = pytest.importorskip("torch")
    with pytest.raises(InvalidInputError, match=r"result\.recipe"):
        perfkit.apply(torch.nn.Linear(2, 2), "auto", example_inputs=(torch.ones(1, 2),))


def test_a_recipe_without_effect_is_told():
    torch = pytest.importorskip("torch")
    model, x = torch.nn.Linear(2, 2), torch.ones(1, 2)
    with pytest.warns(PerfkitWarning, match="channels_last"):
        perfkit.apply(model, "channels_last", example_inputs=(x,))
    with pytest.raises(NoEffectError, match="channels_last"):
        perfkit.apply(model, "channels_last", example_inputs=(x,), strict=True)


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_trained_elsewhere(framework, hasty):
    """Weights that an optimized model learnt go into the original, and from there on."""
    pytest.importorskip(framework)
    given = training(framework)
    result = perfkit.apply(**given, recipe="bf16", mode="training")
    batch = given["example_inputs"], given["targets"]
    losses = [float(result.train_step(batch)) for _ in range(30)]
    assert losses[-1] < losses[0] / 2
    if framework == "torch":
        given["model"].load_state_dict(result.model.state_dict())


def test_pickling_says_what_to_do_instead():
    torch = pytest.importorskip("torch")
    model, x = torch.nn.Sequential(torch.nn.Linear(2, 2)), torch.ones(1, 2)
    result = perfkit.apply(model, "bf16", example_inputs=(x,))
    for save in (pickle.dumps, lambda it: torch.save(it, io.BytesIO())):
        with pytest.raises(pickle.PicklingError, match=r"perfkit\.apply"):
            save(result.model)
