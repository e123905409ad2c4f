"""Autocast of functions with derivative rules of their own."""

from __future__ import annotations

import functools

import numpy as np
import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
from autocast_calls import check, normal
from jax import lax
from jaxpr_walk import assert_low_but_close, operand_dtypes

from perfkit.backends.jax_autocast import autocast


@jax.custom_jvp
def odd_jvp(x, w):
    return jnp.sin(x @ w)


@odd_jvp.defjvp
def _(primals, tangents):
    return odd_jvp(*primals), 7.0 * (tangents[0] @ primals[1])  # not the derivative: it must be this all the same


@jax.custom_vjp
def odd_vjp(x, count, w):
    return jnp.sin(x @ w) * count, count


odd_vjp.defvjp(
    lambda x, count, w: (odd_vjp(x, count, w), (x, w)),
    lambda residuals, ct: (5.0 * ct[0] @ residuals[1].T, None, 3.0 * residuals[0].T @ ct[0]),
)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_custom_jvp_rule_is_used_and_rewritten(dtype):
    x, w = normal(0, 3, 4), normal(1, 4, 4)
    check(odd_jvp, x, w, products=2, dtype=dtype)
    check(
        lambda x, w: lax.scan(lambda c, _: (odd_jvp(c, w), None), x, None, length=2)[0], x, w, products=3, dtype=dtype
    )
    low = jax.jvp(lambda x: autocast(odd_jvp, dtype)(x, w), (x,), (x,))[1]
    assert_low_but_close(low, 7.0 * (x @ w), dtype, 1)
    jaxpr = jax.make_jaxpr(jax.grad(lambda x: jnp.sum(autocast(odd_jvp, dtype)(x, w))))(x)
    assert set(operand_dtypes(jaxpr, "dot_general")) == {(dtype, dtype)}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_custom_vjp_rule_is_used_and_rewritten(dtype):
    x, count, w = normal(0, 3, 4), jnp.int32(2), normal(1, 4, 4)
    check(odd_vjp, x, count, w, products=2, dtype=dtype, wrt=(0, 2))
    check(
        lambda x, w: lax.scan(lambda c, _: (odd_vjp(c, 1, w)[0], None), x, None, length=2)[0],
        x,
        w,
        products=3,
        dtype=dtype,
    )
    jaxpr = jax.make_jaxpr(jax.grad(lambda x: jnp.sum(autocast(odd_vjp, dtype)(x, count, w)[0])))(x)
    assert set(operand_dtypes(jaxpr, "dot_general")) == {(dtype, dtype)}
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: autocast(odd_vjp, dtype)(x, count, w)[0], (x,), (x,))


def test_custom_rules_under_vmap_and_inside_it():
    xs, w = normal(0, 2, 3, 4), normal(1, 4, 4)

    def both(x, w):
        return odd_vjp(odd_jvp(x, w), 2, w)[0]

    check(jax.vmap(both, (0, None)), xs, w, products=3)
    low = jax.vmap(autocast(both, "bfloat16"), (0, None))(xs, w)
    assert_low_but_close(low, jax.vmap(both, (0, None))(xs, w), "bfloat16", 3)


def test_custom_jvp_with_an_integer_output():
    @jax.custom_jvp
    def fn(x):
        return x @ x, jnp.int32(3)

    @fn.defjvp
    def _(primals, tangents):
        return fn(*primals), (2.0 * tangents[0], np.zeros((), jax.dtypes.float0))

    check(lambda x: fn(fn(x)[0])[0] * fn(x)[1], normal(0, 3, 3) / 2, products=3)


def test_custom_vjp_with_nondifferentiable_function_and_symbolic_zeros():
    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def apply(fn, x, w):
        return fn(x @ w)

    def forward(fn, x, w):
        return apply(fn, x.value, w.value), (x.value, w.value)

    def backward(fn, residuals, ct):
        x, w = residuals
        return (ct * fn(x @ w)) @ w.T, x.T @ ct

    apply.defvjp(forward, backward, symbolic_zeros=True)
    check(functools.partial(apply, jnp.cos), normal(0, 3, 4), normal(1, 4, 5), products=3, wrt=(0, 1))


def test_differentiating_a_value_a_custom_vjp_closed_over_still_raises():
    def fn(w, x):
        @jax.custom_vjp
        def product(x):
            return jnp.sum(x @ w)

        product.defvjp(lambda x: (jnp.sum(x), x), lambda x, ct: (2.0 * ct * x,))
        return product(x)

    w, x = normal(0, 3, 3), normal(1, 3, 3)
    low = jax.jit(autocast(fn, "bfloat16"))
    np.testing.assert_array_equal(jax.grad(low, 1)(w, x), 2.0 * x)
    with pytest.raises(Exception, match="closed-over"):
        jax.grad(low, 0)(w, x)
