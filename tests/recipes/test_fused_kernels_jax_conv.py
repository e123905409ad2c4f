"""The recipe `fused_kernels` on convolutions in JAX: what is swapped, and what is not and why."""

import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
from flax import linen, nnx
from fused_jax import IMAGES, KEYS, TOLERANCE, assert_same, gradients, kernels_in, outputs, reasons, swapped, workload
from jax import lax

KERNEL = jax.random.normal(KEYS[2], (3, 3, 3, 8)) / 5
WEIGHTS = {"conv": {"kernel": KERNEL, "bias": jax.random.normal(KEYS[3], (8,))}}


def convolved(x, kernel, padding="VALID", **options):
    return lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)


def pooled(x, size=2, stride=2, padding="VALID"):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, size, size, 1), (1, stride, stride, 1), padding)


class Normed(nnx.Module):
    def __init__(self, rngs):
        self.conv, self.norm = nnx.Conv(3, 8, (3, 3), strides=2, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
        for variable, low in (
            (self.norm.mean, -0.5),
            (self.norm.var, 0.5),
            (self.norm.scale, 0.5),
            (self.norm.bias, 0),
        ):
            variable[...] = jax.random.uniform(KEYS[4], (8,), minval=low, maxval=low + 1)

    def __call__(self, x):
        return nnx.max_pool(nnx.relu(self.norm(self.conv(x))), (2, 2), (2, 2))


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.max_pool(linen.relu(linen.Conv(8, (3, 3))(x)), (2, 2), (2, 2))
        x = linen.relu(linen.Conv(4, (3, 3), feature_group_count=2, use_bias=False)(x))
        return linen.max_pool(x, (2, 2), (2, 2))


def plain(params, x):
    return pooled(jnp.maximum(convolved(x, params["conv"]["kernel"]) + params["conv"]["bias"], 0))


def pool_first(params, x):
    return jax.nn.relu(pooled(convolved(x, params["conv"]["kernel"], rhs_dilation=(2, 2))))


def inside_of_jit(params, x):
    return jax.jit(plain)(params, x) + jax.jit(plain)(params, 2 * x)


def checkpointed(params, x):
    return jax.checkpoint(lambda x: pooled(jax.nn.relu(convolved(x, params["conv"]["kernel"]))))(x)


def in_a_loop(params, xs):
    return lax.scan(lambda count, x: (count + 1, plain(params, x[None])), 0, xs)


def in_branches(params, x):
    return lax.cond(x.sum() > 0, lambda x: plain(params, x), lambda x: plain(params, -x), x)


FUNCTIONS = [
    (plain, {"conv"}),
    (pool_first, {"conv"}),
    (inside_of_jit, {"conv"}),
    (checkpointed, {"conv"}),
    (in_a_loop, {"conv"}),
    (in_branches, {"conv"}),
]


@pytest.mark.parametrize(("function", "touched"), FUNCTIONS, ids=lambda value: getattr(value, "__name__", ""))
def test_convolutions_of_functions(function, touched):
    work = workload(function, IMAGES, params=WEIGHTS)
    result, effect = swapped(work)
    assert set(effect.touched) == touched
    assert set(kernels_in(result)) == {"cpu"}
    assert not kernels_in(work)
    assert_same(outputs(result), outputs(work))
    assert_same(gradients(result), gradients(work), 4 * TOLERANCE)


def test_a_fixed_norm_is_folded_and_one_that_trains_is_not():
    model = Normed(nnx.Rngs(0))
    work = workload(model, IMAGES)
    result, effect = swapped(work)
    assert effect.touched == ("conv",)
    assert "bias or norm + ReLU + 2×2 max-pool" in effect.notes[0]
    assert_same(outputs(result), outputs(work))
    assert_same(gradients(result), gradients(work), 4 * TOLERANCE)
    _, effect = swapped(workload(model, IMAGES, mode="training"))
    assert "directly follows" in reasons(effect)["conv"]


def test_linen():
    model = Linen()
    work = workload(model, IMAGES, params=model.init(KEYS[5], IMAGES))
    result, effect = swapped(work)
    assert effect.touched == ("Conv_0", "Conv_1")
    assert_same(outputs(result), outputs(work))
    assert_same(gradients(result), gradients(work), 4 * TOLERANCE)


def used_twice(params, x):
    y = convolved(x, params["conv"]["kernel"])
    return jax.nn.relu(y) + y


def returned(params, x):
    y = convolved(x, params["conv"]["kernel"])
    return pooled(jax.nn.relu(y)), y


def leaky(params, x):
    return jax.nn.leaky_relu(convolved(x, params["conv"]["kernel"]))


def overlapping(params, x):
    return pooled(convolved(x, params["conv"]["kernel"]), 3, 2)


def channels_first(params, x):
    y = lax.conv_general_dilated(
        x, params["conv"]["kernel"], (1, 1), "VALID", dimension_numbers=("NCHW", "HWIO", "NCHW")
    )
    return jax.nn.relu(y)


def precise(params, x):
    return pooled(convolved(x, params["conv"]["kernel"], precision="highest"))


def one_dimension(params, x):
    kernel = params["conv"]["kernel"][0]
    return jax.nn.relu(lax.conv_general_dilated(x[0], kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (used_twice, "is used as well"),
        (returned, "is used as well"),
        (leaky, "no ReLU or max-pool"),
        (overlapping, "no ReLU or max-pool"),
        (channels_first, "its layout is not NHWC"),
        (one_dimension, "over 1 dimension"),
        (precise, "precision=HIGHEST was asked for"),
    ],
)
def test_reasons_why_a_convolution_stays(function, reason):
    x = jnp.moveaxis(IMAGES, -1, 1) if function is channels_first else IMAGES
    work = workload(function, x, params=WEIGHTS)
    result, effect = swapped(work)
    assert not effect.touched
    assert reason in next(iter(reasons(effect).values()))
    assert_same(outputs(result), outputs(work), 0)


@jax.custom_jvp
def passing(x):
    """A ReLU whose derivative is 1 throughout."""
    return jnp.maximum(x, 0)


passing.defjvp(lambda primals, tangents: (passing(*primals), tangents[0]))


def test_in_training_a_relu_is_what_has_its_derivative():
    def bare(params, x):
        return pooled(jnp.maximum(convolved(x, params["conv"]["kernel"]), 0))

    def surrogate(params, x):
        return pooled(passing(convolved(x, params["conv"]["kernel"])))

    def real(params, x):
        return pooled(jax.nn.relu(convolved(x, params["conv"]["kernel"])))

    for function, touched in ((bare, ()), (surrogate, ()), (real, ("conv",))):
        assert swapped(workload(function, IMAGES, params=WEIGHTS, mode="training"))[1].touched == touched
        assert swapped(workload(function, IMAGES, params=WEIGHTS))[1].touched == ("conv",)
