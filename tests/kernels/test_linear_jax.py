"""Linear layers in bfloat16 in JAX: the kernel on AMX's tiles against float64, and what JAX does with it."""

import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
import numpy as np

from perfkit.kernels import _native, trace
from perfkit.kernels.linear import Problem, cpu_shape
from perfkit.kernels.linear.jax_op import by_library, linear
from perfkit.measure.environment import has

if _native.find_compiler() is None:
    pytest.skip("no C++ compiler is installed", allow_module_level=True)

TILES = pytest.mark.skipif(not has("amx_bf16"), reason="a CPU without AMX")
SIZES = [(16, 32, 16), (17, 33, 10), (40, 31, 100), (33, 3000, 47), (301, 128, 10), (3, 70, 20)]
"""Rows, inputs, outputs: whole tiles and parts of one, K in one piece and in several, fewer rows than a tile."""


def arrays(rows, inputs, outputs, weight_dtype="float32"):
    random = np.random.default_rng(0)
    x, weight, bias = (random.standard_normal(size) for size in ((rows, inputs), (inputs, outputs), (outputs,)))
    return jnp.asarray(x, jnp.bfloat16), jnp.asarray(weight, weight_dtype), jnp.asarray(bias, jnp.float32)


def assert_right(y, x, weight, bias, activation):
    """Against the sums in float64: each of K products and roundings of float32 may be off by half a place of it."""
    x, weight = (np.asarray(each.astype(jnp.bfloat16), np.float64) for each in (x, weight))
    bias = 0 if bias is None else np.asarray(bias, np.float64)
    exact, largest = x @ weight + bias, np.abs(x) @ np.abs(weight) + np.abs(bias)
    exact = np.maximum(exact, 0) if activation else exact
    rounding = 0 if y.dtype == jnp.float32 else float(jnp.finfo(y.dtype).eps)
    steps = (x.shape[-1] + 1) * float(jnp.finfo(jnp.float32).eps)
    assert np.all(np.abs(np.asarray(y, np.float64) - exact) <= steps * largest + rounding * np.abs(exact))


def forced(*arguments, **options):
    return linear(*arguments, **options, implementation="cpu")


@TILES
@pytest.mark.parametrize("weight_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", SIZES)
def test_the_kernel(sizes, weight_dtype):
    x, weight, bias = arrays(*sizes, weight_dtype)
    for activation, given, out in ((None, bias, None), ("relu", None, jnp.float32)):
        y = jax.jit(forced, static_argnums=(3, 4))(x, weight, given, activation, out)
        assert y.dtype == (out or x.dtype)
        assert_right(y, x, weight, given, activation)


@TILES
def test_gradients_are_those_of_the_library():
    x, weight, bias = arrays(20, 130, 17)

    def loss(function):
        return lambda *given: (function(*given, activation="relu").astype(jnp.float32) ** 2).sum()

    ours = jax.grad(loss(forced), (0, 1, 2))(x, weight, bias)
    theirs = jax.grad(loss(lambda *given, **more: linear(*given, **more, implementation="library")), (0, 1, 2))(
        x, weight, bias
    )
    for new, old in zip(ours, theirs, strict=True):
        assert new.dtype == old.dtype
        difference = np.asarray(new, np.float64) - np.asarray(old, np.float64)
        # what comes back is of y, which was rounded in both
        assert np.linalg.norm(difference) <= 2 * float(jnp.finfo(jnp.bfloat16).eps) * np.linalg.norm(
            np.asarray(old, np.float64)
        )


@TILES
def test_more_dimensions_and_vmap():
    x, weight, bias = arrays(24, 64, 20)
    apart = x.reshape(2, 3, 4, 64)
    expected = np.asarray(forced(x, weight, bias), np.float32)
    np.testing.assert_array_equal(np.asarray(forced(apart, weight, bias), np.float32), expected.reshape(2, 3, 4, 20))
    mapped = jax.vmap(forced, (0, None, None))(apart, weight, bias)
    np.testing.assert_array_equal(np.asarray(mapped, np.float32), expected.reshape(2, 3, 4, 20))


def test_who_computes():
    x, weight, bias = arrays(32, 128, 64)
    with trace() as choices:
        y = linear(x.astype(jnp.float32), weight, bias)
    assert choices[0].implementation == "library"
    assert dict(choices[0].refused)["cpu"].startswith("it multiplies bfloat16 on AMX's tiles")
    np.testing.assert_allclose(y, x.astype(jnp.float32) @ weight + bias, rtol=1e-4, atol=1e-4)
    made = Problem("cpu", "bfloat16", 32, 128, 64, framework="jax", weight_dtype="float32", out_dtype="bfloat16")
    assert_right(by_library(made, x, weight, bias), x, weight, bias, None)
    if has("amx_bf16"):
        assert cpu_shape.slower(made) is None
        with trace() as choices:
            linear(x, weight, bias)
        assert choices[0].implementation == "cpu"
