"""The convolution of bytes with ReLU and max-pool: bit for bit its reference."""

from dataclasses import replace

import pytest

pytest.importorskip("torch")

import torch
from int8_calls import assert_call_is_the_reference, assert_convolution_is_the_reference, grid, weights

from perfkit import InvalidInputError
from perfkit.kernels import _native
from perfkit.kernels._int8 import Grid
from perfkit.kernels.conv2d_int8.cases import CASES, Case
from perfkit.kernels.conv2d_int8.torch_op import conv2d_int8
from perfkit.quantization.torch_onednn import top

if _native.find_compiler() is None:
    pytest.skip("no C++ compiler is installed", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bits_are_those_of_the_reference(case):
    assert_convolution_is_the_reference(case, top())


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("case", [CASES[0], CASES[7]], ids=lambda case: case.name)
def test_any_number_of_threads(case, threads):
    """Of one image and of many, with work enough for threads to be of use."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for images in (1, 40):
            more = replace(case, image=(images, *case.image[1:]), outputs=96)
            assert_convolution_is_the_reference(more, top(), outs=({},), layouts=(False,))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("inputs", [2, 6])
def test_images_of_any_strides_and_numbers_of_any_kind(inputs):
    case = Case((2, inputs, 8, 9), 5, (3, 3), {"padding": 1, "pool": 2, "activation": "relu"})
    x = torch.randn(2, 8, inputs, 18).transpose(1, 2)[..., ::2]
    x[0, 0, 1, 2], x[1, 1, 3, 4], x[0, 1, 0, 0] = torch.inf, -torch.inf, torch.nan
    layer = weights(5, inputs, 3, 3)
    layer[2][1] = torch.nan
    plain = torch.where(x.isnan(), torch.full_like(x, -torch.inf), x)
    given = dict(grid=grid(90), **case.options)
    found = conv2d_int8(x, *layer, **given)
    assert found[:, 1].isnan().all()
    keep = [0, 2, 3, 4]
    assert torch.equal(found[:, keep], conv2d_int8(plain.contiguous(), *layer, **given)[:, keep])


@pytest.mark.parametrize("inputs", [1, 16])
def test_the_largest_sums_are_exact(inputs):
    case = Case((1, inputs, 6, 6), 3, (3, 3), {"pool": 2})
    for sign in (127, -127):
        w = torch.full((3, inputs, 3, 3), sign, dtype=torch.int8)
        x = torch.full(case.image, top(), dtype=torch.uint8)
        for zero in (0, top()):
            assert_call_is_the_reference(case, x, (w, torch.ones(3), None), Grid(1.0, zero, top()), {})


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("inputs", [1, 6])
def test_numbers_that_no_integer_is_near_become_the_grids_ends(inputs, activation):
    case = Case((1, inputs, 12, 12), 8, (3, 3), {"pool": 2, "activation": activation})
    w, scale, bias = weights(8, inputs, 3, 3)
    bias[:5] = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e30, -1e30])
    for zero, most in ((0, 255), (30, 255), (30, 100)):
        assert_call_is_the_reference(
            case, torch.randn(case.image), (w, scale, bias), grid(90), {"out_grid": Grid(1e-3, zero, most)}
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(2, 3, 8)}, "x has 3 dimensions"),
        ({"x": torch.randn(2, 4, 8, 8)}, "x has 4 channels"),
        ({"x": torch.randn(2, 3, 2, 8)}, "leaves nothing"),
        ({"x": torch.randn(0, 3, 8, 8)}, "no empty dimension"),
        ({"weight": torch.randn(5, 3, 3, 3)}, "expected torch.int8 of 4 dimensions"),
        ({"weight_scale": torch.ones(4)}, "weight_scale is"),
        ({"stride": 0}, "stride is 0"),
        ({"pool": 0}, "pool is 0"),
        ({"out_dtype": torch.float16}, "expected torch.float32 or torch.bfloat16"),
        ({"weight_scale": torch.full((5,), torch.nan)}, "not positive and finite"),
    ],
)
def test_bad_input_is_told(change, message):
    w, scale, bias = weights(5, 3, 3, 3)
    given = {"x": torch.randn(2, 3, 8, 8), "weight": w, "weight_scale": scale, "bias": bias, "grid": grid(90)} | change
    with pytest.raises(InvalidInputError, match=message):
        conv2d_int8(**given)
