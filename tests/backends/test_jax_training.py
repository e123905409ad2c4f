"""A training step is the framework's own: nothing but what a recipe asks for stands between gradients and optimizer."""

import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
import numpy as np
import optax

import perfkit

pytestmark = pytest.mark.usefixtures("hasty")


def _linear(params, x):
    return x @ params["w"]


def _squared(outputs, targets):
    return jnp.mean((outputs - targets) ** 2)


def test_a_step_of_an_optimizer_that_feels_the_size_of_gradients():
    """Adam hides a factor on all gradients; plain descent does not."""
    random = np.random.default_rng(0)
    x, y, w = (jnp.asarray(random.normal(size=size), jnp.float32) for size in ((16, 4), (16, 2), (4, 2)))
    result = perfkit.optimize(
        _linear,
        "compile",
        params={"w": w},
        mode="training",
        example_inputs=(x,),
        targets=y,
        loss=_squared,
        optimizer=optax.sgd(0.1),
    )
    expected = w
    for _ in range(5):
        loss = result.train_step((x, y))
        assert loss == pytest.approx(float(_squared(x @ expected, y)), rel=1e-5)
        expected -= 0.1 * jax.grad(lambda w: _squared(x @ w, y))(expected)
