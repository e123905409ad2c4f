"""Samples of a JAX model, whichever dimension of its inputs they lie along."""

import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
from flax import nnx

from perfkit import backends
from perfkit._batch import Samples

TIME, ROWS = 7, 5
X = jnp.ones((TIME, ROWS, 4))
W = {"w": jnp.ones((4, 6)), "u": jnp.eye(6), "layers": jnp.ones((TIME, 4, 4))}


def loop(params, x):
    """Time first."""

    def step(h, x):
        h = jnp.tanh(x @ params["w"] + h @ params["u"])
        return h, h

    return jax.lax.scan(step, jnp.zeros((*x.shape[1:-1], 6)), x)[1]


def turned(params, x):
    return jnp.swapaxes(loop(params, jnp.swapaxes(x, 0, 1)), 0, 1)


def one_by_one(params, x):
    return jax.vmap(lambda row: loop(params, row))(x)


def deep(params, x):
    """A loop over layers, of which there are as many as rows."""
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["layers"])[0]


def reading(params, x):
    """It cannot be traced."""
    return x @ params["w"] if float(x[0, 0, 0]) else x @ params["w"] * 2


def rnn(time_major):
    return nnx.RNN(nnx.GRUCell(4, 6, rngs=nnx.Rngs(0)), time_major=time_major, rngs=nnx.Rngs(1))


@pytest.mark.parametrize(
    ("function", "x", "expected"),
    [
        (loop, X, Samples(ROWS, 1)),
        (jax.jit(loop), X, Samples(ROWS, 1)),
        (loop, X[:, 0], None),
        (turned, X, Samples(TIME, 0)),
        (one_by_one, X, Samples(TIME, 0)),
        (deep, X, Samples(TIME, 0)),
        (deep, X[:, 0], Samples(TIME, 0)),
        (reading, X, Samples(TIME, 0)),
        (rnn(True), X, Samples(ROWS, 1)),
        (rnn(False), X, Samples(TIME, 0)),
    ],
)
def test_samples_of_a_model(function, x, expected):
    about = {"mode": "inference", "loss": None, "targets": None, "optimizer": None, "seed": 0}
    assert (
        backends.of(function, (x,))
        .bind(function, None if isinstance(function, nnx.Module) else W, (x,), **about)
        .samples
        == expected
    )
