"""conv2d in JAX: every implementation is XLA's operations, and so are its gradients.

Numbers are whole and small, so that every sum is exact (`cases.whole`): results are equal, without a tolerance, and of
the many equal numbers in a window the first one must win.
"""

import os
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
from jax_workers import on_devices

from perfkit import InvalidInputError, UnsupportedError
from perfkit.kernels import _native, trace
from perfkit.kernels.conv2d import cases, conv2d, cpu_shape, jax_op

CASES = {case.name: case for case in cases.CASES}
FUSED = cases.CASES[2]
needs_compiler = pytest.mark.skipif(_native.find_compiler() is None, reason="no C++ compiler is installed")


def numbers(case, dtype=jnp.float32):
    x, weight, bias = cases.whole(case)
    arrays = x.transpose(0, 2, 3, 1), weight.transpose(2, 3, 1, 0), bias
    return tuple(None if each is None else jnp.asarray(each, dtype) for each in arrays)


def run(case, implementation=None):
    return lambda *arrays: conv2d(*arrays, **case.options, implementation=implementation)


def with_gradients(function, arrays):
    """y and the gradients of all arrays, for whole numbers coming back."""
    there = [each for each in arrays if each is not None]
    y, back = jax.vjp(lambda *given: function(*given, *[None] * (3 - len(given))), *there)
    d_y = np.random.default_rng(1).integers(-3, 4, y.shape)
    return (y, *back(jnp.asarray(d_y, y.dtype)))


def assert_equal(found, wanted):
    for each, other in zip(found, wanted, strict=True):
        assert each.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(each, np.float32), np.asarray(other, np.float32))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("implementation", [pytest.param("cpu", marks=needs_compiler), "reference"])
def test_it_is_the_library(implementation, name):
    case = CASES[name]
    arrays = numbers(case)
    wanted = jax.jit(lambda *arrays: with_gradients(run(case, "library"), arrays))(*arrays)
    assert_equal(jax.jit(lambda *arrays: with_gradients(run(case, implementation), arrays))(*arrays), wanted)


@needs_compiler
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize(
    "options", [{"pool": 2}, {"activation": "relu", "pool": 3, "padding": 1}, {"stride": 2}], ids=str
)
def test_gradients_of_many_products_are_the_librarys(options, dtype):
    """The kernel's forward pass, XLA's gradients: of places that the kernel saved, and of those that no pool sees."""
    case = cases.Case(2, 20, 12, 9, 16, (3, 3), options)
    arrays, wide = numbers(case, dtype), numbers(case)
    gradients = jax.jit(
        lambda implementation, arrays: with_gradients(run(case, implementation), arrays), static_argnums=0
    )
    made = jax_op.problem_of(*arrays, jax_op.options(1, 0, 1, 1, None, 2))
    assert cpu_shape.slower_backward(made)
    text = gradients.lower("cpu", arrays).compile().as_text()
    assert "perfkit_conv2d_xla_forward" in text
    assert "perfkit_conv2d_xla_weight" not in text
    assert_equal(gradients("cpu", arrays), [each.astype(dtype) for each in gradients("reference", wide)])


def test_the_library_is_torchs():
    """The reference is tested against torch's layers where torch is; here the layouts of both."""
    torch = pytest.importorskip("torch")
    x, weight, bias = cases.whole(FUSED)
    y = run(FUSED, "library")(*numbers(FUSED))
    wanted = conv2d(*map(torch.from_numpy, (x, weight, bias)), **FUSED.options, implementation="library")
    np.testing.assert_array_equal(np.asarray(y).transpose(0, 3, 1, 2), wanted.numpy())


@needs_compiler
def test_bfloat16():
    arrays, wide = numbers(FUSED, jnp.bfloat16), numbers(FUSED)
    found = with_gradients(run(FUSED, "cpu"), arrays)
    assert_equal(found, [each.astype(jnp.bfloat16) for each in with_gradients(run(FUSED, "reference"), wide)])


@needs_compiler
def test_transformations():
    """jit, vmap with weights of one's own or shared, grad inside of vmap, and scan."""
    x, weight, bias = numbers(FUSED)
    ours, library = run(FUSED, "cpu"), run(FUSED, "library")
    images, weights = jnp.stack([x, x[::-1]]), jnp.stack([weight, weight[..., ::-1]])

    def loss(function):
        return jax.grad(lambda x, weight, bias: jnp.sum(function(x, weight, bias) ** 2), (0, 1, 2))

    for axes, arrays in (((0, None, None), (images, weight, bias)), ((0, 0, None), (images, weights, bias))):
        assert_equal([jax.vmap(ours, axes)(*arrays)], [jax.vmap(library, axes)(*arrays)])
        assert_equal(jax.jit(jax.vmap(loss(ours), axes))(*arrays), jax.vmap(loss(library), axes)(*arrays))

    def steps(function):
        return jax.lax.scan(lambda total, x: (total + loss(function)(x, weight, bias)[1], None), 0 * weight, images)[0]

    assert_equal([jax.jit(steps, static_argnums=0)(ours)], [steps(library)])


@needs_compiler
def test_a_gradient_that_nobody_uses_is_dropped():
    x, weight, bias = numbers(FUSED)
    of_weight = jax.jit(jax.grad(lambda weight: run(FUSED, "cpu")(x, weight, bias).sum()))
    text = of_weight.lower(weight).compile().as_text()
    assert "perfkit_conv2d_xla_weight" in text
    assert "perfkit_conv2d_xla_image" not in text


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from perfkit.kernels.conv2d import conv2d
assert jax.device_count() == 2
sharding = NamedSharding(jax.make_mesh((2,), ("data",)), PartitionSpec("data"))
x, weight = (np.random.default_rng(0).integers(-3, 4, size).astype("float32") for size in ((4, 9, 9, 3), (3, 3, 3, 7)))
def loss(weight, x, implementation):
    return (conv2d(x, weight, activation="relu", pool=2, implementation=implementation) ** 2).sum()
gradients = jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=2)
found = gradients(jnp.asarray(weight), jax.device_put(x, sharding), "cpu")
wanted = gradients(jnp.asarray(weight), jnp.asarray(x), "library")
jax.tree.map(np.testing.assert_array_equal, found, wanted)
y = jax.jit(lambda x: conv2d(x, weight, pool=2, implementation="cpu"))(jax.device_put(x, sharding))
assert y.sharding.spec[0] == "data", y.sharding
"""


@needs_compiler
def test_sharded():
    command = [sys.executable, "-c", SHARDED]
    done = subprocess.run(command, env=os.environ | on_devices(2), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def test_who_computes(monkeypatch):
    x, weight, bias = numbers(FUSED)
    with trace() as calls:
        jax.jit(run(FUSED))(x, weight, bias)
    assert calls[0].implementation == ("library" if _native.find_compiler() is None else "cpu")
    monkeypatch.setattr(_native, "find_compiler", lambda: None)
    made = jax_op.problem_of(x, weight, bias, jax_op.options(1, 0, 1, 1, None, None))
    assert "no C++ compiler" in cpu_shape.refusal(made)


X, W = jnp.zeros((2, 6, 6, 4)), jnp.zeros((3, 3, 4, 8))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X[0], W), {}, r"3 dimensions and weight 4: expected \(N, H, W, C\) and \(H, W, I, O\)"),
        ((X, W[:, :, :3]), {}, "x has 4 channels, and weight takes 3 to 8"),
        ((X, W, jnp.zeros(7)), {}, r"bias has shape \[7\]: expected \[8\]"),
        ((X, W.astype(jnp.bfloat16)), {}, "x float32, weight bfloat16"),
        ((X, [1.0]), {}, "weight is a list: expected a JAX array"),
        ((X, W), {"pool": 5}, "leaves nothing"),
        ((X, W), {"activation": "gelu"}, "activation is 'gelu'"),
        ((X, W), {"implementation": "triton"}, "no implementation 'triton' for jax"),
    ],
)
def test_what_cannot_be_used_is_told(arguments, options, message):
    with pytest.raises(InvalidInputError, match=message):
        conv2d(*arguments, **options)


@needs_compiler
def test_what_is_not_supported_is_told():
    with pytest.raises(UnsupportedError, match="runs on tpu"):
        conv2d(X, W, implementation="pallas")
    with pytest.raises(UnsupportedError, match="float16"):
        conv2d(X.astype(jnp.float16), W.astype(jnp.float16), implementation="cpu")
    assert conv2d(X.astype(jnp.float16), W.astype(jnp.float16)).dtype == jnp.float16

    def slope(x):
        return jax.grad(lambda x: jnp.sum(conv2d(x, W, implementation="cpu") ** 2))(x).sum()

    with pytest.raises(UnsupportedError, match="no second derivative: pass implementation='library'"):
        jax.grad(slope)(X)
