"""Linear layers in JAX: the kernel against float64, and what JAX does with it."""

import pytest

pytest.importorskip("jax")

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from perfkit.kernels import _native, trace
from perfkit.kernels.linear import Problem, cpu_shape
from perfkit.kernels.linear.jax_op import by_library, linear
from perfkit.measure.environment import has

if _native.find_compiler() is None:
    pytest.skip("no C++ compiler is installed", allow_module_level=True)

NEEDED = {"float32": "avx512f", "bfloat16": "avx512_bf16"}
BFLOAT16 = pytest.mark.skipif(not has(NEEDED["bfloat16"]), reason="a CPU without AVX512-BF16")
SIZES = [
    *((16, 32, 16), (17, 33, 10), (40, 31, 100), (33, 3000, 47), (301, 128, 10), (3, 70, 20)),
    *((1, 5408, 128), (1, 77, 300), (2, 301, 129), (4, 65, 17), (5, 40, 65), (70, 300, 192), (1, 32, 1)),
]
"""Rows, inputs, outputs: whole tiles, vectors and pairs and parts of them, K in one piece and in several, rows that
share a weight as it is read, and more of them."""


def arrays(rows, inputs, outputs, weight_dtype="float32", dtype="bfloat16"):
    random = np.random.default_rng(0)
    x, weight, bias = (random.standard_normal(size) for size in ((rows, inputs), (inputs, outputs), (outputs,)))
    return jnp.asarray(x, dtype), jnp.asarray(weight, weight_dtype), jnp.asarray(bias, jnp.float32)


def assert_right(y, x, weight, bias, activation):
    """Against the sums in float64: each of K products and roundings of float32 may be off by half a place of it."""
    x, weight = (np.asarray(each.astype(x.dtype), np.float64) for each in (x, weight))
    bias = 0 if bias is None else np.asarray(bias, np.float64)
    exact, largest = x @ weight + bias, np.abs(x) @ np.abs(weight) + np.abs(bias)
    exact = np.maximum(exact, 0) if activation else exact
    rounding = 0 if y.dtype == jnp.float32 else float(jnp.finfo(y.dtype).eps)
    steps = (x.shape[-1] + 1) * float(jnp.finfo(jnp.float32).eps)
    assert np.all(np.abs(np.asarray(y, np.float64) - exact) <= steps * largest + rounding * np.abs(exact))


def forced(*arguments, **options):
    return linear(*arguments, **options, implementation="cpu")


@pytest.mark.parametrize(
    ("dtype", "weight_dtype"), [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")]
)
@pytest.mark.parametrize("sizes", SIZES)
def test_the_kernel(sizes, dtype, weight_dtype):
    if not has(NEEDED[dtype]):
        pytest.skip(f"a CPU without {NEEDED[dtype]}")
    x, weight, bias = arrays(*sizes, weight_dtype, dtype)
    for activation, given, out in ((None, bias, None), ("relu", None, jnp.float32)):
        y = jax.jit(forced, static_argnums=(3, 4))(x, weight, given, activation, out)
        assert y.dtype == (out or x.dtype)
        assert_right(y, x, weight, given, activation)


@BFLOAT16
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


@BFLOAT16
def test_more_dimensions_and_vmap():
    x, weight, bias = arrays(24, 64, 20)
    apart = x.reshape(2, 3, 4, 64)
    expected = np.asarray(forced(x, weight, bias), np.float32)
    np.testing.assert_array_equal(np.asarray(forced(apart, weight, bias), np.float32), expected.reshape(2, 3, 4, 20))
    mapped = jax.vmap(forced, (0, None, None))(apart, weight, bias)
    np.testing.assert_array_equal(np.asarray(mapped, np.float32), expected.reshape(2, 3, 4, 20))


def test_numbers_that_are_none_come_out_as_such():
    x, weight, bias = arrays(3, 64, 20, dtype="float32")
    if not has(NEEDED["float32"]):
        pytest.skip("a CPU without AVX-512")
    y = forced(x.at[1, 5].set(jnp.nan), weight, bias, "relu")
    assert bool(jnp.isnan(y[1]).all())
    assert not bool(jnp.isnan(y[::2]).any())


def test_who_computes():
    x, weight, bias = arrays(32, 128, 64, dtype="float16")
    with trace() as choices:
        y = linear(x, weight, bias)
    assert choices[0].implementation == "library"
    assert dict(choices[0].refused)["cpu"] == "it takes float32 and bfloat16, and the tensors are float16"
    assert_right(y, x, weight, bias, None)
    for dtype in ("float32", "bfloat16"):
        made = Problem("cpu", dtype, 32, 128, 64, framework="jax", weight_dtype="float32", out_dtype=dtype)
        x, weight, bias = arrays(32, 128, 64, dtype=dtype)
        assert_right(by_library(made, x, weight, bias), x, weight, bias, None)
        with trace() as choices:
            linear(x, weight, bias)
            linear(x[:, :16], weight[:16], bias)
        few = dict(choices[1].refused)["cpu"]
        assert choices[1].implementation == "library"
        if has(NEEDED[dtype]):
            assert choices[0].implementation == "cpu"
            assert few.startswith("16 inputs are too little work")
        else:
            assert few == f"of {dtype} it wants {NEEDED[dtype]}, which this CPU lacks"


def test_where_others_multiply_as_quickly(monkeypatch):
    """A processor whose float32 products XLA makes full use of, and one with tiles."""
    made = Problem("cpu", "float32", 64, 128, 64, framework="jax", weight_dtype="float32", out_dtype="float32")
    monkeypatch.setattr(cpu_shape, "cpu", lambda: ("Intel Xeon",))
    assert "XLA's product is as fast" in cpu_shape.slower(made)
    assert cpu_shape.slower(replace(made, rows=16)) is None
    many = replace(made, rows=4, inputs=4096, outputs=4096)
    assert "which no cache holds" in cpu_shape.slower(many)
    assert cpu_shape.slower(replace(many, dtype="bfloat16")) is None
    assert "which no cache holds" in cpu_shape.slower(replace(many, dtype="bfloat16", rows=5))
    monkeypatch.setattr(cpu_shape, "has", lambda name: True)
    large = replace(made, rows=2000, inputs=4096, outputs=2000, dtype="bfloat16")
    assert "bytes to pack" in cpu_shape.slower(large)
