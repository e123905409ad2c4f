"""Autocast through everything that holds an inner jaxpr: calls, loops, branches, checkpoints, shard_map."""

from __future__ import annotations

import gc

import numpy as np
import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
from autocast_calls import check, normal, traced
from jax import lax
from jaxpr_walk import assert_low_but_close, equations, operand_dtypes

from perfkit.backends import jax_autocast_rewrite
from perfkit.backends.jax_autocast import autocast, autocast_counts


@pytest.mark.parametrize("looped", [False, True])
def test_a_product_that_was_low_already_is_accumulated_in_float32(looped):
    def fn(w, x):
        return lax.scan(lambda c, _: (c @ w, None), x, None, length=2)[0] if looped else x @ w

    w, x = normal(0, 64, 64).astype(jnp.bfloat16), normal(1, 8, 64).astype(jnp.bfloat16)
    (product,) = equations(traced(fn, w, x), "dot_general")
    assert [var.aval.dtype for var in (*product.invars, *product.outvars)] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    low = jax.grad(lambda *args: autocast(fn, "bfloat16")(*args).astype(jnp.float32).sum(), (0, 1))(w, x)
    exact = jax.grad(lambda *args: fn(*args).sum(), (0, 1))(w.astype(jnp.float32), x.astype(jnp.float32))
    assert [gradient.dtype for gradient in low] == [jnp.bfloat16, jnp.bfloat16]
    assert_low_but_close(low, exact, "bfloat16", 6)


def test_every_control_primitive_has_a_rule_and_no_more():
    assert set(jax_autocast_rewrite._CONTROL_RULES) == set(jax_autocast_rewrite.rules.CONTROL)


# jit


def test_jit_stays_a_jit_with_its_name_and_donation():
    layer = jax.jit(lambda w, x: jax.nn.relu(x @ w), donate_argnums=1)
    outer, inner = equations(traced(lambda w, x: layer(w, x), jnp.eye(3), jnp.eye(3)), "jit")
    assert (outer.params["name"], outer.params["donated_invars"]) == ("<lambda>", (False, True))
    assert inner.params["name"] == "relu"


def test_low_precision_flows_into_a_jit_and_out_of_it():
    relu = jax.jit(lambda x: jnp.where(x > 0, x, 0))
    jaxpr = traced(lambda x: relu(x @ x) @ x, jnp.eye(3))
    calls = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "jit"]
    assert [(str(c.invars[0].aval.dtype), str(c.outvars[0].aval.dtype)) for c in calls] == [("bfloat16", "bfloat16")]


def test_one_jit_called_twice_is_rewritten_and_compiled_once():
    layer = jax.jit(lambda x: jnp.tanh(x @ x))
    low = autocast(lambda x: layer(layer(x)), "bfloat16")

    def inner_jaxprs():
        calls = jax.make_jaxpr(lambda x: low(x))(jnp.eye(3)).eqns  # a new lambda, or JAX would not call `low` again
        return [call.params["jaxpr"] for call in calls if call.primitive.name == "jit"]

    first, second = inner_jaxprs()
    assert first is second
    assert inner_jaxprs()[0] is first  # from one call to the next as well


def test_rewritten_jaxprs_are_forgotten_with_their_originals():
    rewriter = jax_autocast_rewrite.Rewriter(jnp.dtype("bfloat16"))
    jaxpr = jax.make_jaxpr(lambda x: jax.jit(lambda x: jax.nn.relu(x @ x))(x))(jnp.eye(3))
    rewriter.evaluate(jaxpr, [jnp.eye(3)])
    assert len(rewriter._rewritten) > 0
    del jaxpr
    jax.clear_caches()
    gc.collect()
    assert len(rewriter._rewritten) == 0


# Loops


def recurrent(x, w, u, b):
    def body(carry, x):
        state, total = carry
        state = jnp.tanh(x @ w + state @ u.T + b)
        return (state, total + state), state

    zeros = jnp.zeros((x.shape[1], b.shape[0]))
    return lax.scan(body, (zeros, zeros), x)


RECURRENT = (normal(0, 4, 3, 5), normal(1, 5, 6) / 2, normal(2, 6, 6) / 4, normal(3, 6))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_scan(dtype):
    check(recurrent, *RECURRENT, products=4, dtype=dtype, wrt=(0, 1, 2, 3))


def test_scan_body_casts_no_weight_and_keeps_its_carry_in_float32():
    (scan,) = equations(traced(recurrent, *RECURRENT), "scan")
    body = scan.params["jaxpr"]
    casts = [
        (eqn.invars[0].aval.shape, str(eqn.outvars[0].aval.dtype)) for eqn in equations(body, "convert_element_type")
    ]
    # The state, the two products, and their sum on its way to the float32 bias; no (5, 6) or (6, 6) weight, no input.
    assert sorted(casts) == [((3, 6), "bfloat16")] * 3 + [((3, 6), "float32")]
    assert operand_dtypes(body, "dot_general") == [("bfloat16", "bfloat16")] * 2
    (ahead,) = [
        eqn for eqn in traced(recurrent, *RECURRENT).eqns if eqn.invars and eqn.invars[0].aval.shape == (4, 3, 5)
    ]
    assert ahead.primitive.name == "convert_element_type"  # the inputs of all steps at once
    assert [str(var.aval.dtype) for var in scan.outvars] == ["float32"] * 3


def test_scan_gradients_of_weights_add_up_in_float32():
    def loss(w, x):
        return lax.scan(lambda total, row: (total + jnp.sum(row @ w), None), 0.0, x)[0]

    def nested(w, x):
        return lax.scan(lambda total, rows: (total + loss(w, rows), None), 0.0, x.reshape(4, -1, 1, 2))[0]

    w, x = jnp.ones((2, 3)), jnp.ones((4096, 1, 2))  # a bfloat16 sum of ones stops at 256
    for fn in (loss, nested):
        assert np.all(np.asarray(jax.jit(jax.grad(autocast(fn, "bfloat16")))(w, x)) == 4096)
        assert np.all(np.asarray(jax.jit(autocast(jax.grad(fn), "bfloat16"))(w, x)) == 4096)


def test_scan_constants_that_arrive_low():
    def fn(x, w):
        keys = x @ w  # low by the time the loop reads it
        return lax.scan(lambda c, q: (c + jnp.sum(q @ keys.T), jnp.max(keys * q)), 0.0, x)

    check(fn, normal(0, 8, 5), normal(1, 5, 5), products=3, wrt=(0, 1))


def test_scan_options_survive():
    def fn(x):
        return lax.scan(lambda c, x: (c + x @ x, c), jnp.zeros((3, 3)), x, reverse=True, unroll=2)

    (scan,) = equations(traced(fn, normal(0, 6, 3, 3)), "scan")
    assert (scan.params["reverse"], scan.params["unroll"], scan.params["length"]) == (True, 2, 6)
    check(fn, normal(0, 6, 3, 3), products=2)


def test_nested_scans_cast_weights_outside_both():
    def fn(x, w):
        def outer(c, _):
            return lax.scan(lambda c, _: (jnp.tanh(c @ w), None), c, None, length=2)[0], None

        return lax.scan(outer, x, None, length=2)[0]

    x, w = normal(0, 3, 4), normal(1, 4, 4) / 2
    (outer, _) = equations(traced(fn, x, w), "scan")
    shapes = [eqn.invars[0].aval.shape for eqn in equations(outer.params["jaxpr"], "convert_element_type")]
    assert shapes
    inner_low = [
        eqn
        for eqn in equations(outer.params["jaxpr"], "convert_element_type")
        if eqn.outvars[0].aval.dtype != jnp.float32
    ]
    assert (4, 4) not in {eqn.invars[0].aval.shape for eqn in inner_low}
    check(fn, x, w, products=4, wrt=(0, 1))


def test_while_casts_weights_outside():
    def fn(x, w):
        return lax.while_loop(
            lambda c: (c[0] < 3) & (jnp.max(c[1] @ w) < 99), lambda c: (c[0] + 1, jnp.tanh(c[1] @ w)), (0, x)
        )

    x, w = normal(0, 2, 4), normal(1, 4, 4)
    (loop,) = equations(traced(fn, x, w), "while")
    for name in ("cond_jaxpr", "body_jaxpr"):
        casts = equations(loop.params[name], "convert_element_type")
        assert (4, 4) not in {eqn.invars[0].aval.shape for eqn in casts}
        assert operand_dtypes(loop.params[name], "dot_general") == [("bfloat16", "bfloat16")]
    check(fn, x, w, products=3, wrt=())


def test_while_with_one_predicate_per_example():
    def fn(x, w):
        return jax.vmap(lambda x: lax.while_loop(lambda x: jnp.sum(x) < 9, lambda x: jnp.abs(x @ w) + 1, x))(x)

    check(fn, normal(0, 3, 2, 4), normal(1, 4, 4) / 4, products=4, wrt=())


def test_fori_loop():
    check(
        lambda x, w: lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ w) * (i + 1), x),
        normal(0, 2, 4),
        normal(1, 4, 4),
        products=3,
    )


# Branches


@pytest.mark.parametrize("index", [0, 1, 2])
def test_switch_branches_agree_on_their_dtypes(index):
    def fn(x, w):
        return lax.switch(index_of(x), [lambda x: x @ w, lambda x: jnp.exp(x @ w), lambda x: jax.nn.relu(x @ w) @ w], x)

    def index_of(x):
        return jnp.int32(x[0, 0] * 0) + index

    x, w = normal(0, 2, 4), normal(1, 4, 4)
    (switch,) = equations(traced(fn, x, w), "cond")
    assert {str(branch.out_avals[0].dtype) for branch in switch.params["branches"]} == {"float32"}
    check(fn, x, w, products=3, wrt=(0, 1))


def test_cond_and_platform_dependent():
    check(lambda x: lax.cond(jnp.sum(x) < 1e9, lambda x: x @ x, lambda x: 2 * x, x), normal(0, 4, 4), products=1)
    check(
        lambda x: lax.platform_dependent(x, cpu=lambda x: x @ x, default=lambda x: x @ x @ x),
        normal(0, 4, 4),
        products=1,
    )


# Checkpoints


def test_checkpoint_keeps_its_policy_and_its_barrier():
    policy = jax.checkpoint_policies.dots_saveable

    def fn(w, x):
        return jax.checkpoint(lambda w, x: jnp.sin(x @ w) @ w.T, policy=policy, prevent_cse=False)(w, x)

    args = normal(0, 4, 5), normal(1, 3, 4)
    (remat,) = equations(traced(fn, *args), "remat2", "checkpoint")
    assert remat.params["policy"] is policy
    assert remat.params["prevent_cse"] is False
    backward = traced(jax.grad(lambda *args: jnp.sum(fn(*args))), *args)
    assert any(remat.params["differentiated"] for remat in equations(backward, "remat2", "checkpoint"))
    check(fn, *args, products=2, wrt=(0, 1))


def test_checkpoint_policies_see_the_products():
    def saved(policy):
        fn = autocast(jax.checkpoint(lambda w, x: jnp.sin(jnp.sin(x @ w) @ w), policy=policy), "bfloat16")
        jaxpr = jax.make_jaxpr(jax.grad(lambda *args: jnp.sum(fn(*args))))(normal(0, 4, 4), normal(1, 3, 4))
        return sum(1 for _ in equations(jaxpr, "dot_general"))

    policies = jax.checkpoint_policies
    assert saved(policies.nothing_saveable) > saved(policies.dots_saveable)


# The rest


def test_shard_map():
    from jax.sharding import AxisType, PartitionSpec

    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    rows, whole = PartitionSpec("data"), PartitionSpec()

    def local(x, w):
        y = jax.jit(lambda x: jax.nn.relu(x @ w))(x)
        return lax.psum(y, "data"), y @ w

    fn = jax.shard_map(local, mesh=mesh, in_specs=(rows, whole), out_specs=(whole, rows))
    args = normal(0, 4, 3), normal(1, 3, 3)
    (sharded,) = equations(traced(fn, *args), "shard_map")
    assert operand_dtypes(sharded.params["jaxpr"], "dot_general") == [("bfloat16", "bfloat16")] * 2
    check(fn, *args, products=2, wrt=(0, 1))


def test_mutable_arrays_are_left_alone_and_named():
    def fn(x):
        total = jax.new_ref(x)

        @jax.jit
        def add(total, x):
            total[...] += x @ x

        add(total, x)
        return total[...] @ x

    x = normal(0, 3, 3)
    assert_low_but_close(autocast(fn, "bfloat16")(x), fn(x), "bfloat16", 1)
    kept = {kept.primitive: kept.reason for kept in autocast_counts(fn, "bfloat16", x).kept}
    assert set(kept) == {"new_ref", "jit"}
    assert all("mutable array" in reason for reason in kept.values())


def test_ordered_effects_run_in_order():
    seen = []

    def fn(x):
        def body(c, row):
            jax.debug.callback(lambda value: seen.append(float(value)), jnp.sum(row), ordered=True)
            return c @ c, None

        return lax.scan(body, x, jnp.arange(3.0))[0]

    jax.jit(autocast(fn, "bfloat16"))(jnp.eye(2)).block_until_ready()
    jax.effects_barrier()
    assert seen == [0.0, 1.0, 2.0]
