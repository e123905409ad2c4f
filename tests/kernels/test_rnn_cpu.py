"""The numbers of the recurrent CPU kernel: every cell, dtype and division of work, and memory of any layout."""

import math

import pytest

pytest.importorskip("torch")

import torch
from rnn_cpu_calls import CASES, MODES, SHARED, Case, assert_is_torch, assert_rounds, by_kernel, by_torch, make

from perfkit.kernels import _native
from perfkit.kernels.rnn import cpu_kernel, cpu_source
from perfkit.kernels.rnn.problem import Problem

if _native.find_compiler() is None:
    pytest.skip("no C++ compiler is installed", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("threads")


@pytest.mark.parametrize("case", CASES + SHARED, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_torchs_layer(mode, case, dtype):
    assert_is_torch(mode, case, dtype)


@pytest.mark.parametrize("mode", MODES)
def test_what_it_rounds_itself_is_as_if_rounded_before(mode):
    assert_rounds(mode)


@pytest.mark.parametrize("mode", MODES)
def test_float16_is_computed_in_float32(mode):
    assert_is_torch(mode, CASES[1], torch.float16)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e-40], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_what_is_not_a_normal_number_does_what_it_does_in_torch(mode, bad):
    layer = make(mode, Case(6, 4, 3, 20), torch.float32)
    layer.x[2, 1, 2] = bad
    if mode != "GRU" or math.isfinite(bad):  # what a gate closes is infinity times 0 in torch, times 2^-30 here
        layer.h0[0, 3, 5] = bad
    expected, found = by_torch(layer, torch.float32)[:2], by_kernel(layer)[:2]
    for result, torchs in zip(found, expected, strict=True):
        assert torch.equal(result.isnan(), torchs.isnan())
        assert torch.equal(result.isinf(), torchs.isinf())
        there = torchs.isfinite()
        # both are exact to a few roundings, a few steps long
        assert (result[there] - torchs[there]).abs().max() <= 2**-18 * torchs[there].abs().max()


@pytest.mark.parametrize(
    ("dtype", "error"),
    [(torch.float32, 2**-22), (torch.bfloat16, 2**-9 + 2**-11)],
    ids=["float32", "bfloat16 and its rounding"],
)
def test_tanh_is_as_exact_as_it_says(dtype, error):
    """An error of e^-2x by a factor of 1 + d changes tanh(x) by at most d / 2, of the quotient by (1 - tanh(x)) d."""
    x = torch.linspace(-20, 20, 40_001).to(dtype)
    problem = Problem("torch", "cpu", str(dtype)[6:], "RNN_TANH", 1, len(x), 1, 1)
    h0, weights = torch.zeros(1, len(x), 1, dtype=dtype), torch.ones(1, 1, dtype=dtype)
    y, _, _ = cpu_kernel.forward(
        problem, x[None, :, None], None, h0, None, [(weights, weights)], False, None, None, None
    )
    assert (y.flatten().double() - x.double().tanh()).abs().max() <= error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch_first", [False, True])
def test_tensors_with_strides(dtype, batch_first):
    layer = make("LSTM", Case(5, 6, 7, 20, 2, batch_first=batch_first), dtype)
    expected = by_kernel(layer)
    gappy = torch.stack([layer.x, torch.full_like(layer.x, float("nan"))], -2).flatten(-3, -2)[:, ::2]
    for x in (gappy, layer.x.mT.contiguous().mT):
        assert not x.is_contiguous()
        assert all(map(torch.equal, by_kernel(layer._replace(x=x)), expected))
    one_row = layer.h0[:, :1].expand(-1, 6, -1)
    states = layer._replace(h0=one_row, c0=one_row)
    assert all(map(torch.equal, by_kernel(states), by_kernel(states._replace(h0=one_row.clone()))))


def test_only_dtypes_that_it_computes_in():
    problem = Problem("torch", "cpu", "float64", "LSTM", 1, 1, 1, 1)
    assert cpu_source.refusal(problem) == "it computes in float32, not in float64"
