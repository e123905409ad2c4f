"""Every recipe × framework × mode: works and says what it did, or refuses; the original stays as it was."""

import copy
import re

import numpy as np
import pytest
from sample_models import arguments, training

import perfkit
from perfkit import UnsupportedError
from perfkit._recipe_files import names, recipe_class

# What a recipe for memory saves is no matter here either.
pytestmark = [
    pytest.mark.usefixtures("hasty"),
    pytest.mark.filterwarnings("ignore:.* saves no memory on .* here:perfkit.PerfkitWarning"),
]

MODELS = {"torch": ("cnn", "packed_lstm"), "jax": ("nnx_cnn", "nnx_lstm", "function")}
LOOPS = ("bf16", "compile", "fused_kernels", "int8", "int4_weight_only", "prune")
"""Recipes that meet a loop in JAX in ways of their own; op by op a loop takes half a second a call."""

CASES = [
    (recipe, framework, model)
    for recipe in names()
    for framework in MODELS
    for model in MODELS[framework]
    if model != "nnx_lstm" or recipe in LOOPS
]


def arrays(framework, model):
    """The model's parameters and buffers, as numpy."""
    if framework == "torch":
        return {name: tensor.detach().clone().numpy() for name, tensor in model.state_dict().items()}
    import jax
    from flax import nnx

    state = nnx.state(model) if isinstance(model, nnx.Module) else ()
    return {
        str(i): np.asarray(leaf)
        for i, leaf in enumerate(jax.tree.leaves(state))
        if not str(leaf.dtype).startswith("key")
    }


def assert_same(before, after):
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name], err_msg=name)


@pytest.mark.parametrize(("recipe", "framework", "model"), CASES)
def test_inference(recipe, framework, model):
    pytest.importorskip(framework)
    given = arguments(framework, model)
    before = arrays(framework, given["model"])
    refused = perfkit.plan(**given, recipe=recipe).steps[0].refusal
    if refused:
        with pytest.raises(UnsupportedError, match=re.escape(refused)):
            perfkit.optimize(**given, recipe=recipe)
    else:
        # What is taken away is learned again in training: until then the outputs may be anywhere.
        anywhere = 10.0 if recipe_class(recipe).retrains else None
        result = perfkit.optimize(**given, recipe=recipe, tolerance=anywhere)
    assert_same(before, arrays(framework, given["model"]))
    if refused:
        return
    report = result.report
    step = report.steps[0]
    assert step.recipe == recipe or step.recipe.startswith(f"{recipe}(exclude="), "or with layers given back"
    assert step.effect.touched or step.effect.notes or step.effect.skipped, "no effect without a word"
    assert report.fidelity.ok
    assert 0 < report.speedup.low <= report.speedup.ratio <= report.speedup.high
    assert report.before.model_bytes > 0
    loosest = 1.5e-1 if recipe in ("int4_weight_only", "low_rank") else 5e-2  # coarse by their nature, and say so
    assert recipe_class(recipe)().tolerance <= loosest, "so loose that it would prove nothing"


def test_auto_leaves_out_what_trains_other_weights(framework):
    candidates = perfkit.plan(**training(framework), mode="training").candidates
    for name in (name for name in names() if recipe_class(name).retrains):
        assert [item.recipe for item in candidates if name in item.recipe] == [name]
        assert next(item.reason for item in candidates if item.recipe == name)


@pytest.mark.parametrize("recipe", names())
def test_training(recipe, framework):
    given = training(framework)
    before = arrays(framework, given["model"])
    state = copy.deepcopy(given["optimizer"].state_dict()) if framework == "torch" else None
    refused = perfkit.plan(**given, recipe=recipe, mode="training").steps[0].refusal
    if refused:
        with pytest.raises(UnsupportedError, match=re.escape(refused)):
            perfkit.optimize(**given, recipe=recipe, mode="training")
        return
    result = perfkit.optimize(**given, recipe=recipe, mode="training")
    assert_same(before, arrays(framework, given["model"]))
    if framework == "torch":
        assert given["optimizer"].state_dict() == state
    curves = result.report.losses
    assert len(curves.before) == len(curves.after) >= 50
    assert result.report.fidelity.ok
    batch = given["example_inputs"], given["targets"]
    losses = [float(result.train_step(batch)) for _ in range(30)]
    if not recipe_class(recipe).retrains:
        assert curves.after[0] == pytest.approx(curves.before[0], rel=5e-2)
        assert losses[0] == pytest.approx(curves.before[0], rel=5e-2), "the result starts where the original is"
    assert losses[-1] < losses[0] / 2, "and learns"
