"""The recipe `fused_kernels` on recurrent layers in JAX: cells, scans that somebody wrote, and what is left alone."""

import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
from flax import linen, nnx
from fused_jax import (
    KEYS,
    LENGTHS,
    SEQUENCES,
    TOLERANCE,
    assert_same,
    gradients,
    kernels_in,
    outputs,
    reasons,
    swapped,
    workload,
)
from jax import lax


class Recurrent(nnx.Module):
    def __init__(self, cell, **options):
        self.rnn = nnx.RNN(cell, rngs=nnx.Rngs(1), **options)

    def __call__(self, x, **options):
        return self.rnn(x, **options)


def cell(kind, **options):
    made = kind(6, 8, rngs=nnx.Rngs(0), **options)
    for _, variable in nnx.iter_graph(made):
        if isinstance(variable, nnx.Param) and variable.ndim == 1:  # flax starts with biases of zero
            variable[...] = jax.random.normal(KEYS[5], variable.shape) / 3
    return made


CELLS = [
    (nnx.OptimizedLSTMCell, {}, {}),
    (nnx.LSTMCell, {}, {"return_carry": True, "reverse": True}),
    (nnx.GRUCell, {"unroll": 2}, {"return_carry": True, "reverse": True, "keep_order": True, "seq_lengths": LENGTHS}),
    (nnx.SimpleCell, {"time_major": True}, {"return_carry": True, "initial_carry": jnp.ones((5, 8))}),
    (nnx.SimpleCell, {}, {"relu": True}),
]


@pytest.mark.parametrize(("kind", "options", "called_with"), CELLS)
def test_recurrent_layers_of_nnx(kind, options, called_with):
    called_with = dict(called_with)
    activation = {"activation_fn": nnx.relu} if called_with.pop("relu", False) else {}
    work = workload(Recurrent(cell(kind, **activation), **options), SEQUENCES, **called_with)
    result, effect = swapped(work)
    assert effect.touched == ("rnn.cell",)
    assert set(kernels_in(result)) == {"cpu"}
    assert_same(outputs(result), outputs(work))
    assert_same(gradients(result), gradients(work), 4 * TOLERANCE)


def test_both_directions_of_lengths_where_the_states_are_not_read():
    model = nnx.Bidirectional(*(nnx.RNN(cell(nnx.LSTMCell), rngs=nnx.Rngs(1)) for _ in range(2)), rngs=nnx.Rngs(1))
    work = workload(model, SEQUENCES, seq_lengths=LENGTHS)
    result, effect = swapped(work)
    assert effect.touched == ("forward_rnn.cell", "backward_rnn.cell")
    assert_same(outputs(result), outputs(work))


def test_recurrent_layers_of_linen():
    class Stack(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.RNN(linen.GRUCell(7))(linen.RNN(linen.OptimizedLSTMCell(8), reverse=True)(x))

    model = Stack()
    work = workload(model, SEQUENCES, params=model.init(KEYS[4], SEQUENCES))
    result, effect = swapped(work)
    assert len(effect.touched) == 2
    assert_same(outputs(result), outputs(work))
    assert_same(gradients(result), gradients(work), 4 * TOLERANCE)


def own_lstm(params, x):
    """One matrix for input and state, a bias for remembering, the carry the other way round."""

    def step(carry, x):
        h, c = carry
        gates = jnp.concatenate([x, h], -1) @ params["w"] + params["b"]
        o, f = jax.nn.sigmoid(gates[:, :16][:, 8:]), jax.nn.sigmoid(gates[:, :8] + 1.0)
        c = jnp.tanh(gates[:, 24:]) * jax.nn.sigmoid(gates[:, 16:24]) + c * f
        return (jnp.tanh(c) * o, c), jnp.tanh(c) * o

    start = jnp.zeros((x.shape[1], 8))
    return lax.scan(step, (start, start), x)


def test_a_scan_that_somebody_wrote():
    params = {"w": jax.random.normal(KEYS[2], (14, 32)) / 4, "b": jax.random.normal(KEYS[3], (32,))}
    work = workload(own_lstm, SEQUENCES, params=params)
    result, effect = swapped(work)
    assert len(effect.touched) == 1
    assert "LSTM on 'cpu'" in effect.notes[0]
    assert_same(outputs(result), outputs(work))
    assert_same(gradients(result), gradients(work), 4 * TOLERANCE)


def scanned(step):
    def function(params, x):
        return lax.scan(lambda h, x: step(params, h, x), jnp.zeros((x.shape[1], 6)), x)

    return function


STEPS = [
    (lambda w, h, x: (jnp.tanh(x @ w["a"] + h @ w["b"]) + h,) * 2, "something else"),
    (lambda w, h, x: (jnp.tanh(x @ w["a"] + h @ w["b"]), h), "something else than the hidden state"),
    (lambda w, h, x: (jnp.tanh(x @ w["a"]),) * 2, "do not all read"),
    (lambda w, h, x: (jnp.sin(x @ w["a"] + h @ w["b"]),) * 2, "uses sin"),
    (lambda w, h, x: (jnp.tanh(x @ w["a"] + (h * h) @ w["b"]),) * 2, "something else than an input with a weight"),
]


@pytest.mark.parametrize(("step", "reason"), STEPS)
def test_reasons_why_a_scan_stays(step, reason):
    params = {"a": jnp.eye(6), "b": jnp.eye(6) / 2}
    work = workload(scanned(step), SEQUENCES, params=params)
    result, effect = swapped(work)
    assert not effect.touched
    assert reason in next(iter(reasons(effect).values()))
    assert_same(outputs(result), outputs(work), 0)


def test_other_cells_and_states_stay():
    cases = {
        "something else than an LSTM": (Recurrent(cell(nnx.SimpleCell, residual=True)), {}),
        "its cell state of every step": (
            Recurrent(cell(nnx.LSTMCell)), {"return_carry": True, "seq_lengths": LENGTHS}
        ),
        "an LSTM, a GRU": (Recurrent(cell(nnx.LSTMCell, activation_fn=nnx.relu)), {}),
    }  # fmt: skip
    for reason, (model, options) in cases.items():
        work = workload(model, SEQUENCES, **options)
        result, effect = swapped(work)
        assert reason in reasons(effect)["rnn.cell"]
        assert_same(outputs(result), outputs(work), 0)
