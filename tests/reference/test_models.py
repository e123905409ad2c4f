"""The models themselves: shapes, sizes, modes, and what their outputs may and may not depend on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from perfkit import reference

# Worked out by hand from the layers, torch's: a recurrent layer has two biases there and one in flax.
PARAMETERS = {
    "cnn": (1 * 9 * 32 + 32) + (5408 * 128 + 128) + (128 * 10 + 10),
    "cnn2": (1 * 9 * 32 + 32) + (32 * 9 * 64 + 64) + (3136 * 128 + 128) + (128 * 10 + 10),
    "rnn": (10 + 50 + 2) * 50 + 51,
    "lstm": 4 * (10 + 50 + 2) * 50 + 51,
    "text_rnn": 25_000 * 100 + (100 + 128 + 2) * 128 + (128 + 128 + 2) * 128 + 129,
    "text_lstm": 25_000 * 100 + 4 * (100 + 128 + 2) * 128 + 4 * (128 + 128 + 2) * 128 + 129,
}
SECOND_BIASES = {"cnn": 0, "cnn2": 0, "rnn": 50, "lstm": 200, "text_rnn": 2 * 128, "text_lstm": 2 * 4 * 128}
INPUTS = {
    "cnn": {"torch": [((3, 1, 28, 28), "float32")], "jax": [((3, 28, 28, 1), "float32")]},
    "rnn": {"torch": [((28, 3, 10), "float32")], "jax": [((28, 3, 10), "float32")]},
    "text_rnn": {
        "torch": [((3, 128), "int64"), ((3,), "int64")],
        "jax": [((3, 128), "int32"), ((3,), "int32")],
    },
}
INPUTS |= {"cnn2": INPUTS["cnn"], "lstm": INPUTS["rnn"], "text_lstm": INPUTS["text_rnn"]}

pytestmark = pytest.mark.parametrize("framework", ["torch", "jax"])
each_model = pytest.mark.parametrize("name", reference.MODELS)
each_text_model = pytest.mark.parametrize("name", ["text_rnn", "text_lstm"])


def compiled(model):
    """A plain function of the inputs; flax scans are compiled once instead of once a call."""
    if isinstance(model, torch.nn.Module):
        return lambda *inputs: model(*inputs).detach().numpy()
    return functools.partial(nnx.jit(lambda model, *inputs: model(*inputs)), model)


@each_model
def test_inputs_and_outputs_have_the_documented_shapes(name, framework):
    model, inputs = reference.load(name, framework=framework, batch_size=3)
    assert [(tuple(x.shape), str(x.dtype).removeprefix("torch.")) for x in inputs] == INPUTS[name][framework]
    outputs = compiled(model)(*inputs)
    assert outputs.shape == ((3, 10) if name.startswith("cnn") else (3, 1))
    assert outputs.dtype == np.float32


@each_model
def test_parameters_are_those_of_the_layers_worked_out_by_hand(name, framework):
    model, _ = reference.load(name, framework=framework, batch_size=1)
    if framework == "torch":
        assert sum(each.numel() for each in model.parameters()) == PARAMETERS[name]
    else:
        # every variable of the model is a parameter: calling it changes nothing and draws no random number
        assert sum(each.size for each in jax.tree.leaves(nnx.state(model))) == PARAMETERS[name] - SECOND_BIASES[name]
        assert jax.tree.structure(nnx.state(model)) == jax.tree.structure(nnx.state(model, nnx.Param))


@each_model
def test_loading_gives_an_ordinary_pair_in_inference_mode_and_a_task_trains(name, framework):
    loaded = reference.load(name, framework=framework, batch_size=1)
    assert isinstance(loaded, tuple)
    assert len(loaded) == 2
    work = reference.task(name, framework=framework, batch_size=1)
    if framework == "torch":
        assert not loaded.model.training
        assert work.model.training
    else:
        assert isinstance(loaded.model, nnx.Module)
        assert isinstance(work.model, nnx.Module)


def test_the_seed_decides_the_weights_and_nothing_else_does(framework):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (reference.load("lstm", framework=framework, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)  # the caller's random numbers go on as if nothing had been made
    outputs = [np.asarray(compiled(model)(*first.example_inputs)) for model, _ in (first, again, other)]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert not np.array_equal(outputs[0], outputs[2])


def test_a_batch_beyond_the_data_begins_again(framework):
    held_out = len(reference.data.digits().test)
    _, (x,) = reference.load("cnn", framework=framework, batch_size=held_out + 2)
    np.testing.assert_array_equal(np.asarray(x[held_out:]), np.asarray(x[:2]))
    assert not np.array_equal(np.asarray(x[0]), np.asarray(x[1]))


@each_text_model
def test_padding_cannot_reach_the_answer_but_the_last_word_does(name, framework):
    model, (ids, lengths) = reference.load(name, framework=framework, batch_size=2)
    call = compiled(model)
    ids, lengths = np.asarray(ids).copy(), np.array([40, 128], dtype=np.asarray(lengths).dtype)
    convert = torch.from_numpy if framework == "torch" else jnp.asarray
    repadded, reworded = ids.copy(), ids.copy()
    repadded[0, 40:] = 7
    reworded[0, 39] += 1
    plain, padded, worded = (np.asarray(call(convert(x), convert(lengths))) for x in (ids, repadded, reworded))
    np.testing.assert_array_equal(plain, padded)
    assert plain[0] != worded[0]
    assert plain[1] == worded[1]


@pytest.mark.parametrize("name", ["cnn", "rnn", "lstm", "text_lstm"])
def test_half_precision_weights_and_inputs_stay_in_half_precision(name, framework):
    model, inputs = reference.load(name, framework=framework, batch_size=2)
    if framework == "torch":
        inputs = [x.bfloat16() if x.is_floating_point() else x for x in inputs]
        assert model.bfloat16()(*inputs).dtype == torch.bfloat16
    else:
        structure, state, *inputs = jax.tree.map(
            lambda x: x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x,
            (*nnx.split(model), *inputs),
        )
        outputs = compiled(nnx.merge(structure, state))(*inputs)
        # nnx.Embed answers in the type it was made with, whatever becomes of its weights, and what follows is promoted
        assert outputs.dtype == (jnp.float32 if name.startswith("text") else jnp.bfloat16)
