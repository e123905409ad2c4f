"""The Triton convolution and its gradients, in the interpreter, against float64; and what is compiled for devices.

A product of float32 numbers summed over K of them is off by at most K 2^-24 of the sum of their magnitudes. References
are float64 of the same rounded numbers, that sum is what `torch.autograd` makes of magnitudes.
"""

import dataclasses

import pytest

pytest.importorskip("torch")

import torch

pytest.importorskip("triton")

import torch.nn.functional as F
from triton_interpreter import interpreted

from perfkit.kernels.conv2d import reference, triton_kernel
from perfkit.kernels.conv2d.cases import CASES, Case
from perfkit.kernels.conv2d.problem import DEAD, options, problem

EPSILON = {"float32": 2.0**-24, "float16": 2.0**-11}
"""No bfloat16: the interpreter of Triton 3.7 multiplies its bits as integers. It is only compiled."""


def make(case, dtype="float32", channels_last=False, needs_grad=True):
    """The case's problem, with x, weight and bias."""
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    x, weight = torch.randn(case.image).to(kind), torch.randn(case.weight).to(kind)
    bias = torch.randn(case.outputs).to(kind) if case.bias else None
    given = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "activation": None, "pool": None} | case.options
    made = problem(
        options(**given),
        framework="torch",
        device="cuda",
        dtypes={"x": dtype, "weight": dtype},
        image=case.image,
        kernel=case.weight,
        bias=None if bias is None else bias.shape,
        channels_last=channels_last,
        needs_grad=needs_grad,
    )
    return (
        made,
        x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format),
        weight,
        bias,
    )


def exact(made, x, weight, bias):
    """y before rounding, in float64."""
    wide = dataclasses.replace(made, dtype="float64")
    nhwc = reference.conv2d(wide, x.permute(0, 2, 3, 1), weight.permute(2, 3, 1, 0), bias)
    return nhwc.permute(0, 3, 1, 2)


def linear(made, x, weight, routes):
    """The convolution without bias and activation, pooled by known places: y, where `routes` picks from each window."""
    top, bottom, left, right = made.padding
    z = F.conv2d(F.pad(x, (left, right, top, bottom)), weight, None, made.stride, 0, made.dilation, made.groups)
    height, width = made.out_size
    z = z[:, :, : height * made.pool, : width * made.pool]
    windows = z.unflatten(3, (width, made.pool)).unflatten(2, (height, made.pool)).transpose(3, 4).flatten(4)
    return (windows * routes).sum(4)


def routed(made, argmax, like):
    """Of each output, 1 for the place in its window that gave it, (N, O, H', W', P * P); all 0 where ReLU cut it."""
    codes = torch.zeros_like(like, dtype=torch.uint8) if argmax is None else argmax
    return (codes.unsqueeze(-1) == torch.arange(made.pool**2, dtype=torch.uint8)).double()


def check(made, x, weight, bias, configuration=()):
    """Forward and every gradient, each within its bound."""
    rounding, unit = EPSILON[made.dtype], EPSILON["float32"]
    y, argmax = triton_kernel.forward(made, x, weight, bias, configuration)
    wide = [None if each is None else each.double().requires_grad_() for each in (x, weight, bias)]
    expected = exact(made, *wide)
    positive = [each.abs().detach().requires_grad_() for each in wide[:2]]
    everywhere = routed(made, None, y).fill_(1)
    magnitude = linear(made, *positive, everywhere) + (0 if bias is None else bias.double().abs()[:, None, None])
    assert y.dtype == x.dtype
    assert y.is_contiguous(memory_format=torch.channels_last if made.channels_last else torch.contiguous_format)
    assert (y - expected).abs().le(rounding * expected.abs() + (made.taps + 2) * unit * magnitude + 1e-30).all()

    # Which place won is the kernel's own choice among places that are as good to float32: gradients follow that choice.
    routes = routed(made, argmax, y)
    if argmax is not None:
        dead = argmax == DEAD
        assert ((routes.sum(-1) == 1) | dead).all()
        assert (dead == (y == 0)).all() if made.activation == "relu" else not dead.any()
    d_y = (
        torch.randn(y.shape)
        .to(y.dtype)
        .contiguous(memory_format=torch.channels_last if made.channels_last else torch.contiguous_format)
    )
    found = triton_kernel.backward(made, x, weight, argmax, d_y, (True, True, True), configuration)
    chosen = linear(made, *wide[:2], routes)
    expected = torch.autograd.grad(chosen, wide[:2], d_y.double())
    bound = torch.autograd.grad(linear(made, *positive, routes), positive, d_y.double().abs())
    places = y[:, 0].numel() * made.pool**2
    for name, got, want, size, terms in zip(
        ("x", "weight"), found, expected, bound, (made.taps * made.outputs, places), strict=False
    ):
        assert got.shape == want.shape, name
        assert got.dtype == x.dtype, name
        assert (got - want).abs().le(rounding * want.abs() + terms * unit * size + 1e-30).all(), name
    if bias is None:
        assert found[2] is None
    else:
        alive = routes.sum(-1) * d_y.double()
        want, size = alive.sum((0, 2, 3)), alive.abs().sum((0, 2, 3))
        assert (found[2] - want).abs().le(rounding * want.abs() + places * unit * size + 1e-30).all()
    return y, argmax, found


@pytest.mark.parametrize("index", range(len(CASES)), ids=[case.name for case in CASES])
@interpreted
def test_forward_and_gradients(index):
    check(*make(CASES[index]))


@interpreted
def test_half_precision_channels_last():
    check(*make(CASES[2], "float16", channels_last=True))


MANY = Case(2, 20, 7, 9, 18, (3, 2), {"activation": "relu", "pool": 2, "padding": 1})
"""Channels enough for sums tap by tap, more than one tile of everything, and remainders."""

SMALL = tuple({f"{part}block_{letter}": 16 for part in ("", "weight_", "input_") for letter in "mnk"}.items())


@pytest.mark.parametrize(("channels_last", "stride"), [(False, 2), (True, 1)])
@interpreted
def test_many_channels_in_small_tiles(channels_last, stride):
    case = dataclasses.replace(MANY, options={**MANY.options, "stride": stride})
    check(*make(case, channels_last=channels_last), SMALL)


@interpreted
def test_groups_of_many_channels():
    case = Case(1, 36, 6, 7, 40, (3, 2), {"groups": 2, "pool": 2, "dilation": (2, 1)})
    check(*make(case), SMALL)


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@interpreted
def test_rounds_over_a_window_change_nothing(width):
    """A window's places, some or all or more than there are in one product, in equal numbers: the first one wins."""
    case = Case(1, 1, 9, 9, 3, (1, 1), {"pool": 3})
    made, x, weight, bias = make(case)
    x.copy_((x > 0).float())
    y, argmax, _ = check(made, x, weight, bias, (("width", width), ("block_m", 16)))
    z = F.conv2d(x, weight, bias)
    expected, indices = F.max_pool2d(z, 3, return_indices=True)
    rows, columns = indices // 9 % 3, indices % 9 % 3
    assert torch.equal(y, expected)
    assert torch.equal(argmax.long(), rows * 3 + columns)


@interpreted
def test_the_same_call_gives_the_same_bits():
    made, x, weight, bias = make(MANY)
    y, argmax = triton_kernel.forward(made, x, weight, bias)
    runs = [triton_kernel.backward(made, x, weight, argmax, y, (True, True, True)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@interpreted
def test_what_is_not_wanted_is_none():
    made, x, weight, bias = make(CASES[2])
    y, argmax = triton_kernel.forward(made, x, weight, bias)
    for wanted in ((True, False, False), (False, True, False), (False, False, True), (False, False, False)):
        found = triton_kernel.backward(made, x, weight, argmax, y, wanted)
        assert tuple(gradient is not None for gradient in found) == wanted
    assert triton_kernel.forward(dataclasses.replace(made, needs_grad=False), x, weight, bias)[1] is None


@interpreted
def test_nan_and_infinity_go_where_torch_sends_them():
    made, x, weight, bias = make(Case(2, 3, 8, 8, 4, (3, 3), {"activation": "relu", "pool": 2}))
    x[0, 1, 2, 2], x[0, 2, 7, 7], x[1, 0, 0, 0] = float("nan"), float("inf"), float("-inf")
    y, _ = triton_kernel.forward(made, x, weight, bias)
    expected = F.max_pool2d(F.relu(F.conv2d(x, weight, bias)), 2)
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-5, atol=1e-5)
    assert y.isnan().any()
    assert y.isinf().any()


def typical(**changes):
    made, *_ = make(CASES[1])
    return dataclasses.replace(made, **changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pool": 1}, "without a pool"),
        ({"inputs": 128}, "1152 products"),
        ({"inputs": 32, "groups": 32}, "1 output channels in a group"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_left_to_cudnn(changes, reason):
    assert triton_kernel.slower(typical()) is None
    assert reason in triton_kernel.slower(typical(**changes))
    assert triton_kernel.refusal(typical(**changes)) is None


def test_what_it_refuses():
    assert triton_kernel.refusal(typical()) is None
    assert "32 bits" in triton_kernel.refusal(typical(batch=2**21))


def test_candidates_start_with_the_rule_and_change_the_gradients_only_where_there_are_some():
    training, inference = (triton_kernel.candidates(typical(needs_grad=grad)) for grad in (True, False))
    assert dict(training[0]) == triton_kernel.configure(typical())
    assert len(set(training)) == len(training) > len(inference)
    gradients = {tuple(part for part in found if part[0].startswith(("weight_", "input_"))) for found in inference}
    assert len(gradients) == 1


def test_float32_is_tried_in_larger_tiles_where_it_may_be_rounded(monkeypatch):
    rows = []
    for precision in ("tf32", "ieee"):
        monkeypatch.setattr(triton_kernel.launch, "precision_of", lambda _problem, found=precision: found)
        given = typical(dtype="float32", inputs=1, outputs=32)
        rows.append({dict(found)["block_m"] for found in triton_kernel.candidates(given)})
    rule = triton_kernel.configure(given)["block_m"]
    assert rows == [{rule, 2 * rule, 4 * rule}, {rule}]


def test_how_many_programs_sum_the_gradient_of_the_weight_is_configured():
    from perfkit.kernels.conv2d import triton_launch

    given = typical(batch=1024)
    for programs in (264, 1056):
        chosen = triton_kernel.configure(given) | {"weight_programs": programs}
        slabs, slab = triton_launch._slabs(given, chosen)
        assert 0.8 * programs <= slabs * triton_launch._weight_tiles(given, chosen) <= programs
        assert slabs * slab >= given.batch * given.out_size[0] * given.out_size[1] * given.pool**2
