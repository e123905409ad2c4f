"""What of JAX models is not pruned, with the reason."""

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("flax")
from flax import linen, nnx
from jax_compression_models import filled, made, prune, rows

from perfkit import InvalidInputError, UnsupportedError


def test_nothing_left_to_remove_is_said():
    model, x = made("conv")
    result = prune(model, x, round_to=4, amount=0.1)
    assert result.effect.status == "NO_EFFECT"
    assert "as a multiple of 4" in {item.name: item.reason for item in result.effect.skipped}["conv"]


def test_a_norm_over_features_keeps_them():
    class Normed(nnx.Module):
        def __init__(self, rngs):
            self.wide, self.norm = nnx.Linear(6, 8, rngs=rngs), nnx.LayerNorm(8, rngs=rngs)
            self.inner, self.out = nnx.Linear(8, 12, rngs=rngs), nnx.Linear(12, 3, rngs=rngs)

        def __call__(self, x):
            return self.out(nnx.relu(self.inner(self.norm(self.wide(x)))))

    result = prune(filled(lambda: Normed(nnx.Rngs(0))), rows(2, 6))
    assert result.effect.notes == ("inner: 12 → 6",)
    assert "all of it at once" in {item.name: item.reason for item in result.effect.skipped}["wide"]


def test_a_unit_whose_absence_shows_is_kept():
    """Adding up squashed features: at zero a unit still adds sigmoid(0), so taking it away changes the sum."""

    def model(params, x):
        return jnp.einsum("bi,bi->b", jax.nn.sigmoid(x @ params["w"]["a"]), jax.nn.sigmoid(x @ params["w"]["b"]))

    params = {"w": {"a": rows(6, 8), "b": rows(6, 8)[::-1]}}
    with pytest.raises(UnsupportedError, match="does not compute what it computes with them at zero"):
        prune(model, rows(4, 6), params=params)


def test_a_function_that_states_its_sizes_is_refused():
    def fixed(params, x):
        return (x @ params["a"]).reshape(4, 8) @ params["b"]

    params = {"a": jnp.ones((6, 8)), "b": jnp.ones((8, 3))}
    with pytest.raises(UnsupportedError, match="does not run with fewer units"):
        prune(fixed, jnp.ones((4, 6)), params=params)


def test_linen_that_declares_its_features_is_refused():
    class Dense(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(3)(linen.relu(linen.Dense(8)(x)))  # Dense_0 is the one that is made first: the last

    x = jnp.ones((4, 6))
    with pytest.raises(UnsupportedError, match=r"sizes of their layers in their code \(Dense_1: .*fewer units"):
        prune(Dense(), x, params=Dense().init(jax.random.key(0), x))


def test_one_layer_that_cannot_be_cut_does_not_stop_the_others():
    def model(params, x):
        x = jax.nn.relu(x @ params["a"]) @ params["b"]
        return x.reshape(4, 10) @ params["c"]

    result = prune(model, rows(4, 6), params={"a": rows(6, 8), "b": rows(8, 10), "c": rows(10, 3)})
    assert result.effect.notes == ("a: 8 → 4",)
    assert "does not run" in {item.name: item.reason for item in result.effect.skipped}["b"]


def test_an_operation_without_a_rule_freezes():
    def model(params, x):
        return jnp.sort(x @ params["a"], axis=-1) @ params["b"]

    result = prune(model, rows(4, 6), params={"a": rows(6, 8), "b": rows(8, 3)})
    assert result.effect.status == "NO_EFFECT"
    assert "'sort' is not understood" in result.effect.skipped[0].reason


def test_what_cannot_be_asked():
    model, x = made("conv")
    with pytest.raises(InvalidInputError, match="needs gradients"):
        prune(model, x, criterion="taylor")
    with pytest.raises(InvalidInputError, match="mode='training'"):
        prune(model, x, distill=True)
    with pytest.raises(UnsupportedError, match="pass example_inputs"):
        prune(model, None)
    with pytest.raises(UnsupportedError, match="has no parameters"):
        prune(lambda a: a @ a.T, x[0, :, :, 0])
    with pytest.raises(InvalidInputError, match="'convv' matches no layer"):
        prune(model, x, include="convv")
