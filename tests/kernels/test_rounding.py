"""float32 to bfloat16 as a custom call: JAX's own cast bit for bit, and what JAX does with it."""

import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
import numpy as np

from perfkit.kernels import _native
from perfkit.kernels.rounding.jax_op import rounded, takes

if _native.find_compiler() is None:
    pytest.skip("no C++ compiler is installed", allow_module_level=True)


def same(one, other):
    assert one.dtype == other.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(one).view(np.uint16), np.asarray(other).view(np.uint16))


@pytest.mark.parametrize("shape", [(1,), (7, 5), (3, 70_001)])
def test_the_cast_is_jaxs(shape):
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    same(jax.jit(rounded)(x), x.astype(jnp.bfloat16))


def test_ties_infinities_and_what_is_no_number():
    bits = np.array([0x3F808000, 0x3F818000, 0x3F807FFF, 0x7F7FFFFF, 0xFF800000, 0x80000001, 0x00018000], np.uint32)
    x = jnp.asarray(bits.view(np.float32))
    same(rounded(x), x.astype(jnp.bfloat16))
    assert np.isnan(np.asarray(rounded(jnp.array([np.nan])), np.float32)).all()


def test_vmap_and_gradients():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 3, 5)), jnp.float32)
    same(jax.vmap(rounded)(x), x.astype(jnp.bfloat16))

    def loss(cast):
        return lambda x: (cast(x).astype(jnp.float32) ** 2).sum()

    theirs = jax.grad(loss(lambda x: x.astype(jnp.bfloat16)))(x)
    np.testing.assert_array_equal(jax.grad(loss(rounded))(x), theirs)


def test_what_it_takes():
    assert takes(jnp.ones(3))
    assert not takes(jnp.ones(()))
    assert not takes(jnp.ones(3, jnp.bfloat16))
