"""linear_int8 in JAX: an integer dot in the program, the exact product, what transformations make of it."""

import functools

import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
import numpy as np

from perfkit import InvalidInputError, UnsupportedError
from perfkit.kernels import trace
from perfkit.kernels.linear_int8 import linear_int8, reference
from perfkit.kernels.linear_int8.cases import CASES


def make(case):
    """The keyword arguments of a call."""
    random = np.random.default_rng(0)
    x = random.standard_normal((case.rows, case.inputs))
    if case.x == "int8":
        x = random.integers(-128, 128, (case.rows, case.inputs))
    scale = random.random(case.rows if case.scale == "row" else ()) if case.x == "int8" else None
    weight = jnp.asarray(random.integers(-128, 128, (case.outputs, case.inputs)), jnp.int8)
    bias = jnp.asarray(random.standard_normal(case.outputs), jnp.float32) if case.bias else None
    return {
        "x": jnp.asarray(x, case.x),
        "weight": weight,
        "weight_scale": jnp.asarray(random.random(case.outputs), jnp.float32),
        "bias": bias,
        "x_scale": None if scale is None else jnp.asarray(scale, jnp.float32),
        "activation": case.activation,
    }


@pytest.mark.parametrize("implementation", ["library", "reference"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_is_the_exact_product_scaled(case, implementation):
    given = make(case)
    y = linear_int8(**given, implementation=implementation)
    x, scale = given["x"], given["x_scale"]
    if scale is None:
        x, scale = reference.quantize(jnp, x.astype(jnp.float32))
    sums = np.asarray(x).astype(np.int64) @ np.asarray(given["weight"]).astype(np.int64).T
    expected = sums * np.asarray(scale, np.float64).reshape(-1, 1) * np.asarray(given["weight_scale"], np.float64)
    size = abs(expected)
    if given["bias"] is not None:
        expected, size = expected + np.asarray(given["bias"]), size + abs(np.asarray(given["bias"]))
    expected = np.maximum(expected, 0) if case.activation else expected
    assert y.dtype == jnp.float32
    # four roundings: the sum as float32, two scales, the bias
    assert (abs(np.asarray(y, np.float64) - expected) <= 4 * 2.0**-24 * size + 1e-37).all()


def quiet(**given):
    """The case's call as a function of x."""
    return functools.partial(linear_int8, **{name: value for name, value in given.items() if name != "x"})


@pytest.mark.parametrize("case", [CASES[1], CASES[2]], ids=lambda case: case.name)
def test_jit_holds_an_integer_dot_and_gives_the_same(case):
    given = make(case)
    layer = jax.jit(quiet(**given))
    text = layer.lower(given["x"]).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    assert len(dots) == 1
    assert dots[0].count("xi8>") == 2
    assert "xi32>" in dots[0]
    y, compiled = linear_int8(**given), layer(given["x"])
    # a compiled program may take a product and a sum in one rounding: each of the four may differ
    assert (abs(compiled - y) <= 4 * 2.0**-24 * (abs(y) + 2 * abs(given["bias"]))).all()


def test_vmap_and_leading_dimensions():
    given = make(CASES[2])
    x = jnp.stack([given["x"], 2 * given["x"], given["x"] - 1])
    each = [linear_int8(**{**given, "x": row}) for row in x]
    for y in (jax.vmap(quiet(**given))(x), linear_int8(**{**given, "x": x})):
        assert (abs(y - jnp.stack(each)) <= 4 * 2.0**-24 * (abs(y) + 2 * abs(given["bias"]))).all()
    assert linear_int8(**{**given, "x": x[0, 0]}).shape == (CASES[2].outputs,)
    assert linear_int8(**{**given, "x": x[:0]}).shape == (0, CASES[2].rows, CASES[2].outputs)


def test_what_is_not_finite_shows_in_its_row_alone():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 8)), jnp.float32)
    x = x.at[1, 3].set(jnp.nan).at[2, 0].set(-jnp.inf).at[3].set(0)
    y = linear_int8(x, jnp.full((4, 8), 3, jnp.int8), jnp.ones(4), jnp.ones(4), activation="relu")
    assert jnp.isnan(y[1:3]).all()
    assert (y[3] == 1).all()
    assert jnp.isfinite(y[jnp.array([0, 4])]).all()


def test_a_derivative_is_refused():
    given = make(CASES[2])
    for derivative in (jax.grad, jax.jacfwd):
        with pytest.raises(UnsupportedError, match="inference"):
            derivative(lambda x: quiet(**given)(x).sum())(given["x"])
    stopped = jax.grad(lambda x: (quiet(**given)(jax.lax.stop_gradient(x)) * x.sum()).sum())(given["x"])
    assert jnp.isfinite(stopped).all()


def test_out_dtype_and_who_computes():
    given = make(CASES[2])
    with trace() as calls:
        y = linear_int8(**given, out_dtype=jnp.bfloat16)
    assert y.dtype == jnp.bfloat16
    assert [call.implementation for call in calls] == ["library"]
    with pytest.raises(InvalidInputError, match="no implementation 'triton'"):
        linear_int8(**given, implementation="triton")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": [[1]]}, "weight is a list"),
        ({"x": jnp.zeros((2, 9))}, "expected (..., K) and (N, K)"),
        ({"x_scale": 0.5}, "takes no x_scale"),
        ({"x": jnp.zeros((2, 100), jnp.int32)}, "x is int32"),
        ({"out_dtype": jnp.int8}, "out_dtype is int8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_an_error(changes, message):
    with pytest.raises(InvalidInputError) as raised:
        linear_int8(**(make(CASES[2]) | changes))
    assert message in str(raised.value)
