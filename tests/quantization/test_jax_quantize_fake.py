"""Quantization-aware training in JAX: learns, and becomes real integers with the same outputs."""

import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxpr_walk import equations, relative_error
from quantize_models import FakeQuantize, Quantize, bound, case, products, program

from perfkit import UnsupportedError
from perfkit.backends.jax_backend import BACKEND
from perfkit.quantization import jax_quantize
from perfkit.quantization.jax_fake import fake
from perfkit.quantization.jax_rewrite import MARK


def squared(outputs, targets):
    return jnp.square(outputs - targets).mean()


def trained(name, steps=8, **options):
    """A model trained under qat for a few steps: how it was given, finished, the effect, and the losses."""
    given = case(name)[0]
    inputs = given["example_inputs"]
    targets = jnp.ones_like(program(bound(**given))[1])
    work = bound(**given, mode="training", loss=squared, targets=targets, optimizer=optax.adam(2e-2))
    fake_work, effect = jax_quantize.qat(work, FakeQuantize(**options))
    finished = BACKEND.finish(fake_work)
    losses = [float(finished.train_step((inputs, targets))) for _ in range(steps)]
    return given, finished, effect, losses


def inference(given, finished):
    """The trained model as optimize() would be given it."""
    params = None if finished.params is None else finished.params()
    return bound(finished.model, given["example_inputs"], params)


@pytest.mark.parametrize(("name", "bits"), [("cnn", 8), ("lstm", 8), ("linen", 4), ("gru", 4), ("control", 8)])
def test_it_learns_and_its_conversion_gives_the_same_outputs(name, bits):
    given, finished, effect, losses = trained(name, weight_bits=bits)
    layers = case(name)[1]
    assert effect.simulated
    assert set(effect.touched) == layers
    assert losses[-1] < 0.8 * losses[0]
    rounded = inference(given, finished)
    text, expected = program(rounded)
    assert not products(text, "s32")
    real, effect = jax_quantize.int8(rounded, Quantize())
    assert set(effect.touched) == layers
    assert any("as trained" in note for note in effect.notes)
    text, got = program(real)
    assert products(text, "s32")
    # The same integers; but float32 sums of another order may round an activation to the next integer: one in 127,
    # of few. A conversion that rounded anything else would err by the rounding itself, over 1e-3 at 8 bits.
    assert relative_error(got, expected) < 1e-3
    bound_on = {8: 127, 4: 7}[bits]
    values = [leaf for leaf in jax.tree.leaves(real.model.params) if leaf.dtype == jnp.int8]
    assert max(int(jnp.abs(leaf).max()) for leaf in values) == bound_on
    assert BACKEND.size(rounded)[0] > 1.5 * BACKEND.size(real)[0]


def test_layers_left_out_of_training_are_left_out_of_the_conversion():
    given, finished, effect, _ = trained("cnn", steps=1, exclude="conv1")
    assert effect.touched == ("conv2", "fc")
    _, effect = jax_quantize.int8_dynamic(inference(given, finished), Quantize())
    assert effect.touched == ("conv2", "fc")
    assert effect.skipped[0].name == "conv1"
    assert effect.skipped[0].reason == "it was not trained with fake quantization"


def test_a_layer_excluded_from_the_conversion_stays_as_trained():
    given, finished, _, _ = trained("cnn", steps=1)
    rounded = inference(given, finished)
    real, effect = jax_quantize.int8(rounded, Quantize(exclude="fc"))
    assert effect.touched == ("conv1", "conv2")
    text, got = program(real)
    assert products(text, "s32") == ["convolution", "convolution"]
    assert relative_error(got, program(rounded)[1]) < 1e-3


def test_gradients_pass_straight_through():
    x = jax.random.normal(jax.random.key(0), (3, 5))
    rounded = fake("rows", 8, (1,))
    np.testing.assert_array_equal(jax.grad(lambda x: (2 * rounded(x)).sum())(x), np.full((3, 5), 2.0))
    steps = np.asarray(rounded(x)) / (np.abs(x).max(1, keepdims=True) / 127)
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-4)
    assert np.abs(steps).max() == pytest.approx(127)


def test_recomputation_is_kept():
    given = case("control")[0]
    work = bound(**given, mode="training", loss=squared, targets=jnp.zeros((4, 8)), optimizer=optax.sgd(0.1))
    low, _ = jax_quantize.qat(work, FakeQuantize())
    jaxpr = jax.make_jaxpr(low.model.function())(low.model.params, (), *low.inputs.args)
    (checkpoint,) = equations(jaxpr, "checkpoint", "remat2")
    names = {eqn.params["name"] for eqn in equations(checkpoint.params["jaxpr"], "jit")}
    assert MARK + "rows" in names


def test_it_needs_training():
    with pytest.raises(UnsupportedError, match="mode='training'"):
        jax_quantize.qat(bound(**case("cnn")[0]), FakeQuantize())
