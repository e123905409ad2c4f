"""Times of a JAX model's operations, by which it is cut."""

import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp

from perfkit.backends.jax_compile import watching
from perfkit.parallel.jax_piped import operations_of


def model(params, rest, x):
    for name in "abc":
        x = jnp.tanh(x @ params[name])
    return x, rest


def costs(width):
    params, x = dict.fromkeys("abc", jnp.ones((width, width))), jnp.ones((2, width))
    operations = operations_of(model, params, (), (x,), {})
    with watching() as log:
        found = operations.costs([*jax.tree.leaves(params), x], trains=True)
        return found, log().graphs


def test_operations_that_look_alike_are_compiled_once_also_for_the_next_cut():
    first, compiled = costs(13)
    assert len(first.seconds) == 6
    assert min(first.seconds) > 0
    assert compiled == 2, "a product and a tanh"
    again, compiled = costs(13)
    assert compiled == 0
    assert (again.held_bytes, again.sent_bytes) == (first.held_bytes, first.sent_bytes)
    assert costs(17)[1] == 2
