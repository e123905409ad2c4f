"""The linear layer of bytes on a known grid: bit for bit its reference, which rounds as torch does."""

import pytest

pytest.importorskip("torch")

import torch
from int8_calls import assert_linear_is_the_reference, grid, weights

from perfkit import InvalidInputError, UnsupportedError
from perfkit.kernels import _int8, _native
from perfkit.kernels._int8 import Grid
from perfkit.kernels.linear_int8_static.cases import CASES
from perfkit.kernels.linear_int8_static.reference import linear_int8_static as reference
from perfkit.kernels.linear_int8_static.reference import rounded
from perfkit.kernels.linear_int8_static.torch_op import linear_int8_static
from perfkit.quantization.torch_onednn import top
from perfkit.quantization.torch_ranges import Affine

if _native.find_compiler() is None:
    pytest.skip("no C++ compiler is installed", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_bits_are_those_of_the_reference(sizes, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_linear_is_the_reference(*sizes, top=top())
    finally:
        torch.set_num_threads(before)


def test_rounding_is_torchs():
    given = Affine(0.37, 5, 120)
    x = torch.cat([torch.randn(500) * 20, torch.arange(-9, 60) * 0.37 / 2, torch.tensor([torch.inf, -torch.inf])])
    assert torch.equal(rounded(x, given), given.integers(x))
    eye, one = torch.eye(x.numel(), dtype=torch.int8), torch.ones(x.numel())
    found = linear_int8_static(x, eye, one, grid=given, out_grid=Grid(given.scale, given.zero, given.top))
    assert torch.equal(found, given.integers(x))


def test_what_is_no_number_is_the_least_of_the_grid():
    x = torch.tensor([[torch.nan, 1.0], [torch.nan, torch.nan]])
    w, scale, _ = weights(3, 2)
    given = grid(100)
    low = torch.full_like(x, -torch.inf)
    expected = linear_int8_static(torch.where(x.isnan(), low, x), w, scale, grid=given)
    assert torch.equal(linear_int8_static(x, w, scale, grid=given), expected)


def test_a_bias_that_is_no_number_shows():
    w, scale, bias = weights(20, 8)
    bias[3] = torch.nan
    y = linear_int8_static(torch.randn(4, 8), w, scale, bias, grid=grid(100), activation="relu")
    assert y[:, 3].isnan().all()
    assert not y[:, [0, 1, 2, *range(4, 20)]].isnan().any()


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_are_exact(sign):
    inputs = _int8.MOST_INPUTS
    for zero in (0, top()):
        q = torch.full((1, inputs), top() - zero, dtype=torch.uint8)
        w = torch.full((2, inputs), 127 * sign, dtype=torch.int8)
        y = linear_int8_static(q, w, torch.ones(2), grid=Grid(1.0, zero, top()))
        assert (y == torch.tensor(float(sign * 127 * inputs * (top() - 2 * zero)))).all()


def test_inputs_of_any_strides_and_no_rows():
    w, scale, bias = weights(7, 16)
    for x in (
        torch.randn(3, 16, 5).transpose(1, 2),
        torch.randn(6, 32)[:, ::2],
        torch.randn(2, 0, 16),
        torch.randn(16),
    ):
        given = (w, scale, bias)
        assert torch.equal(linear_int8_static(x, *given, grid=grid(90)), reference(x, *given, grid=grid(90)))


def test_weights_are_packed_anew_where_they_were_written_to():
    w, scale, _ = weights(5, 8)
    x = torch.randn(2, 8)
    for change in (lambda: w.neg_(), lambda: scale.mul_(2), lambda: w.copy_(w.flip(0))):
        linear_int8_static(x, w, scale, grid=grid(90))
        change()
        assert torch.equal(linear_int8_static(x, w, scale, grid=grid(90)), reference(x, w, scale, grid=grid(90)))
    with torch.inference_mode():
        w = w.clone()
        linear_int8_static(x, w, scale, grid=grid(90))
        w.neg_()
        assert torch.equal(linear_int8_static(x, w, scale, grid=grid(90)), reference(x, w, scale, grid=grid(90)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(2, 9)}, "expected \\(..., K\\), \\(N, K\\)"),
        ({"x": torch.randn(2, 8).double()}, "torch.float32, or torch.uint8 on the grid"),
        ({"weight": torch.randn(5, 8)}, "expected torch.int8 of 2 dimensions"),
        ({"weight_scale": torch.ones(4)}, r"weight_scale is torch.float32 \[4\]: expected torch.float32 \[5\]"),
        ({"bias": torch.ones(5).double()}, "bias is torch.float64"),
        ({"grid": Grid(0.0, 0, 255)}, "expected a positive scale"),
        ({"grid": Grid(1.0, 9, 8)}, "zero within 0...top"),
        ({"grid": Grid(1.0, 0, 300)}, "top within 1...255"),
        ({"activation": "gelu"}, "expected None or 'relu'"),
        ({"out_dtype": torch.float16}, "expected torch.float32 or torch.bfloat16"),
        ({"weight_scale": torch.zeros(5)}, "not positive and finite"),
    ],
)
def test_bad_input_is_told(change, message):
    w, scale, bias = weights(5, 8)
    given = {"x": torch.randn(2, 8), "weight": w, "weight_scale": scale, "bias": bias, "grid": grid(90)} | change
    with pytest.raises(InvalidInputError, match=message):
        linear_int8_static(**given)


def test_sums_that_could_overflow_are_refused(monkeypatch):
    inputs = _int8.MOST_INPUTS + 1
    w, scale, _ = weights(1, inputs)
    with pytest.raises(UnsupportedError, match="could overflow int32"):
        linear_int8_static(torch.zeros(1, inputs), w, scale, grid=grid(90))
    monkeypatch.setattr(_int8, "has", lambda name: name == "avx2")
    with pytest.raises(UnsupportedError, match="no VNNI"):
        linear_int8_static(torch.zeros(1, 4), *weights(1, 4)[:2], grid=grid(255))
