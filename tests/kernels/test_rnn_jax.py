"""Recurrent layers in JAX: the kernel against the reference in float64, and what JAX adds."""

import functools
import operator
import os
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
from jax_workers import on_devices
from rnn_jax_calls import PADDED, SMALL, arrays, assert_close, both_passes, call, expected

from perfkit import UnsupportedError
from perfkit.kernels import _native, trace
from perfkit.kernels.rnn import Problem, cases, gru, jax_cpu, jax_library, jax_op, rnn
from perfkit.kernels.rnn.cases import Case

needs_compiler = pytest.mark.skipif(_native.find_compiler() is None, reason="no C++ compiler is installed")
KERNEL = pytest.param("cpu", marks=needs_compiler)


# ---- The kernel on CPU -----------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("case", PADDED, ids=str)
def test_results_and_gradients(case):
    assert_close(case, both_passes(call(case, "cpu"), *arrays(case)))


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(threads, monkeypatch):
    monkeypatch.setattr(jax_cpu, "processors", lambda: threads)
    case = Case("LSTM", 12, 37, 20, 50, layers=2, bidirectional=True)
    assert_close(case, both_passes(call(case, "cpu"), *arrays(case)))


@pytest.mark.parametrize("implementation", [KERNEL, "reference"])
def test_recomputing_saves_the_gates(implementation):
    """The same gradients; and what is kept between the passes is not the gates, the largest of all."""
    arguments, gradients = arrays(SMALL)
    found = both_passes(call(SMALL, implementation, recompute=True), arguments, gradients)
    assert_close(SMALL, found)

    def kept(recompute):
        back = jax.eval_shape(lambda *a: jax.vjp(call(SMALL, implementation, recompute=recompute), *a)[1], *arguments)
        return sum(leaf.size for leaf in jax.tree.leaves(back))

    gates = SMALL.layers * 2 * SMALL.steps * SMALL.batch * 4 * SMALL.hidden
    assert kept(False) - kept(True) >= gates


@needs_compiler
@pytest.mark.parametrize("mode", ["eager", "jit", "scan"])
def test_it_runs_eagerly_and_in_programs(mode):
    arguments, _ = arrays(SMALL)
    run = call(SMALL, "cpu")
    if mode == "scan":  # three calls in a loop

        def thrice(*arguments):
            def body(states, _):
                y, hn, cn = run(arguments[0], arguments[1], *states)
                return (hn, cn), y

            return jax.lax.scan(body, arguments[2:], length=3)[1]

        y = jax.jit(thrice)(*arguments)
        states = arguments[2:]
        for i in range(3):
            expected_y, *states = run(*arguments[:2], *states)
            np.testing.assert_allclose(y[i], expected_y, rtol=0, atol=1e-6)
        return
    found = (jax.jit(run) if mode == "jit" else run)(*arguments)
    for mine, true in zip(found, expected(SMALL)[0], strict=True):
        assert cases.error(SMALL, mine, true) < cases.tolerance(SMALL)


# ---- vmap ------------------------------------------------------------------------------------------------------------


def mapped(case, count, axes):
    """Arguments of `call` where those that `axes` maps are several, each a little different."""
    arguments, gradients = arrays(case)
    scale = 1 + jnp.arange(count) / 10
    several = tuple(
        argument if axis is None else jax.tree.map(lambda x: jnp.stack([factor * x for factor in scale], 0), argument)
        for argument, axis in zip(arguments, axes, strict=True)
    )
    return several, gradients


@needs_compiler
@pytest.mark.parametrize(
    "axes",
    [(0, None, None, None), (0, None, 0, 0), (None, None, 0, None), (None, 0, None, None), (0, 0, 0, 0)],
    ids=str,
)
def test_vmap_is_one_call_after_the_other(axes):
    arguments, gradients = mapped(SMALL, 3, axes)
    run = functools.partial(both_passes_of, call(SMALL, "cpu"), gradients)
    found = jax.jit(jax.vmap(run, axes))(*arguments)
    for i in range(3):
        take = functools.partial(jax.tree.map, operator.itemgetter(i))
        one = [a if axis is None else take(a) for a, axis in zip(arguments, axes, strict=True)]
        for mine, alone in zip(jax.tree.leaves(found), jax.tree.leaves(run(*one)), strict=True):
            # the same sums, in another order where rows are divided otherwise
            np.testing.assert_allclose(mine[i], alone, rtol=0, atol=1e-5 * float(jnp.abs(alone).max()))


def both_passes_of(function, gradients, *arguments):
    results, back = jax.vjp(function, *arguments)
    return results, back(gradients)


@needs_compiler
def test_vmap_folds_rows_into_one_call():
    """Twice mapped, over x and states: still one custom call. With weights of its own each has one, in a loop."""
    arguments, _ = arrays(SMALL)
    twice = jax.tree.map(lambda x: jnp.broadcast_to(x, (2, 3, *x.shape)), (arguments[0], *arguments[2:]))
    run = call(SMALL, "cpu")
    by_rows = jax.vmap(jax.vmap(lambda x, h0, c0: run(x, arguments[1], h0, c0)))
    text = jax.jit(by_rows).lower(*twice).as_text()
    assert text.count("perfkit_rnn_xla_forward") == 1
    assert "while" not in text
    alone = run(*arguments)
    for mine, one in zip(by_rows(*twice), alone, strict=True):
        np.testing.assert_allclose(mine, jnp.broadcast_to(one, mine.shape), rtol=0, atol=1e-6)
    weights = jax.tree.map(lambda x: jnp.stack([x, x]), arguments[1])
    by_weights = jax.vmap(lambda weights: run(arguments[0], weights, *arguments[2:]))
    assert "while" in jax.jit(by_weights).lower(weights).as_text()


# ---- Several devices -------------------------------------------------------------------------------------------------

SHARDED = """
import functools, jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from perfkit.kernels.rnn import lstm
assert len(jax.devices()) == 2
mesh = Mesh(np.array(jax.devices()), ("data",))
keys = jax.random.split(jax.random.key(0), 12)
x, lengths = jax.random.normal(keys[0], (6, 5, 3)), jnp.array([5, 3, 1, 4, 5, 2])
h0, c0 = jax.random.normal(keys[1], (2, 2, 6, 8))
shapes = (32, 3), (32, 8), (32,), (32,)
weights = [tuple(0.3 * jax.random.normal(keys[2 + 4 * i + j], s) for j, s in enumerate(shapes)) for i in range(2)]
arguments, specs = (x, weights, h0, c0, lengths), (P("data"), P(), P(None, "data"), P(None, "data"), P("data"))

def run(who, x, weights, h0=None, c0=None, lengths=None):
    return lstm(x, weights, h0, c0, lengths=lengths, batch_first=True, bidirectional=True, implementation=who)

def loss(who, *arguments):
    return sum((out**2).sum() for out in run(who, *arguments))

def same(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max()))

by_kernel, gradients = (functools.partial(f, "cpu") for f in (run, jax.grad(loss, (1, 2, 3, 4))))
expected = jax.jit(by_kernel)(*arguments), jax.jit(gradients)(*arguments)
split = tuple(
    jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, spec)), argument)
    for argument, spec in zip(arguments, specs)
)
program, backward = jax.jit(by_kernel).lower(*split).compile(), jax.jit(gradients).lower(*split).compile()
found = program(*split)
same((found, backward(*split)), expected)
assert found[0].sharding.spec[0] == "data", found[0].sharding
assert "perfkit_rnn_xla_forward" in program.as_text()
assert "all-gather" not in program.as_text(), "each device computes everything"
assert "all-gather" not in backward.as_text() and "all-reduce" in backward.as_text()

for who in ("cpu", "reference"):
    for count in (5, 2):  # all arguments; no states, no lengths
        total = lambda *a: jax.lax.psum(loss(who, *a), "data")
        total = jax.shard_map(total, mesh=mesh, in_specs=specs[:count], out_specs=P())
        alone = jax.jit(jax.value_and_grad(functools.partial(loss, who), (0, 1)))(*arguments[:count])
        same(jax.jit(jax.value_and_grad(total, (0, 1)))(*arguments[:count]), alone)

jax.config.update("jax_use_shardy_partitioner", False)
jax.clear_caches()
same(jax.jit(by_kernel)(*split), expected[0])
print("passed")
"""


@needs_compiler
def test_several_devices_each_have_some_of_the_rows():
    """In sharded programs, where XLA gathers nothing and adds up the weights' gradients, and in shard_map."""
    command = [sys.executable, "-W", "ignore", "-c", SHARDED]
    done = subprocess.run(command, env=os.environ | on_devices(2), capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "passed", done.stderr[-3000:]


# ---- Dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", [KERNEL, "reference"])
def test_dropout_is_between_layers_in_training_alone(implementation):
    case = Case("LSTM", 3, 5, 4, 200, layers=2)
    arguments, _ = arrays(case)
    run = functools.partial(call, case, implementation, dropout=0.25)
    same = run(training=False)(*arguments)
    for mine, plain in zip(same, call(case, implementation)(*arguments), strict=True):
        np.testing.assert_array_equal(mine, plain)
    key = jax.random.key(3)
    y, hn, cn = run(training=True, key=key)(*arguments)
    # by hand: the first layer, a mask, the second layer
    x, weights, h0, c0 = arguments
    between, h_first, c_first = jax_op.run(x, "LSTM", weights[:1], h0[:1], c0[:1], implementation=implementation)
    kept = jax.random.bernoulli(jax.random.fold_in(key, 1), 0.75, between.shape)
    assert 0.7 < kept.mean() < 0.8  # 3000 draws: six standard deviations are 0.047
    dropped = jnp.where(kept, between / 0.75, 0)
    above, h_second, c_second = jax_op.run(dropped, "LSTM", weights[1:], h0[1:], c0[1:], implementation=implementation)
    pairs = (y, above), (hn, jnp.concatenate((h_first, h_second))), (cn, jnp.concatenate((c_first, c_second)))
    for mine, theirs in pairs:
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-6)
    other = run(training=True, key=jax.random.key(4))(*arguments)[0]
    assert float(jnp.abs(y - other).max()) > 1e-3
    gone = call(case, implementation, dropout=1.0, training=True, key=key)(*arguments)[0]
    assert jnp.isfinite(gone).all()


# ---- Who computes ----------------------------------------------------------------------------------------------------


@needs_compiler
def test_who_computes_is_told():
    x, weights = jnp.ones((3, 2, 4)), [(jnp.ones((8, 4)), jnp.ones((8, 8)))]
    with trace() as calls:
        rnn(x, weights, nonlinearity="relu")
        rnn(x, weights, implementation="reference")
        gru(x, [(jnp.ones((24, 4)), jnp.ones((24, 8)))])
    assert [found.implementation for found in calls] == ["cpu", "reference", "cpu"]
    assert dict(calls[0].refused).keys() == {"library", "pallas"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "GRU"}, "LSTMs alone, and this is GRU"),
        ({"dtype": "bfloat16"}, "float32, and the arrays are bfloat16"),
        ({}, None),
    ],
)
def test_what_cudnn_takes(change, message):
    given = {"framework": "jax", "device": "cuda", "dtype": "float32", "mode": "LSTM", "steps": 5, "batch": 3}
    reason = jax_library.refusal(Problem(**{**given, "inputs": 4, "hidden": 300, **change}))
    assert (reason is None) if message is None else (message in reason)


@pytest.mark.parametrize("ragged", ["no", "lengths"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_cudnn_gets_the_weights_where_it_expects_them(bidirectional, ragged, monkeypatch):
    """JAX's own plain version of cuDNN's LSTM takes the vector of weights apart again."""
    from jax.experimental import rnn as experimental

    def stand_in(x, h0, c0, weights, lengths, inputs, hidden, layers, dropout, bidirectional):
        parts = experimental.unpack_lstm_weights(weights, inputs, hidden, layers, bidirectional)
        return experimental.lstm_ref(x, h0, c0, *parts, lengths, inputs, hidden, layers, dropout, bidirectional)

    monkeypatch.setattr(experimental, "lstm", stand_in)
    case = Case("LSTM", 5, 4, 3, 9, layers=2, bidirectional=bidirectional, ragged=ragged)
    (x, weights, h0, c0), _ = arrays(case)
    rows = cases.numbers(case).rows
    lengths = None if rows is None else jnp.asarray(rows, jnp.int32)
    x = jnp.nan_to_num(x)
    found = jax_library.layers(x, weights, h0, c0, lengths, 2 if bidirectional else 1)
    for mine, true in zip(found, expected(case)[0], strict=True):
        assert cases.error(case, mine, true) < cases.tolerance(case)
    if lengths is not None:  # of a row without steps: zeros, and its states as they were
        found = jax_library.layers(x, weights, h0, c0, lengths.at[1].set(0), 2 if bidirectional else 1)
        assert (found[0][:, 1] == 0).all()
        np.testing.assert_array_equal(found[1][:, 1], h0[:, 1])


def test_float64_is_the_references():
    with jax.enable_x64(True):
        x, weights = jnp.ones((3, 2, 4), jnp.float64), [(jnp.ones((8, 4)), jnp.ones((8, 8)))]
        with trace() as calls:
            assert rnn(x, weights)[0].dtype == jnp.float64
        assert calls[0].implementation == "reference"
        with pytest.raises(UnsupportedError, match="computes in float32, not in float64"):
            rnn(x, weights, implementation="cpu")
