"""Functions to autocast and what they are called with."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jaxpr_walk import assert_low_but_close

from perfkit.backends.jax_autocast import autocast

LOW = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
IMAGES = ("NHWC", "HWIO", "NHWC")


def normal(seed: int, *shape: int):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def dense(w, x):
    return jax.nn.relu(x @ w)


def convolve(x, kernel, **options):
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=IMAGES, **options)


def run(fns, *args):
    """The results of several functions of the same arguments, compiled together."""
    return jax.jit(lambda *args: [fn(*args) for fn in fns])(*args)


def traced(fn, *args, dtype="bfloat16"):
    return jax.make_jaxpr(autocast(fn, dtype))(*args)


def check(fn, *args, products: int, dtype="bfloat16", wrt=(0,)):
    """Outputs, and gradients both ways, are close to float32 and not float32; and a product is in the jaxpr to be low.

    Args:
        products: the number of products in the longest chain of the forward pass. The backward pass has a chain twice
            as long after it.
        wrt: what to differentiate, or () for a function that has no gradient.
    """

    def loss(*args):
        outputs = [leaf for leaf in jax.tree.leaves(fn(*args)) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        return sum(jnp.sum(jnp.sin(output)) for output in outputs)

    gradients = (jax.grad(loss, wrt), jax.grad(autocast(loss, dtype), wrt), autocast(jax.grad(loss, wrt), dtype))
    fns = (fn, autocast(fn, dtype), *(gradients if wrt else ()))
    exact, low, *rest = run(fns, *args)
    assert_low_but_close(low, exact, dtype, products)
    assert jax.tree.map(lambda a: a.dtype, low) == jax.tree.map(lambda a: a.dtype, exact)
    for gradient in rest[1:]:
        assert_low_but_close(gradient, rest[0], dtype, 3 * products)
        assert jax.tree.map(lambda a: a.dtype, gradient) == jax.tree.map(lambda a: a.dtype, rest[0])
