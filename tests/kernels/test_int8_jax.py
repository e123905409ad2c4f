"""Layers of bytes on a grid in JAX: the kernels are XLA's operations bit for bit, and what JAX does with them."""

import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
import numpy as np

from perfkit import InvalidInputError, UnsupportedError
from perfkit.kernels import _int8, _native, trace
from perfkit.kernels._op import _choose
from perfkit.kernels.conv2d_int8.cases import CASES
from perfkit.kernels.conv2d_int8.jax_op import conv2d_int8
from perfkit.kernels.linear_int8_static.jax_op import linear
from perfkit.measure.environment import has

if _native.find_compiler() is None:
    pytest.skip("no C++ compiler is installed", allow_module_level=True)
if not any(map(has, _int8.VNNI)):
    pytest.skip("a CPU without VNNI, where sums of such grids could overflow", allow_module_level=True)

SIZES = [(1, 1, 1), (1, 5408, 130), (5, 130, 17), (70, 257, 131), (300, 64, 8)]
"""Rows, inputs, outputs."""
SCALE, Y_SCALE = jnp.float32(2.9 / 127), jnp.float32(0.11)
OUTS = ({}, {"y_scale": Y_SCALE}, {"out_dtype": jnp.bfloat16})


def layer(*shape, outputs, seed=0):
    """A weight, its scales and a bias."""
    random = np.random.default_rng(seed)
    weight, scale = random.integers(-127, 128, shape), random.random(outputs) * 0.01 + 1e-3
    bias = random.standard_normal(outputs)
    return jnp.asarray(weight, jnp.int8), jnp.asarray(scale, jnp.float32), jnp.asarray(bias, jnp.float32)


def numbers(*shape):
    """What lies on ties too, beyond the grid, and is no number."""
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32) * 1.5
    flat = x.reshape(-1)
    ties = (np.arange(flat[::3].size) % 255 - 127 + 0.5) * float(SCALE)
    flat[::3] = ties
    if flat.size > 40:
        flat[[7, 17, 31]] = np.nan, np.inf, -np.inf
    return jnp.asarray(x)


def on_grid(x):
    return (jnp.round(jnp.clip(x * (1 / SCALE), -127, 127)).astype(jnp.int8).astype(jnp.int16) + 127).astype(jnp.uint8)


def assert_equal(run, *given, **options):
    """The kernel in a program is the library, operation by operation, each of which rounds once."""
    ours = jax.jit(lambda *arrays: run(*arrays, **options, implementation="cpu"))(*given)
    theirs = run(*given, **options, implementation="library")
    assert ours.dtype == theirs.dtype
    np.testing.assert_array_equal(np.asarray(ours, np.float32), np.asarray(theirs, np.float32))
    return ours


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_linear_bits_are_those_of_the_library(sizes):
    rows, inputs, outputs = sizes
    weight, scale, bias = layer(inputs, outputs, outputs=outputs)
    for x in (numbers(rows, inputs), on_grid(numbers(rows, inputs))):
        for out in OUTS:
            assert_equal(linear, x, weight, scale, SCALE, bias, activation="relu", **out)
        assert_equal(linear, x, weight, scale, SCALE)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_convolution_bits_are_those_of_the_library(case):
    batch, inputs, height, width = case.image
    weight, scale, bias = layer(*case.kernel, inputs, case.outputs, outputs=case.outputs)
    for x in (numbers(batch, height, width, inputs), on_grid(numbers(batch, height, width, inputs))):
        for out in OUTS:
            assert_equal(conv2d_int8, x, weight, scale, SCALE, bias, **case.options, **out)


def test_vmap_scan_and_more_dimensions():
    weight, scale, bias = layer(40, 20, outputs=20)
    x = numbers(2, 3, 4, 40)

    def run(x):
        return linear(x, weight, scale, SCALE, bias, implementation="cpu")

    expected = np.asarray(run(x))
    for function in (jax.vmap(run), jax.jit(jax.vmap(jax.vmap(run))), lambda x: jax.lax.map(run, x)):
        np.testing.assert_array_equal(function(x), expected)
    weights = jnp.stack([weight, -weight])
    found = jax.vmap(lambda x, weight: linear(x, weight, scale, SCALE, bias, implementation="cpu"))(x, weights)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], linear(x[1], -weight, scale, SCALE, bias, implementation="library"))
    images, (weight, scale, bias) = numbers(2, 3, 8, 9, 5), layer(3, 3, 5, 6, outputs=6)

    def convolve(x):
        return conv2d_int8(x, weight, scale, SCALE, bias, padding=1, pool=2, implementation="cpu")

    np.testing.assert_array_equal(jax.vmap(convolve)(images), jnp.stack([convolve(each) for each in images]))


def test_rows_of_a_sharded_program():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("rows",))
    weight, scale, bias = layer(16, 5, outputs=5)
    x = numbers(6, 16)

    def run(x):
        return linear(x, weight, scale, SCALE, bias, implementation="cpu")

    spread = jax.sharding.PartitionSpec("rows")
    mapped = jax.shard_map(run, mesh=mesh, in_specs=spread, out_specs=spread)
    np.testing.assert_array_equal(jax.jit(mapped)(x), run(x))
    placed = jax.device_put(x, jax.sharding.NamedSharding(mesh, spread))
    np.testing.assert_array_equal(jax.jit(run)(placed), run(x))


@pytest.mark.parametrize("implementation", ["cpu", "library"])
def test_a_derivative_is_refused(implementation):
    weight, scale, bias = layer(8, 4, outputs=4)

    def loss(x, scale, bias):
        return linear(x, weight, scale, SCALE, bias, implementation=implementation).sum()

    for at in range(3):
        with pytest.raises(UnsupportedError, match="rounding has no gradient"):
            jax.grad(loss, at)(jnp.ones((2, 8)), scale, bias)


def test_who_computes(monkeypatch):
    weight, scale, bias = layer(8, 4, outputs=4)
    x = jnp.ones((2, 8))
    with trace() as choices:
        linear(x, weight, scale, SCALE, bias)
        conv2d_int8(jnp.ones((2, 5, 5, 8)), layer(3, 3, 4, 4, outputs=4)[0], scale, SCALE, bias, groups=2)
        linear(x[:0], weight, scale, SCALE, bias)
    assert [choice.implementation for choice in choices] == ["cpu", "library", "library"]
    assert "one group" in dict(choices[1].refused)["cpu"]
    assert dict(choices[2].refused)["cpu"] == "something is empty"
    for patched, reason in (
        ((_native, "find_compiler", lambda: None), "no C++ compiler"),
        ((_int8, "has", lambda _: False), "measured on x86 CPUs"),
        ((_int8, "has", lambda name: name == "avx2"), "no VNNI"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(*patched)
            _choose.cache_clear()
            with trace() as choices:
                linear(x, weight, scale, SCALE, bias)
            assert choices[0].implementation == "library"
            assert reason in dict(choices[0].refused)["cpu"]
    _choose.cache_clear()


def test_a_negative_scale_of_a_weight_is_an_error_where_the_largest_sum_would_be_the_least():
    weight, scale, bias = layer(3, 3, 5, 4, outputs=4)
    with pytest.raises(Exception, match="a scale of int8 weights is negative"):
        jax.block_until_ready(conv2d_int8(jnp.ones((1, 8, 8, 5)), weight, -scale, SCALE, bias, pool=2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.ones((2, 9))}, r"expected \(..., K\), \(K, N\)"),
        ({"x": jnp.ones((2, 8), jnp.float16)}, "expected float32, or uint8 on the grid"),
        ({"weight": jnp.ones((8, 4))}, "and int8"),
        ({"weight_scale": jnp.ones(3)}, r"weight_scale is float32 \[3\]: expected float32 \[4\]"),
        ({"bias": jnp.ones(4, jnp.bfloat16)}, "bias is bfloat16"),
        ({"activation": "gelu"}, "expected None or 'relu'"),
        ({"out_dtype": jnp.float16}, "expected None or 'relu', float32 or bfloat16"),
    ],
)
def test_bad_input_is_told(change, message):
    weight, scale, bias = layer(8, 4, outputs=4)
    given = {"x": jnp.ones((2, 8)), "weight": weight, "weight_scale": scale, "x_scale": SCALE, "bias": bias} | change
    with pytest.raises(InvalidInputError, match=message):
        linear(**given)
