"""The recurrent reference in JAX: against the reference in torch, flax's layers, and by its own derivatives."""

import functools

import numpy as np
import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
from jax.test_util import check_grads
from rnn_jax_calls import PADDED, SMALL, arrays, assert_close, both_passes, call, expected

from perfkit.kernels.rnn import cases, jax_op, jax_reference
from perfkit.kernels.rnn.cases import Case
from perfkit.kernels.rnn.problem import GATES


@pytest.mark.parametrize("case", [case for case in PADDED if case.dtype == "float32" and case.steps == 7], ids=str)
def test_the_reference_is_torch_in_float64(case):
    """Every result and gradient, against another reference, itself checked against torch's own layers."""
    torch = pytest.importorskip("torch")
    from perfkit.kernels.rnn import reference, torch_problem

    given = cases.numbers(case)
    rows = None if given.rows is None else torch.tensor(given.rows)
    leaf = functools.partial(torch.tensor, dtype=torch.float64, requires_grad=True)
    x, weights = leaf(given.x), [[leaf(part) for part in group] for group in given.weights]
    h0, c0 = (None if state is None else leaf(state) for state in (given.h0, given.c0))
    flat = [part for group in weights for part in group]
    options = (case.mode, case.bias, case.bidirectional, case.batch_first, True)
    problem = torch_problem.problem_of(x, rows, h0, c0, flat, *options)
    zeros = torch.zeros(len(weights), case.batch, case.hidden, dtype=torch.float64)
    states = (zeros if h0 is None else h0), (zeros if c0 is None and case.mode == "LSTM" else c0)
    out = [each for each in reference.forward(problem, x, rows, *states, weights, case.batch_first) if each is not None]
    wanted = [x, *flat, *(state for state in (h0, c0) if state is not None)]
    gradients = [torch.tensor(each) for each in (given.d_y, given.d_hn, given.d_cn) if each is not None]
    gradients = torch.autograd.grad(out, wanted, gradients)
    with jax.enable_x64(True):
        parts = (given.x, list(given.weights), given.h0, given.c0), (given.d_y, given.d_hn, given.d_cn)
        found = both_passes(call(case, "reference"), *jax.tree.map(jnp.asarray, parts))
    for mine, theirs in zip(jax.tree.leaves(found), [*out, *gradients], strict=True):
        np.testing.assert_allclose(mine, theirs.detach().numpy(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", GATES)
def test_the_reference_is_flax(mode):
    """flax's kernels are transposed, and it has one bias: its GRU none of n's hidden part."""
    nnx = pytest.importorskip("flax.nnx")
    cells = {"LSTM": nnx.OptimizedLSTMCell, "GRU": nnx.GRUCell, "RNN_TANH": nnx.SimpleCell, "RNN_RELU": nnx.SimpleCell}
    options = {"activation_fn": jax.nn.relu} if mode == "RNN_RELU" else {}
    cell = cells[mode](3, 5, rngs=nnx.Rngs(0), **options)
    ours_ih, ours_hh = cell.dense_i, cell.dense_h
    if mode == "LSTM":
        ours_ih, ours_hh = cell.dense_h, cell.dense_i  # its bias is with the hidden part
        w_ih, w_hh, bias = ours_hh.kernel[...], ours_ih.kernel[...], ours_ih.bias[...]
    else:
        w_ih, w_hh, bias = ours_ih.kernel[...], ours_hh.kernel[...], ours_ih.bias[...]
    bias = bias + jnp.arange(bias.size) / 10
    (cell.dense_h if mode == "LSTM" else cell.dense_i).bias[...] = bias
    x = jax.random.normal(jax.random.key(1), (2, 6, 3))
    lengths = jnp.array([6, 4])
    theirs = nnx.RNN(cell)(x, seq_lengths=lengths)
    weights = [(w_ih.T, w_hh.T, bias, jnp.zeros_like(bias))]
    y, _, _ = jax_op.run(x, mode, weights, lengths=lengths, batch_first=True, implementation="reference")
    there = jnp.arange(6)[None, :, None] < lengths[:, None, None]
    np.testing.assert_allclose(y, jnp.where(there, theirs, 0), rtol=0, atol=1e-6)


def test_the_reference_has_second_derivatives_in_both_modes():
    case = Case("RNN_TANH", 2, 2, 1, 2)
    with jax.enable_x64(True):
        arguments, _ = arrays(case, "float64")
        run = jax.jit(call(case, "reference"))
        check_grads(lambda x, *others: run(jnp.asarray(x), *others, None)[0], arguments[:3], order=2)


@pytest.mark.parametrize("case", [case for case in PADDED if case.dtype != "float32" and case.batch == 3], ids=str)
def test_the_reference_in_half_precision(case):
    assert_close(case, both_passes(call(case, "reference"), *arrays(case)))


def test_what_is_past_a_length_has_no_influence():
    """`expected` and `arrays` hold NaN there: x's gradient is zero, and nothing else is NaN."""
    results, gradients = expected(SMALL)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((results, gradients)))
    there = np.arange(SMALL.steps) < cases.numbers(SMALL).rows[:, None]
    assert (gradients[0][~there] == 0).all()
    assert (gradients[0][there] != 0).any()


def test_the_reference_rounds_half_precision_where_it_says():
    """y in x's dtype, states in float32 inside: T steps of a cell that only adds do not lose what bfloat16 would."""
    steps = 300
    w_hh, bias = jnp.zeros((4, 1), "bfloat16"), jnp.array([9, 9, 0, 9], "bfloat16")
    weights = (jnp.array([[0], [0], [1], [0]], "bfloat16"), w_hh, bias, jnp.zeros(4, "bfloat16"))
    x = jnp.full((steps, 1, 1), 2**-8, "bfloat16")
    state = jnp.ones((1, 1), "bfloat16")
    _, _, c = jax_reference.layer("LSTM", x, weights, state, state, None, False)
    assert c.dtype == jnp.float32
    assert c[0, 0] > 1.5  # in bfloat16, 1 + 2^-8 is 1
