"""The tables of autocast, and the analysis of loop bodies."""

from __future__ import annotations

import itertools

import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives

from perfkit.backends import jax_autocast_rules as rules

BFLOAT16 = jnp.dtype("bfloat16")
TABLES = {
    "products": rules.PRODUCTS,
    "neutral": rules.NEUTRAL,
    "separate": rules.SEPARATE,
    "sensitive": rules.SENSITIVE,
    "control": frozenset(rules.CONTROL),
    "reasons": frozenset(rules.REASONS),
}
# JAX does not publish these in jax.extend.core.primitives, or not in every version that perfkit supports.
UNPUBLISHED = {
    *(
        "all_gather_invariant",
        "checkpoint",
        "closed_call",
        "eval_jaxpr",
        "log2",
        "one_minus_square",
        "pjit",
        "polynomial",
    ),
    *(
        "optimization_barrier",
        "pbroadcast",
        "psum_invariant",
        "pvary",
        "reduce_scatter",
        "reshard",
        "shard_map",
        "split",
        "stack",
        "tile",
        "unstack",
    ),
    *("addupdate", "debug_callback", "debug_print", "ffi_call", "io_callback", "new_ref", "pallas_call"),
    *("pure_callback", "scatter-sub", "triton_kernel_call"),
}


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(TABLES, 2)))
def test_no_primitive_is_in_two_tables(one, other):
    assert not TABLES[one] & TABLES[other]


def test_every_name_is_a_primitive_of_jax():
    published = {value.name for value in vars(primitives).values() if hasattr(value, "bind")}
    unknown = frozenset().union(*TABLES.values()) - published - UNPUBLISHED
    assert not unknown, f"misspelt, or no longer in JAX: {sorted(unknown)}"


def test_every_published_floating_point_primitive_has_an_entry():
    published = {value.name for value in vars(primitives).values() if hasattr(value, "bind")}
    integers = {name for name in published if name.startswith(("random_", "shift_", "rng_", "threefry"))} | {
        *("and", "not", "or", "xor", "population_count", "clz", "reduce_and", "reduce_or", "reduce_xor"),
    }
    no_float_operand = {"after_all", "axis_index", "create_token", "empty2", "get", "iota"}
    complex_only = {"conj", "imag", "real"}
    # These run in the dtypes they were written for, and a report names them.
    no_rule = {"approx_top_k", "call", "custom_lin", "ragged_all_to_all"}
    known = frozenset().union(*TABLES.values()) | {"convert_element_type"}
    assert published - known - integers - no_float_operand - complex_only <= no_rule


def body_of(fn, *args):
    """The body of the loop in `fn`, and for each of its inputs whether it feeds only products, by shape."""
    jaxpr = jax.make_jaxpr(fn)(*args)
    (loop,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    body = loop.params["jaxpr"]
    answers = rules.feeds_only_products(body, BFLOAT16)
    return {var.aval.shape: answer for var, answer in zip(body.jaxpr.invars, answers, strict=True)}


def test_what_feeds_only_products():
    plain, moved, shared, inside, looped, unused = (jnp.ones((2, size)) for size in (3, 4, 5, 6, 7, 8))

    def fn(x):
        def body(c, _):
            c = c + jnp.sum(x @ plain)
            c = c + jnp.sum(x @ jnp.reshape(moved, (4, 2)).T)
            c = c + jnp.sum(x @ shared) + jnp.sum(shared)
            c = c + jnp.sum(jax.jit(lambda w: x @ w)(inside))
            c = lax.fori_loop(0, 2, lambda _, c: c + jnp.sum(x @ looped), c)
            c = lax.cond(c > 0, lambda _: c, lambda _: c + 1, unused)
            return c, None

        return lax.scan(body, 0.0, None, length=2)

    answers = body_of(fn, jnp.ones((1, 2)))
    expected = {(2, 3): True, (2, 4): True, (2, 5): False, (2, 6): True, (2, 7): True, (): False, (1, 2): True}
    assert {shape: answers[shape] for shape in expected} == expected
    assert not answers.get((2, 8))


def test_what_a_derivative_rule_reads_does_not_count_as_feeding_products():
    @jax.custom_jvp
    def product(x, w):
        return x @ w

    product.defjvp(lambda primals, tangents: (product(*primals), tangents[0] @ jnp.exp(primals[1])))
    w = jnp.ones((2, 3))
    answers = body_of(
        lambda x: lax.scan(lambda c, _: (c + product(x, w).sum(), None), 0.0, None, length=2), jnp.ones((1, 2))
    )
    assert answers[(2, 3)] is False


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (lambda x: x @ x, None),
        (lambda x: x.astype("bfloat16") @ x.astype("bfloat16"), "already bfloat16"),
        (lambda x: x.astype("float16") @ x.astype("float16"), "float16 operands"),
        (lambda x: x.astype("int8") @ x.astype("int8"), "int8 operands"),
        (lambda x: jnp.matmul(x, x, preferred_element_type="bfloat16"), "a bfloat16 result was asked for"),
        (lambda x: jnp.matmul(x, x, precision="highest"), "precision=HIGHEST was asked for"),
        (lambda x: jnp.matmul(x, x, precision="default"), None),
        (lambda x: lax.dot(x, x.astype("bfloat16"), preferred_element_type="float32"), None),
        (lambda x: lax.dot(x, x, precision=lax.DotAlgorithmPreset.F32_F32_F32), "precision=F32_F32_F32 was asked for"),
    ],
)
def test_why_a_product_is_skipped(fn, reason):
    (product,) = [eqn for eqn in jax.make_jaxpr(fn)(jnp.eye(2)).eqns if eqn.primitive.name == "dot_general"]
    assert rules.product_skip_reason(product, BFLOAT16) == reason
