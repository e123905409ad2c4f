"""The autocast of JAX functions, seen from outside: numerics, dtypes, counts."""

from __future__ import annotations

import functools

import numpy as np
import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
from autocast_calls import LOW, convolve, dense, normal, run, traced
from jax import lax
from jaxpr_walk import assert_low_but_close, equations, operand_dtypes, unit_roundoff

from perfkit.backends.jax_autocast import Kept, autocast, autocast_counts

# Numerics


@LOW
@pytest.mark.parametrize(("rows", "inner", "columns"), [(1, 1, 1), (3, 7, 5), (33, 129, 17)])
def test_product_errs_by_its_roundings_and_no_more(dtype, rows, inner, columns):
    a, b = normal(0, rows, inner), normal(1, inner, columns)
    result = np.asarray(jax.jit(autocast(jnp.matmul, dtype))(a, b), np.float64)
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    u = unit_roundoff(dtype)
    # Both operands are rounded, then the result; sums in float32 add inner * 2**-24 at most.
    bound = (2 * u + u * u + inner * 2**-24) * (np.abs(a) @ np.abs(b)) * (1 + u) + u * np.abs(a @ b)
    assert np.all(np.abs(result - a @ b) <= bound)
    assert np.any(result != np.float32(a @ b))


@LOW
def test_products_accumulate_in_float32(dtype):
    # Exact in float32, and 4096 is a value of both dtypes; sums kept in bfloat16 would stop at 256, in float16 at 2048.
    ones = jnp.ones((2, 4096))
    assert np.all(np.asarray(jax.jit(autocast(lambda x: x @ x.T, dtype))(ones)) == 4096)
    image, kernel = jnp.ones((1, 3, 3, 512)), jnp.ones((3, 3, 512, 1))
    assert jax.jit(autocast(convolve, dtype))(image, kernel)[0, 1, 1, 0] == 9 * 512


@LOW
def test_backward_products_accumulate_in_float32(dtype):
    def loss(w, x):
        return jnp.sum(x @ w)

    w, x = jnp.ones((3, 2)), jnp.ones((4096, 3))
    for gradient in run((jax.grad(autocast(loss, dtype)), autocast(jax.grad(loss), dtype)), w, x):
        assert np.all(np.asarray(gradient) == 4096)

    def conv_loss(kernel, x):
        return jnp.sum(convolve(x, kernel))

    kernel, image = jnp.ones((1, 1, 1, 1)), jnp.ones((1, 64, 64, 1))
    for gradient in run((jax.grad(autocast(conv_loss, dtype)), autocast(jax.grad(conv_loss), dtype)), kernel, image):
        assert gradient[0, 0, 0, 0] == 4096


@LOW
@pytest.mark.parametrize("groups", [1, 2])
def test_convolution_and_its_gradients(dtype, groups):
    x, kernel = normal(0, 2, 7, 5, 4), normal(1, 3, 3, 4 // groups, 6)

    def loss(x, kernel):
        return jnp.sum(jnp.sin(convolve(x, kernel, feature_group_count=groups)))

    exact = jax.grad(loss, (0, 1))
    low = jax.grad(autocast(loss, dtype), (0, 1)), autocast(exact, dtype)
    reference, *gradients = run((exact, *low), x, kernel)
    for gradient in gradients:
        assert_low_but_close(gradient, reference, dtype, products=3)


# What the jaxpr says


@LOW
def test_products_take_low_operands(dtype):
    jaxpr = traced(lambda w, x: dense(w, x) @ w.T, normal(0, 4, 3), normal(1, 2, 4), dtype=dtype)
    assert operand_dtypes(jaxpr, "dot_general") == [(dtype, dtype)] * 2
    assert all(eqn.outvars[0].aval.dtype == jnp.float32 for eqn in equations(jaxpr, "dot_general"))
    (relu,) = equations(jaxpr, "max")
    assert relu.outvars[0].aval.dtype == dtype  # low precision flowed through the neutral operation

    jaxpr = traced(convolve, normal(0, 1, 4, 4, 2), normal(1, 3, 3, 2, 3), dtype=dtype)
    assert operand_dtypes(jaxpr, "conv_general_dilated") == [(dtype, dtype)]


def test_compiled_program_multiplies_bfloat16_into_float32():
    lowered = jax.jit(autocast(jnp.matmul, "bfloat16")).lower(jnp.ones((2, 3)), jnp.ones((3, 4)))
    (product,) = [line for line in lowered.as_text().splitlines() if "dot_general" in line]
    assert "(tensor<2x3xbf16>, tensor<3x4xbf16>) -> tensor<2x4xf32>" in product


@LOW
@pytest.mark.parametrize("under", [True, False], ids=["grad of autocast", "autocast of grad"])
def test_backward_products_take_low_operands(dtype, under):
    def loss(w, k, x):
        return jnp.sum(convolve(x @ w, k) ** 2)

    args = normal(0, 3, 3), normal(1, 3, 3, 3, 3), normal(2, 1, 4, 4, 3)
    wrt = (0, 1, 2)
    gradient = jax.grad(autocast(loss, dtype), wrt) if under else autocast(jax.grad(loss, wrt), dtype)
    jaxpr = jax.make_jaxpr(gradient)(*args)
    assert operand_dtypes(jaxpr, "dot_general") == [(dtype, dtype)] * 3
    assert operand_dtypes(jaxpr, "conv_general_dilated") == [(dtype, dtype)] * 3


SENSITIVE = {
    "exp": jnp.exp,
    "log": lambda x: jnp.log(jnp.abs(x)),
    "logistic": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "integer_pow": lambda x: x**3,
    "square": jnp.square,
    "sub": lambda x: x - x.T,
    "reduce_sum": jnp.sum,
    "cumsum": lambda x: jnp.cumsum(x, 0),
    "erf": lambda x: jax.scipy.special.erf(x),
    "cholesky": lambda x: lax.linalg.cholesky(x, symmetrize_input=False),
}


@pytest.mark.parametrize("name", SENSITIVE)
def test_sensitive_operations_run_in_float32(name):
    jaxpr = traced(lambda x: SENSITIVE[name](x @ x), normal(0, 3, 3))
    eqns = list(equations(jaxpr, name))
    assert eqns
    for eqn in eqns:
        assert {str(var.aval.dtype) for var in (*eqn.invars, *eqn.outvars)} == {"float32"}


NEUTRAL = {
    "neg": lambda x: -x,
    "mul": lambda x: x * 3.0,
    "max": jax.nn.relu,
    "select_n": lambda x: jnp.where(x > 0, x, 0.0),
    "transpose": lambda x: x.T,
    "concatenate": lambda x: jnp.concatenate([x, x]),
    "stack": lambda x: jnp.stack([x, x]),
    "tile": lambda x: jnp.tile(x, (2, 1)),
    "unstack": lambda x: jnp.unstack(x)[0],
    "pad": lambda x: jnp.pad(x, 1),
    "reduce_max": lambda x: x.max(0),
    "sort": lambda x: jnp.sort(x, 0),
    "gather": lambda x: x[jnp.array([2, 0])],
    "reduce_window_max": lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (2, 2), (1, 1), "VALID"),
    "div": lambda x: x / 4.0,
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_operations_run_in_what_arrives(name):
    jaxpr = traced(lambda x: NEUTRAL[name](x @ x), normal(0, 3, 3))
    eqns = list(equations(jaxpr, name))
    assert eqns
    assert all(str(eqn.outvars[0].aval.dtype) == "bfloat16" for eqn in eqns)


def test_widest_wins_and_elementwise_weights_stay_float32():
    def biased(w, b, x):
        return jnp.sin(x @ w + b)

    jaxpr = traced(biased, normal(0, 3, 4), normal(1, 4), normal(2, 2, 3))
    assert operand_dtypes(jaxpr, "add") == [("float32", "float32")]
    casts = [eqn for eqn in equations(jaxpr, "convert_element_type") if eqn.outvars[0].aval.shape[-1:] == (4,)]
    assert {eqn.invars[0].aval.shape for eqn in casts} == {(3, 4), (2, 4)}  # the weight and the product, not the bias


def test_separate_operands_keep_their_own_dtypes():
    jaxpr = traced(lambda x, y: lax.optimization_barrier((x @ x, y)), normal(0, 3, 3), normal(1, 3))
    assert operand_dtypes(jaxpr, "optimization_barrier") == [("bfloat16", "float32")]


def test_constants_take_the_dtype_of_their_company_if_it_can_hold_them():
    def masked(fill, x):
        return jnp.where(x > 0, x @ x, fill)

    x = -jnp.eye(3)
    for fill, dtype, expected in [(0.0, "float16", "float16"), (-1e9, "float16", "float32"), (-1e9, "bfloat16", None)]:
        jaxpr = traced(functools.partial(masked, fill), x, dtype=dtype)
        assert operand_dtypes(jaxpr, "select_n")[0][1:] == (expected or dtype,) * 2
        assert np.all(np.isfinite(jax.jit(autocast(functools.partial(masked, fill), dtype))(x)))
    small = traced(lambda x: x @ x + 1e-9, x, dtype="float16")  # an epsilon must not become zero
    assert operand_dtypes(small, "add") == [("float32", "float32")]


# Dtypes and structure


def test_outputs_have_the_dtypes_and_structure_of_the_function():
    def fn(x, *, scale, flag):
        assert flag is True  # not traced
        return {"low": x @ x, "none": None}, (
            x * scale,
            jnp.argmax(x),
            x > 0,
            [jnp.bfloat16(1) * (x @ x).astype(jnp.bfloat16), 7],
        )

    x = np.asarray(normal(0, 3, 3))
    expected = jax.eval_shape(functools.partial(fn, flag=True), x, scale=jnp.float32(2))
    result = autocast(fn, "bfloat16")(x, scale=jnp.float32(2), flag=True)
    assert jax.tree.structure(result) == jax.tree.structure(expected)
    assert [leaf.dtype for leaf in jax.tree.leaves(result)] == [leaf.dtype for leaf in jax.tree.leaves(expected)]


def test_other_dtypes_are_never_touched():
    key = jax.random.key(0)
    with jax.enable_x64(True):
        args = (
            jnp.arange(9).reshape(3, 3),
            jnp.eye(3, dtype=jnp.float64) / 3,
            jnp.eye(3, dtype=jnp.complex64) / 3,
            jnp.eye(3, dtype=jnp.bool_),
        )

        def fn(*args):
            return [a @ a for a in args], jax.random.uniform(jax.random.fold_in(key, 1))

        reference, result = fn(*args), autocast(fn, "bfloat16")(*args)
        counts = autocast_counts(fn, "bfloat16", *args)
    for a, b in zip(jax.tree.leaves(reference), jax.tree.leaves(result), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    assert counts.low == {}
    reasons = {kept.reason for kept in counts.skipped}
    assert reasons == {"int64 operands", "float64 operands", "complex64 operands", "bool operands"}


@pytest.mark.parametrize("wrong", ["float32", "int8", "bf16", None, 3])
def test_other_target_dtypes_are_refused(wrong):
    for call in (autocast, autocast_counts):
        with pytest.raises(ValueError, match=r"expected one of bfloat16, float16") as error:
            call(dense, wrong)
        assert repr(wrong) in str(error.value)


def test_dtype_objects_and_signature_are_accepted_and_kept():
    import inspect

    for dtype in (jnp.bfloat16, jnp.dtype("bfloat16"), "bfloat16"):
        assert operand_dtypes(traced(jnp.matmul, jnp.eye(2), jnp.eye(2), dtype=dtype), "dot_general") == [
            ("bfloat16",) * 2
        ]
    assert inspect.signature(autocast(dense, "bfloat16")) == inspect.signature(dense)


# Counts


def test_counts_match_the_rewritten_jaxpr():
    def fn(w, x, n):
        x = jax.jit(dense)(w, x)
        x, _ = lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=4)
        x = x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)
        jax.debug.print("{}", n @ n)
        return jnp.matmul(x.astype(jnp.float32), w, precision=lax.Precision.HIGHEST)

    args = normal(0, 3, 3), normal(1, 2, 3), jnp.eye(2, dtype=jnp.int32)
    counts = autocast_counts(fn, "bfloat16", *args)
    assert counts.dtype == "bfloat16"
    assert counts.low == {"dot_general": 2}  # the body of the scan counts once
    assert counts.skipped == (
        Kept("dot_general", "already bfloat16", 1),
        Kept("dot_general", "int32 operands", 1),
        Kept("dot_general", "precision=HIGHEST was asked for", 1),
    )
    low = [dtypes for dtypes in operand_dtypes(traced(fn, *args), "dot_general") if "bfloat16" in dtypes]
    assert len(low) == counts.low["dot_general"] + 1  # and the one that was low already


def test_counts_name_what_has_no_rule():
    from jax.experimental import pallas

    def double(x_ref, out_ref):
        out_ref[...] = x_ref[...] * 2

    def fn(x):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        x = pallas.pallas_call(double, out_shape=shape, interpret=True)(x @ x)
        return jax.pure_callback(np.negative, shape, x)

    x = normal(0, 3, 3)
    counts = autocast_counts(fn, "bfloat16", jax.ShapeDtypeStruct((3, 3), jnp.float32))
    assert [(kept.primitive, kept.count) for kept in counts.kept] == [("pallas_call", 1), ("pure_callback", 1)]
    assert "kernel" in counts.kept[0].reason
    assert "Python" in counts.kept[1].reason
    assert_low_but_close(autocast(fn, "bfloat16")(x), fn(x), "bfloat16", 1)


def test_precision_asked_for_is_respected():
    a, b = normal(0, 5, 64), normal(1, 64, 5)
    exact = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    np.testing.assert_array_equal(autocast(exact, "bfloat16")(a, b), exact(a, b))
