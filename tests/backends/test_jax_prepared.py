"""What a JAX program computes of parameters alone is kept for as long as they come, and for no longer."""

import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import perfkit
from perfkit.backends.jax_prepared import Prepared, parted
from perfkit.kernels import _native

RANDOM = np.random.default_rng(0)
X = jnp.asarray(RANDOM.normal(size=(3, 64)), jnp.float32)
TOLERANCE = 65 * 64 * 2**-23
"""64 products, each of numbers below 8 and 1, and a bias, summed in another order."""

W = jnp.asarray(RANDOM.normal(size=(64, 32)), jnp.float32)


def layer(held, x):
    return x @ jnp.tanh(held["w"]) + held["b"]


def made(w=None):
    """What is held, of arrays that were never seen before."""
    return {"w": W + 0 if w is None else w, "b": jnp.ones(32)}


def kept_of(function, *arguments):
    """Shapes and dtypes of what is kept, the first argument being what is held."""
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    return [str(var.aval) for var in parted(jaxpr, len(jax.tree.leaves(arguments[0]))).kept]


def assert_right(y, held, x=X):
    np.testing.assert_allclose(y, layer(held, x), atol=TOLERANCE)


@pytest.fixture
def counted():
    """A program, and how often it computed anew what it keeps."""
    program, calls = Prepared(layer), []
    program(made(), X)
    prepare = program._prepare
    program._prepare = lambda *arrays: calls.append(None) or prepare(*arrays)
    return program, calls


def test_it_is_computed_once_for_the_same_arrays(counted):
    program, calls = counted
    held = made()
    for _ in range(3):
        assert_right(program(held, X), held)
    assert len(calls) == 1
    assert program.kept_bytes == W.size * 4
    assert_right(program({**held, "b": jnp.zeros(32)}, X), {**held, "b": jnp.zeros(32)})
    assert len(calls) == 1, "the bias is not read by what is kept"


def test_other_arrays_are_followed(counted):
    program, calls = counted
    for scale in (2, 3, 2):
        held = made(W * scale)
        assert_right(program(held, X), held)
    assert len(calls) == 3


def test_numpy_arrays_may_change_and_are_read_at_each_call(counted):
    program, calls = counted
    w = np.array(W)
    assert_right(program(made(w), X), made(w))
    w *= 2
    assert_right(program(made(w), X), made(w))
    assert len(calls) == 2


def test_inputs_of_another_shape_use_what_is_kept(counted):
    program, calls = counted
    held = made()
    wide = jnp.concatenate([X, X])
    assert_right(program(held, wide), held, wide)
    assert_right(program(held, X), held)
    assert len(calls) == 1
    text = program.jitted.lower(program._kept(held), held, wide).as_text()
    assert "tanh" not in text


def test_a_call_that_makes_something_else_of_parameters_does_not_use_what_is_kept():
    def function(held, x):
        return x @ (jnp.tanh(held) if len(x) == 3 else jnp.sin(held))

    program = Prepared(function)
    for x in (X, X[:2], X):
        np.testing.assert_allclose(program(W, x), function(W, x), atol=TOLERANCE)


def test_parameters_of_another_shape_or_tree():
    program = Prepared(layer)
    program(made(), X)
    held = made(W[:32])
    assert_right(program(held, X[:, :32]), held, X[:, :32])
    with pytest.raises(KeyError, match="'w'"):
        program({"v": W, "b": jnp.ones(32)}, X)


def test_gradients_vmap_and_jit():
    program, held = Prepared(layer), made()
    program(held, X)

    def loss(function):
        return lambda held, x: (function(held, x) ** 2).sum()

    for at in (0, 1):
        ours, theirs = (jax.grad(loss(each), at)(held, X) for each in (program, layer))
        jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-3), ours, theirs)
    several = jnp.stack([X, X * 2])
    mapped = jax.vmap(program, (None, 0))(held, several)
    np.testing.assert_allclose(mapped, jax.vmap(layer, (None, 0))(held, several), atol=2 * TOLERANCE)
    assert_right(jax.jit(program)(held, X), held)
    fresh = Prepared(layer)
    assert_right(jax.jit(lambda x: fresh(held, x))(X), held)
    assert_right(fresh(held, X), held)


def test_only_what_is_worth_its_memory_is_kept():
    wide = jnp.ones((128, 512))

    def moved(w, x):
        return x @ w.T

    def unpacked(held, x):
        return x @ (held["q"].astype(jnp.float32) * held["scale"]).T

    def spread(w, x):
        return x + jnp.broadcast_to(jnp.exp(w[0]), (4096, 512))

    def printed(w, x):
        jax.debug.print("{}", w[0, 0])
        return x @ jnp.exp(w).T

    x = jnp.ones((4096, 512))
    assert kept_of(moved, wide, x) == []
    assert kept_of(unpacked, {"q": jnp.ones((128, 512), jnp.int8), "scale": jnp.float32(2)}, x) == []
    assert kept_of(spread, wide, x) == ["float32[512]"]
    assert kept_of(printed, wide, x) == ["float32[512,128]"]
    assert kept_of(lambda w, x: x @ jnp.exp(w + x[0, 0]).T, wide, x) == []


@pytest.mark.skipif(_native.find_compiler() is None, reason="no C++ compiler is installed")
def test_what_a_kernel_reads_is_kept_as_it_lies():
    from perfkit.kernels.rnn import lstm

    def function(held, x):
        return lstm(x, [(held["w"].T, held["u"].T, held["b"], held["b"])], implementation="cpu")[0]

    held = {"w": jnp.ones((10, 200)), "u": jnp.ones((50, 200)), "b": jnp.zeros(200)}
    assert sorted(kept_of(function, held, jnp.ones((4, 2, 10)))) == ["float32[200,10]", "float32[200,50]"]


def test_printing_goes_on_at_each_call(capfd):
    def function(w, x):
        jax.debug.print("x is {}", x[0, 0])
        return x @ jnp.exp(w)

    program = Prepared(function)
    for _ in range(2):
        jax.block_until_ready(program(W, X))
    jax.effects_barrier()
    assert capfd.readouterr().out.count("x is") == 2


class Scaled(nnx.Module):
    def __init__(self):
        self.scale = nnx.Param(jnp.linspace(-1, 1, 64))

    def __call__(self, x):
        return x * jnp.exp(self.scale[...])


@pytest.mark.usefixtures("hasty")
def test_an_optimized_module_follows_its_parameters_and_tells_what_is_kept():
    model = Scaled()
    result = perfkit.optimize(model, "compile", example_inputs=(X,))
    np.testing.assert_allclose(result(X), model(X), rtol=1e-6)
    for each in (model, result.model):
        each.scale[...] = each.scale[...] * -3
    np.testing.assert_allclose(result(X), model(X), rtol=1e-6)
    peak = result.report.after.tensor_peak_bytes
    assert peak.value == X.nbytes + 64 * 4
    assert "what it keeps of parameters" in peak.method
