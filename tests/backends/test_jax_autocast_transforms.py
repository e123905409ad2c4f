"""Autocast functions under JAX's transformations and around them, with closures, scopes, hints and callbacks."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
from autocast_calls import LOW, dense, normal, run
from jaxpr_walk import assert_low_but_close

from perfkit.backends.jax_autocast import autocast


@LOW
def test_transformations_before_and_after(dtype):
    w, x, dw, dx = (normal(seed, *shape) for seed, shape in enumerate([(4, 5), (3, 4), (4, 5), (3, 4)]))

    def loss(w, x):
        return jnp.sum(jnp.tanh(dense(w, x)) ** 2)

    low = autocast(loss, dtype)

    def twice(fn):
        return jax.grad(lambda *args: jnp.sum(jax.grad(fn)(*args) ** 2))

    def tangent(fn):
        return lambda *args: jax.jvp(fn, args, (dw, dx))[1]

    low_and_exact = [
        (autocast(low, dtype), loss, 1),
        (jax.grad(low), jax.grad(loss), 3),
        (autocast(jax.value_and_grad(loss), dtype), jax.value_and_grad(loss), 3),
        (tangent(low), tangent(loss), 3),
        (autocast(tangent(loss), dtype), tangent(loss), 3),
        (twice(low), twice(loss), 9),
    ]
    results = run([fn for low, exact, _ in low_and_exact for fn in (low, exact)], w, x)
    for (_, _, products), got, expected in zip(low_and_exact, results[::2], results[1::2], strict=True):
        assert_low_but_close(got, expected, dtype, products)
        assert jax.tree.map(lambda a: a.dtype, got) == jax.tree.map(lambda a: a.dtype, expected)


@LOW
def test_vmap_before_and_after(dtype):
    w, xs = normal(0, 4, 5), normal(1, 6, 3, 4)

    def gradient(fn):
        return jax.grad(lambda w, x: jnp.sum(jnp.sin(fn(w, x))))

    def batched(fn):
        return jax.vmap(fn, (None, 0))

    low = autocast(dense, dtype)
    low_and_exact = [
        (batched(low), batched(dense), 1),
        (autocast(batched(dense), dtype), batched(dense), 1),
        (batched(gradient(low)), batched(gradient(dense)), 3),
        (gradient(batched(low)), gradient(batched(dense)), 3),
    ]
    results = run([fn for low, exact, _ in low_and_exact for fn in (low, exact)], w, xs)
    for (_, _, products), got, expected in zip(low_and_exact, results[::2], results[1::2], strict=True):
        assert_low_but_close(got, expected, dtype, products)


def test_gradients_of_closed_over_weights():
    def loss(w, x):
        return jnp.sum(jnp.sin(dense(w, x)))

    def low_loss(w, x):
        return autocast(lambda x: loss(w, x), "bfloat16")(x)

    low, exact = run((jax.grad(low_loss), jax.grad(loss)), normal(0, 4, 5), normal(1, 3, 4))
    assert_low_but_close(low, exact, "bfloat16", 3)


def test_a_changed_closure_is_seen():
    scale = [2.0]
    fn = autocast(lambda x: (x @ x) * scale[0], "bfloat16")
    before = fn(jnp.eye(2))
    scale[0] = 3.0
    assert before[0, 0] == 2.0
    assert fn(jnp.eye(2))[0, 0] == 3.0


def test_captured_arrays_work_under_jit_and_eagerly():
    w = normal(0, 3, 3)
    fn = autocast(lambda x: x @ w, "bfloat16")
    np.testing.assert_array_equal(fn(w), jax.jit(fn)(w))
    assert_low_but_close(fn(w), w @ w, "bfloat16", 1)


def test_named_scopes_reach_the_compiled_program():
    def fn(x):
        with jax.named_scope("encoder"):
            return jnp.sin(x @ x)

    text = jax.jit(autocast(fn, "bfloat16")).lower(jnp.eye(2)).compile().as_text()
    assert "encoder/sin" in text


def test_compiler_hints_reach_the_lowered_program():
    from jax.experimental.xla_metadata import set_xla_metadata

    def fn(x):
        with set_xla_metadata(schedule="late"):
            return jnp.sin(x @ x)

    assert 'schedule = "late"' in jax.jit(autocast(fn, "bfloat16")).lower(jnp.eye(2)).as_text()


def test_callbacks_see_the_dtypes_they_were_written_for():
    seen = []

    def fn(x):
        product = x @ x
        jax.debug.callback(lambda value: seen.append(value.dtype), product)
        return jnp.max(product)

    jax.jit(autocast(fn, "bfloat16"))(jnp.eye(2)).block_until_ready()
    jax.effects_barrier()
    assert seen == [jnp.float32]
