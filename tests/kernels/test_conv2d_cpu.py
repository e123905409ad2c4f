"""The CPU kernel of conv2d itself: threads, chunks, rounding, numbers that are none, other instruction sets."""

import dataclasses
import math

import pytest

pytest.importorskip("torch")

import torch
from instruction_paths import EMULATED, in_place, need

from perfkit.kernels import _native
from perfkit.kernels.conv2d import cases, cpu_kernel, cpu_shape, problem, reference, torch_problem

if _native.find_compiler() is None:
    pytest.skip("no C++ compiler is installed", allow_module_level=True)


def problem_of(case, tensors):
    """The case's, for training."""
    given = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "activation": None, "pool": None} | case.options
    return torch_problem.problem_of(*tensors, problem.options(**given), True)


def run(made, x, weight, bias, d_y=None):
    """y, d_x, d_weight, d_bias; what comes back is all ones unless given."""
    y, argmax = cpu_kernel.forward(made, x, weight, bias)
    d_y = torch.ones_like(y) if d_y is None else d_y
    return y, *cpu_kernel.backward(made, x, weight, argmax, d_y, (True, True, True))


def expected(made, x, weight, bias, d_y=None):
    """The same by the reference in float64, on the same numbers."""
    wide = [None if each is None else each.double().requires_grad_() for each in (x, weight, bias)]
    x, weight, bias = wide
    made = dataclasses.replace(made, dtype="float64")
    y = reference.conv2d(made, x.permute(0, 2, 3, 1), weight.permute(2, 3, 1, 0), bias).permute(0, 3, 1, 2)
    there = [each for each in wide if each is not None]
    d_y = torch.ones_like(y) if d_y is None else d_y.double()
    found = iter(torch.autograd.grad(y, there, d_y))
    return y.detach(), *(None if each is None else next(found) for each in wide)


def whole(case, layout=torch.contiguous_format):
    x, *rest = (None if each is None else torch.from_numpy(each) for each in cases.whole(case))
    return x.to(memory_format=layout), *rest


def assert_equal(found, wanted):
    for each, other in zip(found, wanted, strict=True):
        if other is None:
            assert each is None
        else:
            torch.testing.assert_close(each, other.to(each.dtype), rtol=0, atol=0, equal_nan=True)


CHUNKED = (
    cases.Case(1, 64, 7, 140, 3, (3, 3), {"activation": "relu", "pool": 2}),
    cases.Case(2, 16, 40, 43, 5, (3, 3), {"activation": "relu", "pool": 2, "padding": 1}),
    cases.Case(1, 24, 30, 260, 3, (5, 3), {"padding": (2, 1)}, bias=False),
    cases.Case(1, 16, 65, 61, 3, (3, 3), {"stride": 2, "pool": 3, "groups": 1}),
)
"""More than a processor's cache is taken to hold: parts of rows, and several rows, at a time."""


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("case", CHUNKED, ids=lambda case: case.name)
def test_large_images_are_done_in_chunks(case, layout):
    tensors = whole(case, layout)
    made = problem_of(case, tensors)
    assert_equal(run(made, *tensors), expected(made, *tensors))


CHANNELS = (
    cases.Case(2, 1, 13, 11, 32, (3, 3), {"activation": "relu", "pool": 2}),
    cases.Case(3, 3, 12, 9, 80, (3, 3), {"activation": "relu", "pool": 2, "padding": 1}),
    cases.Case(1, 6, 17, 15, 45, (3, 4), {"padding": (1, 2), "dilation": (1, 2)}),
    cases.Case(2, 8, 10, 14, 96, (2, 3), {"activation": "relu", "pool": 3, "groups": 2}, bias=False),
    cases.Case(2, 5, 19, 21, 112, (5, 5), {"activation": "relu", "stride": 2, "padding": "same"}),
    cases.Case(1, 2, 16, 18, 13, (3, 3), {"stride": (2, 1), "pool": 4, "padding": 3}),
    cases.Case(1, 7, 9, 8, 16, (1, 1)),
    cases.Case(1, 18, 70, 130, 16, (3, 3), {"activation": "relu", "padding": 1}),
)
"""So many channels that they are the lanes of an NHWC image's vectors: one to four of them, whole and in part; runs of
taps of even and odd length; the last image is more than the cache is taken to hold."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CHANNELS, ids=lambda case: case.name)
def test_lanes_of_channels(case, dtype):
    """With what the backward pass wants, and without; bfloat16 results are those of exact sums, rounded once."""
    tensors = whole(case, torch.channels_last)
    made, wanted = problem_of(case, tensors), expected(problem_of(case, tensors), *tensors)
    low = [None if each is None else each.to(dtype) for each in tensors]
    made = dataclasses.replace(made, dtype=str(dtype)[6:], channels_last=True)
    assert_equal(run(made, *low), wanted)
    unsaved, _ = cpu_kernel.forward(dataclasses.replace(made, needs_grad=False), *low)
    assert_equal([unsaved], wanted[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_no_number_stays_in_its_windows_with_lanes_of_channels(dtype):
    """An infinite number beside a row of taps is none of theirs: it must not be multiplied, not even by zero."""
    x, weight = torch.ones(1, 1, 6, 34, dtype=dtype), torch.ones(16, 1, 3, 3, dtype=dtype)
    x[0, 0, 0, ::9], x[0, 0, 3, 4::7], x[0, 0, 5, 2::9] = math.inf, -math.inf, math.nan
    x = x.to(memory_format=torch.channels_last)
    for options in ({"padding": 1}, {"activation": "relu", "pool": 2}):
        case = cases.Case(1, 1, 6, 34, 16, (3, 3), options, bias=False)
        made = dataclasses.replace(problem_of(case, (x, weight, None)), channels_last=True)
        wide = x.float(), weight.float(), None
        y = torch.nn.functional.conv2d(*wide[:2], padding=options.get("padding", 0))
        y = torch.nn.functional.max_pool2d(y.relu(), 2) if "pool" in options else y
        for needs_grad in (True, False):
            found, _ = cpu_kernel.forward(dataclasses.replace(made, needs_grad=needs_grad), x, weight, None)
            assert y.isnan().any()
            assert y.isfinite().any()
            assert_equal([found], [y])


TILED = (
    cases.Case(3, 1, 28, 28, 32, (3, 3), {"activation": "relu", "pool": 2}),
    cases.Case(2, 3, 17, 19, 20, (3, 3), {"pool": 2, "padding": 1}, bias=False),
    cases.Case(2, 4, 14, 14, 8, (5, 5), {"activation": "relu", "pool": 2, "padding": 2, "groups": 2}),
    cases.Case(1, 9, 12, 2500, 33, (3, 3), {"activation": "relu", "pool": 2, "padding": (0, 1)}),
    cases.Case(1, 2, 9, 40, 17, (2, 1), {"pool": 2}),
)
"""What AMX's tiles take in bfloat16: one step of words and several, channels that fill no tile, parts of a row."""


LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def assert_windows_of_four(case, layout):
    """With what the backward pass wants, and without; what is infinite or no number stays in its windows."""
    tensors = whole(case, layout)
    made = dataclasses.replace(problem_of(case, tensors), dtype="bfloat16")
    for x in (tensors[0], tensors[0].index_fill(3, torch.tensor([5]), math.inf)):
        given = (x, *tensors[1:])
        wanted = expected(made, *given)
        low = [None if each is None else each.bfloat16() for each in given]
        if x is tensors[0]:
            assert_equal(run(made, *low), wanted)
        unsaved, _ = cpu_kernel.forward(dataclasses.replace(made, needs_grad=False), *low)
        assert_equal([unsaved], wanted[:1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", TILED, ids=lambda case: case.name)
def test_windows_of_four_in_bfloat16(case, layout):
    assert_windows_of_four(case, LAYOUTS[layout])


def test_windows_of_four_on_emulated_tiles(tmp_path, threads):
    """AMX's instructions are what their manual says, on any processor with AVX-512."""
    need("avx512f")
    with in_place(cpu_kernel, tmp_path, EMULATED):
        for case in TILED:
            for layout in LAYOUTS.values():
                threads(3)
                assert_windows_of_four(case, layout)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("batch", [1, 9])
def test_any_number_of_threads_gives_the_same_bits(batch, layout, threads):
    torch.manual_seed(0)
    case = cases.Case(batch, 9, 70, 45, 30, (3, 3), {"activation": "relu", "pool": 2})
    tensors = torch.randn(case.image), torch.randn(case.weight), torch.randn(case.outputs)
    tensors = tensors[0].to(memory_format=layout), *tensors[1:]
    made, d_y = problem_of(case, tensors), None
    found = []
    for count in (1, 2, 3):
        threads(count)
        y, argmax = cpu_kernel.forward(made, *tensors)
        d_y = torch.randn_like(y) if d_y is None else d_y
        found.append((y, argmax, *cpu_kernel.backward(made, *tensors[:2], argmax, d_y, (True, True, True))))
    assert made.batch * made.outputs * math.prod(made.out_size) * made.pool**2 * made.taps > 3 << 20  # worth 3 threads
    for other in found[1:]:
        assert_equal(other, found[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(
    "case", [cases.CASES[1], cases.CASES[3], cases.CASES[8], CHANNELS[1]], ids=lambda case: case.name
)
def test_rounding(case, layout, dtype):
    """A float32 sum of n terms is within n 2^-24 of the sum of their magnitudes; then it is rounded once to x's dtype.

    bfloat16 has eight bits. The largest of a window is as close as the largest bound in it.
    """
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(size).to(dtype) for size in (case.image, case.weight, case.outputs))
    x, bias = x.to(memory_format=layout), bias if case.bias else None
    made = problem_of(case, (x, weight, bias))
    y, _ = cpu_kernel.forward(made, x, weight, bias)
    wanted = expected(made, x, weight, bias)[0]
    magnitude = expected(made, x.abs(), weight.abs(), None if bias is None else bias.abs())[0]
    last = 2.0**-8 if dtype == torch.bfloat16 else 0.0
    bound = (made.taps + 1) * 2.0**-24 * magnitude
    assert ((y.double() - wanted).abs() <= bound + last * (wanted.abs() + bound)).all()


def test_what_is_no_number():
    """As in the framework's layers: NaN beats all, its gradient passes; infinities are numbers."""
    case = cases.Case(1, 1, 8, 34, 3, (1, 1), {"activation": "relu", "pool": 2})
    x, weight, bias = whole(case)
    x[0, 0, 0, ::5] = math.nan
    x[0, 0, 3, ::3] = math.inf
    x[0, 0, 4, ::3] = -math.inf
    x[0, 0, 6:8, :4] = -math.inf
    weight[:] = torch.tensor([1.0, -2.0, 3.0]).view(3, 1, 1, 1)
    made = problem_of(case, (x, weight, bias))
    inputs = [each.clone().requires_grad_() for each in (x, weight, bias)]
    y = torch.nn.functional.max_pool2d(torch.nn.functional.conv2d(*inputs).relu(), 2)
    wanted = y.detach(), *torch.autograd.grad(y.where(y.isfinite() | y.isnan(), 0).sum(), inputs)
    d_y = (y.isfinite() | y.isnan()).float()
    assert y.isnan().any()
    assert y.isinf().any()
    assert_equal(run(made, x, weight, bias, d_y), wanted)
    unsaved, _ = cpu_kernel.forward(dataclasses.replace(made, needs_grad=False), x, weight, bias)
    assert_equal([unsaved], [wanted[0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_is_the_librarys_where_arm_has_instructions_for_it(dtype, monkeypatch):
    x, weight = torch.randn(1, 1, 8, 8, dtype=dtype), torch.randn(2, 1, 3, 3, dtype=dtype)
    made = torch_problem.problem_of(x, weight, None, problem.options(1, 0, 1, 1, "relu", 2), False)
    reasons = []
    for has in (False, True):
        monkeypatch.setattr(cpu_shape, "has", lambda name, has=has: has and name == "bf16")
        reasons.append(cpu_shape.slower(made))
    assert reasons[0] is None
    assert (reasons[1] is None) == (dtype == torch.float32)


@pytest.mark.parametrize("lanes", [8, 4], ids=["AVX2", "ARM"])
def test_in_other_vectors(lanes, tmp_path):
    need("avx512f")  # where there is none, every test here runs the code for AVX2
    with in_place(cpu_kernel, tmp_path, "#undef __AVX512F__", (f"-DPERFKIT_LANES={lanes}",)):
        for case in (*cases.CASES[:6], CHUNKED[0]):
            for layout in LAYOUTS.values():
                tensors = whole(case, layout)
                made = problem_of(case, tensors)
                assert_equal(run(made, *tensors), expected(made, *tensors))
