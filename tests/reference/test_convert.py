"""Weights carried from one framework to the other give the same answers, both ways and there and back."""

import math

import jax
import numpy as np
import pytest
import torch
from flax import nnx

from perfkit import reference
from perfkit.reference.torch_models import LSTM

# Products added up on the way to one output: the longest sums of the layers, times the steps that follow each other.
ADDITIONS = {
    "cnn": 9 + 5408 + 128,
    "cnn2": 9 + 32 * 9 + 3136 + 128,
    "rnn": 28 * (10 + 50) + 50,
    "lstm": 28 * (10 + 50) + 50,
    "text_rnn": 128 * (100 + 128 + 128 + 128) + 128,
    "text_lstm": 128 * (100 + 128 + 128 + 128) + 128,
}

each_model = pytest.mark.parametrize("name", reference.MODELS)


def assert_equal_to_rounding(name, left, right):
    """Two ways of adding n products in float32 drift apart like a random walk of n roundings each."""
    tolerance = np.finfo(np.float32).eps * math.sqrt(2 * ADDITIONS[name]) * np.abs(left).max()
    np.testing.assert_allclose(left, right, rtol=0, atol=tolerance)


def answers(model, inputs):
    if isinstance(model, torch.nn.Module):
        return model(*inputs).detach().numpy()
    return np.asarray(nnx.jit(lambda model, *inputs: model(*inputs))(model, *inputs))


@each_model
def test_torch_to_jax_and_back(name):
    torch_model, torch_inputs = reference.load(name, batch_size=5)
    _, flax_inputs = reference.load(name, framework="jax", batch_size=5)
    flax_model = reference.to_jax(name, torch_model)
    expected = answers(torch_model, torch_inputs)
    assert_equal_to_rounding(name, expected, answers(flax_model, flax_inputs))
    assert_equal_to_rounding(name, expected, answers(reference.to_torch(name, flax_model), torch_inputs))


@each_model
def test_jax_to_torch_and_back(name):
    flax_model, flax_inputs = reference.load(name, framework="jax", batch_size=5)
    _, torch_inputs = reference.load(name, batch_size=5)
    # flax begins with biases of zero, with which a lost bias would not be noticed
    generator = np.random.default_rng(0)
    nnx.update(
        flax_model,
        jax.tree.map(
            lambda x: x + 0.05 * generator.standard_normal(x.shape, dtype=np.float32), nnx.state(flax_model, nnx.Param)
        ),
    )
    torch_model = reference.to_torch(name, flax_model)
    expected = answers(flax_model, flax_inputs)
    assert_equal_to_rounding(name, expected, answers(torch_model, torch_inputs))
    back = reference.to_jax(name, torch_model)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(back), nnx.state(flax_model))
    assert not torch_model.training


def test_the_given_model_is_not_changed_nor_shared():
    torch_model, _ = reference.load("lstm", batch_size=1)
    before = {key: value.clone() for key, value in torch_model.state_dict().items()}
    back = reference.to_torch("lstm", reference.to_jax("lstm", torch_model))
    with torch.no_grad():
        for parameter in back.parameters():
            parameter.zero_()
    assert all(torch.equal(before[key], value) for key, value in torch_model.state_dict().items())


def test_another_models_weights_are_refused():
    with pytest.raises(ValueError, match=r"rnn.weight.*expected .*lstm.weight.*convert an unchanged 'lstm'"):
        reference.to_jax("lstm", reference.load("rnn", batch_size=1).model)
    with pytest.raises(ValueError, match=r"lstm.cell.*expected .*rnn.cell.*convert an unchanged 'rnn'"):
        reference.to_torch("rnn", reference.load("lstm", framework="jax", batch_size=1).model)


def test_weights_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"fc.bias \(2,\).*expected fc.bias \(1,\)"):
        reference.to_jax("lstm", LSTM(output_size=2))
