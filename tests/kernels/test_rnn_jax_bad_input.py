"""What the recurrent op in JAX cannot compute is refused by name; lengths that nobody could check stay in bounds."""

import numpy as np
import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
from rnn_jax_calls import SMALL, arrays

from perfkit import InvalidInputError, UnsupportedError
from perfkit.kernels import _native
from perfkit.kernels.rnn import gru, lstm, rnn

needs_compiler = pytest.mark.skipif(_native.find_compiler() is None, reason="no C++ compiler is installed")
X = jnp.zeros((5, 3, 4))
GOOD = [(jnp.zeros((32, 4)), jnp.zeros((32, 8)))]
STATE = jnp.zeros((1, 3, 8))
TOO_LONG = jnp.array([6, 3, 1])


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: lstm(X[0], GOOD), r"x has shape \[3, 4\]: expected \(time, batch, features\)"),
        (lambda: lstm(X[0], GOOD, batch_first=True), r"expected \(batch, time, features\)"),
        (lambda: lstm(X.astype(int), GOOD), "x is int32: expected float32, bfloat16"),
        (lambda: lstm(X, []), "0 groups of weights: expected one for each layer, at least one"),
        (
            lambda: lstm(X, GOOD * 3, bidirectional=True),
            "3 groups of weights: expected one for each layer and direction",
        ),
        (lambda: lstm(X, [GOOD[0][:1]]), r"groups of 1 weights: expected \(w_ih, w_hh\), or"),
        (lambda: lstm(X, GOOD * 2), r"w_ih of layer 1 is float32 \[32, 4\]: expected float32 \[32, 8\]"),
        (lambda: gru(X, GOOD), r"w_ih of layer 0 is float32 \[32, 4\]: expected float32 \[24, 4\], for GRU"),
        (lambda: lstm(X.astype("bfloat16"), GOOD), r"w_ih of layer 0 is float32 \[32, 4\]: expected bfloat16"),
        (lambda: lstm(X, GOOD, STATE[:, :2]), r"h0 is float32 \[1, 2, 8\]: expected float32 \[1, 3, 8\]"),
        (lambda: lstm(X, GOOD, STATE, STATE[..., :1]), r"c0 is float32 \[1, 3, 1\]"),
        (lambda: lstm(X[:0], GOOD), "over 0 steps: expected at least 1"),
        (lambda: lstm(X[:, :0], GOOD), "over 0 batch"),
        (
            lambda: lstm(X, GOOD, lengths=jnp.array([5, 3])),
            r"lengths are int32 \[2\]: expected one integer for each of the 3",
        ),
        (lambda: lstm(X, GOOD, lengths=[5.0, 3, 2]), "lengths are float64"),
        (lambda: lstm(X, GOOD, lengths=[5, 3, 0]), "lengths from 0 to 5: expected 1 to 5"),
        (lambda: lstm(X, GOOD, lengths=[6, 3, 1]), "lengths from 1 to 6"),
        (lambda: jax.jit(lambda: lstm(X, GOOD, lengths=TOO_LONG))(), "lengths from 1 to 6"),
        (lambda: lstm(X, GOOD, dropout=1.5), "dropout is 1.5: expected a probability"),
        (lambda: lstm(X, [*GOOD, (jnp.zeros((32, 8)),) * 2], dropout=0.1, training=True), "needs key="),
        (lambda: lstm(X, GOOD, implementation="cpux"), "no implementation 'cpux' for jax"),
        (lambda: rnn(X, GOOD, nonlinearity="tan"), "did you mean 'tanh'"),
    ],
)
def test_bad_input_is_refused_by_name(run, message):
    with pytest.raises(InvalidInputError, match=message):
        run()


def with_traced_lengths(implementation):
    (x, weights, h0, c0), _ = arrays(SMALL)
    options = {"batch_first": True, "bidirectional": True, "implementation": implementation}
    return jax.jit(lambda lengths: lstm(x, weights, h0, c0, lengths=lengths, **options))


def test_lengths_that_nobody_could_check_stay_within_bounds():
    """Traced lengths are no numbers yet: those too long are T, those below 1 leave a row as it was."""
    run = with_traced_lengths("reference")
    wrong, right = run(jnp.array([9, -1, 2, 3])), run(jnp.array([5, 0, 2, 3]))
    for mine, theirs in zip(wrong, right, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert (right[0][1] == 0).all()
    np.testing.assert_array_equal(right[1][:, 1], arrays(SMALL)[0][2][:, 1])


@needs_compiler
@pytest.mark.parametrize("wrong", [[6, 2, 2, 3], [5, 2, 0, 3]])
def test_the_kernel_checks_traced_lengths_when_it_runs(wrong):
    run = with_traced_lengths("cpu")
    jax.block_until_ready(run(jnp.array([5, 1, 2, 3])))
    with pytest.raises(ValueError, match="expected 1 to T"):
        jax.block_until_ready(run(jnp.array(wrong)))


@needs_compiler
@pytest.mark.parametrize("recompute", [False, True])
def test_a_second_derivative_of_the_kernel_is_refused(recompute):
    (x, weights, _, _), _ = arrays(SMALL)
    options = {"batch_first": True, "bidirectional": True, "implementation": "cpu", "recompute": recompute}
    with pytest.raises(UnsupportedError, match="implementation='reference'"):
        jax.hessian(lambda scale: lstm(scale * x, weights, **options)[0].sum())(1.0)
