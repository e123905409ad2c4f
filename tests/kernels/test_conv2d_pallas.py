"""The Pallas convolution for TPU, interpreted and lowered, and its gradients, against the reference in float64 (torch).

A float32 sum of K products is off by at most K 2^-24 of the sum of their magnitudes.
"""

import dataclasses
import functools

import pytest

pytest.importorskip("jax")
pytest.importorskip("torch")

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.experimental.pallas import tpu as pltpu

from perfkit.kernels.conv2d import pallas_kernel, reference
from perfkit.kernels.conv2d.problem import DEAD, Problem

BASE = Problem(
    *("jax", "tpu", "float32", 2, 9, 12, 13, 17, 3, 3),
    padding=(1, 1, 1, 1),
    activation="relu",
    pool=2,
    channels_last=True,
    needs_grad=True,
)
PROBLEMS = {
    "strides": dataclasses.replace(BASE, stride=(2, 1), kernel_height=4, padding=(0, 0, 0, 0)),
    "pool 3": dataclasses.replace(BASE, pool=3, dilation=(2, 1), kernel_width=1),
    "uneven padding": dataclasses.replace(BASE, padding=(0, 1, 2, 0), activation=None),
    "two blocks of outputs": dataclasses.replace(BASE, outputs=256, height=4, width=5, bias=False),
    "longer than one product": dataclasses.replace(BASE, batch=1, height=44, width=30, kernel_height=1, kernel_width=2),
}
SMALL = dataclasses.replace(BASE, kernel_height=1, kernel_width=1, padding=(0, 0, 0, 0), activation=None)
each_problem = pytest.mark.parametrize("made", PROBLEMS.values(), ids=PROBLEMS)


def make(made):
    """x, weight and bias of a problem, in its dtype."""
    random = np.random.default_rng(0)
    shapes = (
        (made.batch, made.height, made.width, made.inputs),
        (made.kernel_height, made.kernel_width, made.inputs, made.outputs),
        (made.outputs,),
    )
    x, weight, bias = (jnp.asarray(random.standard_normal(shape), made.dtype) for shape in shapes)
    return x, weight, bias if made.bias else None


def exact(made, x, weight, bias, d_y=None):
    """y in float64 and a bound on its sums' rounding; with d_y also those of the gradients of x, weight and bias."""
    wide = dataclasses.replace(made, framework="torch", dtype="float64")
    given = [None if each is None else torch.tensor(np.asarray(each, np.float64)) for each in (x, weight, bias)]
    leaves = [each.requires_grad_() for each in given if each is not None]
    y = reference.conv2d(wide, *given)
    sizes = [None if each is None else each.detach().abs().requires_grad_() for each in given]
    size = reference.conv2d(dataclasses.replace(wide, activation=None), *sizes)
    outcome = [(y.detach().numpy(), (made.taps + 2) * 2.0**-24 * size.detach().numpy())]
    if d_y is None:
        return outcome[0]
    # Of magnitudes, and over all places of each window, which is more than any sum has.
    whole = reference.conv2d(dataclasses.replace(wide, activation=None, pool=1), *sizes)
    d_y = torch.tensor(np.asarray(d_y, np.float64))
    d_whole = torch.zeros_like(whole)
    spread = d_y.abs().repeat_interleave(made.pool, 1).repeat_interleave(made.pool, 2)
    d_whole[:, : spread.shape[1], : spread.shape[2]] = spread
    bounds = torch.autograd.grad(whole, [each for each in sizes if each is not None], d_whole)
    places = d_y[..., 0].numel() * made.pool**2
    terms = (made.kernel_height * made.kernel_width * made.outputs, places, places)
    for gradient, bound, count in zip(torch.autograd.grad(y, leaves, d_y), bounds, terms, strict=False):
        outcome.append((gradient.numpy(), count * 2.0**-24 * bound.numpy()))
    return outcome


@each_problem
def test_forward_and_gradients(made):
    """Gradients of both go to the same places: no window here has two that are as good to float32."""
    x, weight, bias = make(made)
    y, argmax = pallas_kernel.forward(made, x, weight, bias, interpret=True)
    d_y = jnp.asarray(np.random.default_rng(1).standard_normal(y.shape), y.dtype)
    found = pallas_kernel.backward(made, x, weight, argmax, d_y, (True, True, True))
    assert (found[2] is None) == (bias is None)
    got = [y, *(each for each in found if each is not None)]
    for array, (expected, bound) in zip(got, exact(made, x, weight, bias, d_y), strict=True):
        assert array.dtype == x.dtype
        assert (abs(np.asarray(array, np.float64) - expected) <= bound).all()
    assert argmax.dtype == jnp.uint8
    if made.activation == "relu":
        assert ((argmax == DEAD) == (y == 0)).all()
    else:
        assert (argmax < made.pool**2).all()
    assert pallas_kernel.refusal(made) is None


def test_what_is_not_wanted_is_none():
    x, weight, bias = make(BASE)
    y, argmax = pallas_kernel.forward(BASE, x, weight, bias, interpret=True)
    assert pallas_kernel.backward(BASE, x, weight, argmax, y, (False, True, False))[::2] == (None, None)
    assert (
        pallas_kernel.forward(dataclasses.replace(BASE, needs_grad=False), x, weight, bias, interpret=True)[1] is None
    )


def test_bfloat16_is_rounded_once():
    made = dataclasses.replace(SMALL, dtype="bfloat16")
    x, weight, bias = make(made)
    y, _ = pallas_kernel.forward(made, x, weight, bias, interpret=True)
    expected, bound = exact(made, x, weight, bias)
    assert y.dtype == jnp.bfloat16
    assert (abs(np.asarray(y, np.float64) - expected) <= bound + 2.0**-8 * abs(expected)).all()


def test_no_race_and_nothing_read_that_was_not_written():
    """On a machine of a TPU's kind: memory starts as NaN, blocks are copied, and who reads and writes is watched."""
    made = dataclasses.replace(SMALL, outputs=256)
    x, weight, bias = make(made)
    strict = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")
    y, argmax = pallas_kernel.forward(made, x, weight, bias, interpret=strict)
    expected = pallas_kernel.forward(made, x, weight, bias, interpret=True)
    np.testing.assert_allclose(y, expected[0], rtol=1e-5, atol=1e-5)
    assert (argmax == expected[1]).all()
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    assert not interpret_pallas_call.races.races_found


@pytest.mark.parametrize(("name", "dtype"), [("strides", "float32"), ("two blocks of outputs", "bfloat16")])
def test_it_lowers_for_tpu(name, dtype):
    made = dataclasses.replace(PROBLEMS[name], dtype=dtype)
    arrays = [None if each is None else jax.ShapeDtypeStruct(each.shape, each.dtype) for each in make(made)]
    exported = jax.export.export(jax.jit(functools.partial(pallas_kernel.forward, made)), platforms=["tpu"])(*arrays)
    assert "tpu_custom_call" in exported.mlir_module()


def test_equal_numbers_and_nan():
    made = SMALL
    x, weight, bias = make(made)
    x = (x > 0).astype(x.dtype) * 0 + 1
    y, argmax = pallas_kernel.forward(made, x, weight, bias, interpret=True)
    assert (argmax == 0).all()
    y, argmax = pallas_kernel.forward(made, x.at[0, 3, 4, 1].set(jnp.nan), weight, bias, interpret=True)
    assert jnp.isnan(y[0, 1, 2]).all()
    assert jnp.isnan(y).sum() == made.outputs
    assert (argmax[0, 1, 2] == 2).all()  # the second row's first place


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pool": 1}, "without a pool"),
        ({"dtype": "float16"}, "float16"),
        ({"inputs": 3}, "3 channels"),
        ({"groups": 3}, "in 3 groups"),
        ({"height": 500, "width": 500}, "products written out"),
        ({"inputs": 512, "outputs": 512, "height": 40, "width": 40}, "MiB of VMEM"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_it_refuses(changes, reason):
    assert reason in pallas_kernel.refusal(dataclasses.replace(BASE, **changes))
