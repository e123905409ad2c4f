"""Convolutions in one order of dimensions: the same numbers, wherever in a program they stand."""

import numpy as np
import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp

from perfkit.backends.jax_convolutions import channels_last

LAYOUTS = {
    "channels last": (("NHWC", "HWIO", "NHWC"), (2, 9, 8, 4), (3, 2, 2, 6)),
    "channels first": (("NCHW", "OIHW", "NCHW"), (2, 4, 9, 8), (6, 2, 3, 2)),
    "mixed": (("CHWN", "IOHW", "NWCH"), (4, 9, 8, 2), (2, 6, 3, 2)),
}
IN_ORDER = jax.lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


def convolved(layout):
    """Strides, uneven padding and groups."""
    numbers, x_shape, w_shape = LAYOUTS[layout]

    def function(w, x):
        out = jax.lax.conv_general_dilated(
            x, w, (2, 1), [(1, 0), (0, 2)], dimension_numbers=numbers, feature_group_count=2
        )
        return jnp.sum(jnp.tanh(out) ** 2)

    keys = jax.random.split(jax.random.key(0))
    return function, jax.random.normal(keys[0], w_shape), jax.random.normal(keys[1], x_shape)


def orders(jaxpr):
    """The dimension numbers of all convolutions, those of inner jaxprs too."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "conv_general_dilated":
            found.append(eqn.params["dimension_numbers"])
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(value, "jaxpr", value)
            found += orders(inner) if hasattr(inner, "eqns") else []
    return found


WITHIN = {
    "outside": lambda function: function,
    "jit": jax.jit,
    "loop": lambda function: (
        lambda *args: jax.lax.scan(lambda carry, _: (carry + function(*args), None), 0.0, None, 2)[0]
    ),
    "branch": lambda function: lambda w, x: jax.lax.cond(x.sum() > -1e9, function, lambda *_: 0.0, w, x),
    "checkpoint": jax.checkpoint,
}


@pytest.mark.parametrize("within", WITHIN)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_the_same(layout, within):
    """Products of up to 2 · 9 · 8 numbers are added up, in an order that may be another."""
    function, w, x = convolved(layout)
    gradients = jax.value_and_grad(WITHIN[within](function), (0, 1))
    ordered = channels_last(gradients)
    jaxpr = jax.make_jaxpr(ordered)(w, x).jaxpr
    assert len(orders(jaxpr)) >= 3, "one forward, and two backward"
    assert set(orders(jaxpr)) == {IN_ORDER}
    jax.tree.map(
        lambda found, expected: np.testing.assert_allclose(
            found, expected, rtol=144 * 2.0**-23, atol=144 * 2.0**-23 * float(jnp.abs(expected).max())
        ),
        jax.jit(ordered)(w, x),
        jax.jit(gradients)(w, x),
    )


def test_trees_and_random_keys_pass_through():
    def function(tree, key):
        return {"sum": tree["a"] + jax.random.normal(key, (3,)), "key": key}

    found = channels_last(function)({"a": jnp.ones(3)}, jax.random.key(1))
    np.testing.assert_array_equal(found["sum"], function({"a": jnp.ones(3)}, jax.random.key(1))["sum"])
    assert found["key"] == jax.random.key(1)
