"""Samples of a JAX model, whichever dimension of its inputs they lie along."""

import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
from flax import nnx

import perfkit
from perfkit import backends
from perfkit._batch import Samples

TIME, ROWS = 7, 5
X = jax.random.normal(jax.random.key(0), (TIME, ROWS, 4))
W = {"w": jnp.ones((4, 6)), "u": jnp.eye(6), "layers": jnp.ones((TIME, 4, 4)) / 4}


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
    return x @ params["w"] if float(jnp.abs(x).max()) else x @ params["w"] * 2


def written_out(params, x):
    """Time first, without a loop that JAX sees."""
    h, outputs = jnp.zeros((x.shape[1], 6)), []
    for step in x:
        h = jnp.tanh(step @ params["w"] + h @ params["u"])
        outputs.append(h)
    return jnp.stack(outputs)


def written_out_and_read(params, x):
    return written_out(params, x) if float(jnp.abs(x).max()) else x


def both_ways(params, x):
    return written_out(params, x) + written_out(params, x[::-1])[::-1]


def last_step(params, x):
    return written_out(params, x)[-1]


def normed(params, x):
    """As batch norm does in training."""
    return (x - x.mean((0, 1))) / x.std((0, 1)) @ params["w"]


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
        (written_out, X, Samples(ROWS, 1)),
        (written_out, jnp.swapaxes(X, 0, 1), Samples(TIME, 1)),
        (written_out_and_read, X, Samples(ROWS, 1)),
        (both_ways, X, Samples(ROWS, 1)),
        (last_step, X, None),
        (lambda params, x: jnp.swapaxes(written_out(params, jnp.swapaxes(x, 0, 1)), 0, 1), X, Samples(TIME, 0)),
        (normed, X, Samples(TIME, 0, assumed=True)),
        (lambda params, x: jnp.cumsum(x, 0) - x.mean(1, keepdims=True), X, None),
        (reading, jnp.ones((TIME, ROWS, 4)), Samples(TIME, 0, assumed=True)),
        (lambda params, x: jnp.where(x[..., :1] > 0, x, -jnp.inf), X, Samples(TIME, 0)),
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


@pytest.mark.usefixtures("hasty")
def test_a_batch_that_nothing_tells_is_said_to_be_assumed():
    report = perfkit.optimize(normed, "compile", params=W, example_inputs=(X,), budget_s=0.01).report
    assert "7 items, if the first dimension of the inputs is the batch" in report.before.throughput.method
    report = perfkit.optimize(loop, "compile", params=W, example_inputs=(X,), budget_s=0.01).report
    assert "5 items, along dimension 1" in report.before.throughput.method
