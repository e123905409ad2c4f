"""The int8 recurrent kernel in JAX: bit for bit its reference with known scales, and what JAX does with it."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("jax")

import jax
import jax.numpy as jnp
import numpy as np
import torch
from rnn_int8_calls import MODES, make

from perfkit import InvalidInputError, UnsupportedError
from perfkit.kernels import _native
from perfkit.kernels.rnn_int8 import jax_op, reference, weights
from perfkit.kernels.rnn_int8.problem import GATES, OP, Problem

if _native.find_compiler() is None:
    pytest.skip("no C++ compiler is installed", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("seeded")
X_SCALE, H_SCALE = 2.2 / 127, 0.6 / 127
"""So that some of both lie beyond their grids."""


def arrays(layer):
    given = layer.q_ih, layer.scale_ih, layer.q_hh, layer.scale_hh, layer.bias, layer.bias_hn
    return [None if each is None else jnp.asarray(each.numpy()) for each in given]


def call(layer, x, h, c, lengths=None):
    states = jnp.asarray(h.numpy()), jnp.asarray(c.numpy()) if layer.mode == "LSTM" else None
    scales = jnp.float32(X_SCALE), jnp.float32(H_SCALE)
    given = jnp.asarray(x.numpy()), *states, *arrays(layer), *scales, lengths
    return jax.jit(jax_op.layer, static_argnums=0)(layer.mode, *given)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (9, 20, 3, 4), (33, 47, 17, 6)], ids=str)
def test_bits_are_those_of_the_reference(mode, sizes):
    inputs, hidden, batch, steps = sizes
    layer = make(mode, inputs, hidden)
    x, h, c = torch.randn(steps, batch, inputs), 2 * torch.randn(batch, hidden), torch.randn(batch, hidden)
    y, hn, cn = call(layer, x, h, c)
    fixed = {"x_fixed": float(np.float32(X_SCALE)), "h_fixed": float(np.float32(H_SCALE))}
    expected = reference.layer(x.flatten(0, 1), [batch] * steps, layer, h, c, **fixed)
    np.testing.assert_array_equal(y.reshape(-1, hidden), expected[0].numpy())
    np.testing.assert_array_equal(hn, expected[1].numpy())
    if mode == "LSTM":
        np.testing.assert_array_equal(cn, expected[2].numpy())
    else:
        assert cn is None


@pytest.mark.parametrize("mode", MODES)
def test_each_row_has_its_own_length(mode):
    layer, lengths = make(mode, 5, 18), [3, 6, 1, 6, 2]
    x, h, c = torch.randn(6, 5, 5), torch.randn(5, 18), torch.randn(5, 18)
    y, *states = call(layer, x, h, c, jnp.array(lengths, jnp.int32))
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        alone, *of_row = call(layer, x[:length, one], h[one], c[one])
        np.testing.assert_array_equal(y[:length, one], alone)
        assert not y[length:, row].any()
        for state, of_one in zip(states, of_row, strict=True):
            assert state is of_one is None or bool((state[one] == of_one).all())


@pytest.mark.parametrize("lengths", [[1, 7, 2], [0, 1, 2]])
def test_lengths_that_are_not_there_fail(lengths):
    x, h = torch.randn(6, 3, 5), torch.zeros(3, 18)
    with pytest.raises(jax.errors.JaxRuntimeError, match="lengths of recurrent rows: expected 1 to T"):
        jax.block_until_ready(call(make("LSTM", 5, 18), x, h, h, jnp.array(lengths, jnp.int32)))


@pytest.mark.parametrize(("mode", "hidden", "inputs"), [("LSTM", 18, 5), ("GRU", 32, 4), ("RNN_TANH", 1, 1)])
def test_weights_are_packed_as_in_torch(mode, hidden, inputs):
    q = make(mode, inputs, hidden).q_ih
    np.testing.assert_array_equal(
        jax_op.pack(jnp.asarray(q.numpy()), GATES[mode]), weights.pack(q, GATES[mode]).numpy()
    )


def test_a_row_with_what_is_no_number_is_none_and_others_are_as_before():
    layer = make("LSTM", 5, 18)
    x, h = torch.randn(4, 3, 5), torch.zeros(3, 18)
    clean, _, _ = call(layer, x, h, h)
    x[1, 1, 2] = torch.nan
    y, hn, _ = call(layer, x, h, h)
    assert bool(jnp.isnan(y[1:, 1]).all())
    assert bool(jnp.isnan(hn[1]).all())
    np.testing.assert_array_equal(y[:, ::2], clean[:, ::2])


@pytest.mark.parametrize("mode", ["LSTM", "GRU"])
def test_vmap_is_more_rows(mode):
    layer = make(mode, 5, 18)
    x, h = torch.randn(4, 6, 5), torch.rand(6, 18)
    y, hn, _ = call(layer, x, h, h)
    given, scales = arrays(layer), (jnp.float32(X_SCALE), jnp.float32(H_SCALE))

    def one(x, h):
        return jax_op.layer(mode, x, h, h if mode == "LSTM" else None, *given, *scales)[:2]

    apart = jnp.asarray(x.numpy()).reshape(4, 2, 3, 5), jnp.asarray(h.numpy()).reshape(2, 3, 18)
    ys, hs = jax.vmap(one, (1, 0), (1, 0))(*apart)
    np.testing.assert_array_equal(ys.reshape(4, 6, 18), y)
    np.testing.assert_array_equal(hs.reshape(6, 18), hn)


def test_what_is_refused():
    layer = make("GRU", 5, 8)
    given, scale = arrays(layer), jnp.float32(0.01)
    x, h = jnp.ones((2, 3, 5)), jnp.zeros((3, 8))
    with pytest.raises(UnsupportedError, match="rounding has no gradient"):
        jax.grad(lambda x: jax_op.layer("GRU", x, h, None, *given, scale, scale)[0].sum())(x)
    with pytest.raises(InvalidInputError, match=r"q_ih is int8 \[24, 5\]: expected int8 \[24, 6\]"):
        jax_op.layer("GRU", jnp.ones((2, 3, 6)), h, None, *given, scale, scale)
    with pytest.raises(InvalidInputError, match=r"lengths is int32 \[2\]: expected int32 \[3\]"):
        jax_op.layer("GRU", x, h, None, *given, scale, scale, jnp.ones(2, jnp.int32))
    made = Problem("cpu", "LSTM", 2, 0, 5, 8)
    assert dict(OP.choose(made).refused)["cpu"] == "something is empty"
    many = Problem("cpu", "LSTM", 2, 1, 10**6, 8)
    assert "could overflow" in dict(OP.choose(many).refused)["cpu"]
