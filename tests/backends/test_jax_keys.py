"""Random keys of a JAX model: others give other draws, wherever they are held, what two seeds differ by is allowed."""

import pytest

pytest.importorskip("flax")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx

import perfkit
from perfkit import backends
from perfkit._variant import ready
from perfkit.backends.jax_keys import other_keys

pytestmark = pytest.mark.usefixtures("hasty")
X, Y = jax.random.normal(jax.random.key(0), (16, 6)), jnp.zeros((16, 3))


class Held(nnx.Module):
    """Its keys are its own."""

    def __init__(self):
        self.linear, self.dropout = nnx.Linear(6, 3, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.dropout(self.linear(x))


class Given(linen.Module):
    """Its keys are inputs."""

    @linen.compact
    def __call__(self, x):
        return linen.Dropout(0.5, deterministic=False)(linen.Dense(3)(x))


def test_a_key_that_a_model_returns_is_compared_by_its_numbers():
    def step(params, key, x):
        return x @ params, jax.random.split(key, 3)

    result = perfkit.optimize(step, "bf16", params=jnp.ones((6, 3)), example_inputs=(jax.random.key(0), X))
    assert result.report.fidelity.ok


def task(kind):
    about = {"mode": "training", "loss": lambda out, y: jnp.mean((out - y) ** 2), "targets": Y}
    about["optimizer"] = optax.sgd(0.1)
    if kind == "held":
        return about | {"model": Held(), "params": None, "example_inputs": (X,)}
    if kind == "none":
        params = {"w": jnp.ones((6, 3))}
        return about | {"model": lambda params, x: x @ params["w"], "params": params, "example_inputs": (X,)}
    key = jax.random.PRNGKey(1) if kind == "raw" else jax.random.key(1)
    params = {"params": {"Dense_0": {"kernel": jnp.ones((6, 3)), "bias": jnp.zeros(3)}}}
    return about | {"model": Given(), "params": params, "example_inputs": {"x": X, "rngs": {"dropout": key}}}


@pytest.mark.parametrize("kind", ["held", "given", "raw", "none"])
def test_another_seed_draws_other_numbers_and_leaves_the_state(kind):
    given = task(kind)
    backend = backends.of(given["model"], given["example_inputs"])
    work = backend.bind(seed=3, **given)
    finished = ready(work, "nothing").finished
    first, other, again = (backend.losses(work, finished, 3, seed) for seed in (3, 4, 3))
    assert first == again
    assert (other[0] == first[0]) == (kind == "none")


def test_what_two_seeds_differ_by_is_allowed_where_micro_batches_draw_in_another_order():
    settings = {"budget_s": 0.01, "tolerance": 0.02, "on_slower": "revert"}  # it is too small to save any memory
    close = perfkit.optimize(**task("held"), recipe="accumulate(4)", **settings).report.fidelity
    assert close.original_error > 0.01
    assert close.ok


def test_keys_in_arrays_and_what_only_looks_like_one():
    tree = {"many": jax.random.split(jax.random.key(0), 6).reshape(2, 3), "words": jnp.ones((4, 2), jnp.uint32)}
    found = other_keys(tree, 1)
    assert found["many"].shape == (2, 3)
    assert not (jax.random.key_data(found["many"]) == jax.random.key_data(tree["many"])).all(-1).any()
    np.testing.assert_array_equal(found["words"], tree["words"])
