"""Autocast of whole flax models, and training under it."""

from __future__ import annotations

import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
from autocast_calls import normal, run
from jaxpr_walk import assert_low_but_close, relative_error

from perfkit.backends.jax_autocast import autocast, autocast_counts


@pytest.fixture
def nnx():
    return pytest.importorskip("flax.nnx")


def weight(leaf):
    return normal(leaf.size, *leaf.shape) / 3


def statistic(leaf):
    return jnp.ones(leaf.shape, leaf.dtype) if jnp.issubdtype(leaf.dtype, jnp.number) else jax.random.key(0)


def cnn(nnx):
    class Cnn(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(1, 8, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
            self.dense = nnx.Linear(4 * 4 * 8, 10, rngs=rngs)

        def __call__(self, x):
            x = nnx.max_pool(nnx.relu(self.norm(self.conv(x))), (2, 2), strides=(2, 2))
            return self.dense(x.reshape(x.shape[0], -1))

    return Cnn, normal(1, 3, 8, 8, 1), 2


def lstm(nnx):
    class Lstm(nnx.Module):
        def __init__(self, rngs):
            self.rnn = nnx.RNN(nnx.LSTMCell(4, 5, rngs=rngs))
            self.dense = nnx.Linear(5, 1, rngs=rngs)

        def __call__(self, x):
            return self.dense(self.rnn(x)[:, -1])

    return Lstm, normal(1, 3, 6, 4), 9


def attention(nnx):
    class Attention(nnx.Module):
        def __init__(self, rngs):
            self.attention = nnx.MultiHeadAttention(2, 8, rngs=rngs, decode=False)
            self.norm = nnx.LayerNorm(8, rngs=rngs)

        def __call__(self, x):
            return self.norm(x + self.attention(x))

    return Attention, normal(1, 2, 5, 8), 6


@pytest.mark.parametrize(
    ("build", "dtype"), [(cnn, "bfloat16"), (lstm, "bfloat16"), (lstm, "float16"), (attention, "bfloat16")]
)
def test_flax_models_and_their_gradients(nnx, build, dtype):
    model, x, products = build(nnx)
    # Shapes only, then numbers: running the initializers would take longer than the test.
    definition, params, rest = nnx.split(nnx.eval_shape(lambda: model(nnx.Rngs(0))), nnx.Param, ...)
    params, rest = jax.tree.map(weight, params), jax.tree.map(statistic, rest)

    def forward(params, rest, x):
        return nnx.merge(definition, params, jax.tree.map(jnp.asarray, rest))(x)  # new variables for this trace

    def loss(params, rest, x):
        return jnp.mean(forward(params, rest, x) ** 2)

    assert autocast_counts(forward, dtype, params, rest, x).kept == ()
    gradients = jax.grad(loss), jax.grad(autocast(loss, dtype)), autocast(jax.grad(loss), dtype)
    exact, low, exact_gradient, *low_gradients = run((forward, autocast(forward, dtype), *gradients), params, rest, x)
    assert_low_but_close(low, exact, dtype, products)
    for gradient in low_gradients:
        assert_low_but_close(gradient, exact_gradient, dtype, 3 * products)


def test_training_under_autocast_converges():
    optax = pytest.importorskip("optax")
    target = normal(0, 4, 1)
    x = normal(1, 64, 4)
    y = jnp.tanh(x @ target)
    params = {"first": normal(2, 4, 16) / 2, "bias": jnp.zeros(16), "last": normal(3, 16, 1) / 4}
    optimizer = optax.adam(2e-2)

    def loss(params, x, y):
        return jnp.mean((jnp.tanh(x @ params["first"] + params["bias"]) @ params["last"] - y) ** 2)

    def step(params, state, x, y):
        value, gradients = jax.value_and_grad(loss)(params, x, y)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, value

    def train(step):
        step, weights, state, losses = jax.jit(step), params, optimizer.init(params), []
        for _ in range(60):
            weights, state, value = step(weights, state, x, y)
            losses.append(float(value))
        return weights, losses

    exact, exact_losses = train(step)
    weights, losses = train(autocast(step, "bfloat16"))
    assert losses[-1] < losses[0] / 20
    assert losses != exact_losses
    assert jax.tree.map(lambda a: a.dtype, weights) == jax.tree.map(lambda a: a.dtype, exact)
    assert relative_error(weights, exact) < 0.2
