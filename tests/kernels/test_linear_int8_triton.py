"""The Triton kernels of linear_int8, in the interpreter: the reference's integers, and exact sums within rounding."""

import dataclasses

import pytest

pytest.importorskip("torch")

import torch

pytest.importorskip("triton")

from triton_interpreter import interpreted

from perfkit.kernels.linear_int8 import reference, triton_kernel
from perfkit.kernels.linear_int8.cases import CASES, Case
from perfkit.kernels.linear_int8.problem import Problem


def problem(case, **changes):
    sizes = (case.x, case.rows, case.inputs, case.outputs, case.scale if case.x == "int8" else "row")
    return dataclasses.replace(Problem("torch", "cuda", *sizes, case.bias, case.activation), **changes)


def make(case):
    """x, weight, weight_scale, bias and x_scale, as implementations get them."""
    torch.manual_seed(0)
    weight = torch.randint(-128, 128, (case.outputs, case.inputs), dtype=torch.int8)
    x, x_scale = torch.randn(case.rows, case.inputs).to(getattr(torch, case.x, torch.float32)), None
    if case.x == "int8":
        x = torch.randint(-128, 128, (case.rows, case.inputs), dtype=torch.int8)
        x_scale = torch.rand(case.rows if case.scale == "row" else 1, 1)
    return x, weight, torch.rand(case.outputs), torch.randn(case.outputs) if case.bias else None, x_scale


def check(case, configuration=()):
    x, weight, weight_scale, bias, x_scale = make(case)
    made = problem(case)
    y = triton_kernel.forward(made, x, weight, weight_scale, bias, x_scale, configuration)
    if x_scale is None:
        x, x_scale = reference.quantize(torch, x.float())
    expected = (x.double() @ weight.double().t()) * x_scale.double() * weight_scale.double()
    size = expected.abs()
    if bias is not None:
        expected, size = expected + bias, size + bias.abs()
    expected = expected.relu() if case.activation else expected
    # four roundings: the sum as float32, two scales, the bias
    assert (y - expected).abs().le(4 * 2.0**-24 * size + 1e-37).all()


@pytest.mark.parametrize("index", range(len(CASES)), ids=[case.name for case in CASES])
@interpreted
def test_it_is_the_exact_product_scaled(index):
    check(CASES[index])


@interpreted
def test_many_tiles_of_rows_are_each_computed_once():
    """Twelve tiles of rows in groups of eight and four, three of outputs, three of inputs."""
    check(Case(180, 80, 40), (("block_m", 16), ("block_n", 16), ("block_k", 32)))


@interpreted
def test_sums_are_exact_where_float32_is_not():
    """Of the largest numbers, one off: it tells, as scales are 1 and the sum of two halves cancels."""
    x = torch.full((2, 4096), -128, dtype=torch.int8)
    weight = torch.full((3, 4096), -128, dtype=torch.int8)
    weight[1, 2048:] = 127
    weight[2, :1] = 127
    x[1, 2048:] = 127
    made = Problem("torch", "cuda", "int8", 2, 4096, 3, "one", False)
    y = triton_kernel.forward(made, x, weight, torch.ones(3), None, torch.ones(1, 1))
    assert torch.equal(y, (x.long() @ weight.long().t()).float())


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@interpreted
def test_rows_are_quantized_as_the_reference_does(dtype):
    torch.manual_seed(0)
    x = (100 * torch.randn(7, 2100)).to(getattr(torch, dtype))
    x[1], x[2, 5], x[3, 2099] = 0, float("nan"), float("-inf")
    x[4] = torch.arange(2100).remainder(255).sub(127) / 2  # halves: ties
    x[4, 0] = 127
    made = Problem("torch", "cuda", dtype, 7, 2100, 1)
    q, scale = torch.empty_like(x, dtype=torch.int8), torch.empty(7)
    triton_kernel._quantization(made, x, q, scale).run()
    expected_q, expected_scale = reference.quantize(torch, x.float())
    assert torch.equal(q, expected_q.to(torch.int8))
    torch.testing.assert_close(scale, expected_scale.squeeze(1), rtol=0, atol=0, equal_nan=True)
    assert scale.isnan().tolist() == [False, False, True, True, False, False, False]


@interpreted
def test_nan_passes_relu_and_y_is_of_out_dtype():
    x = torch.randn(3, 16)
    x[1, 2] = float("nan")
    weight = torch.randint(-127, 128, (5, 16), dtype=torch.int8)
    made = Problem("torch", "cuda", "float32", 3, 16, 5, activation="relu", out_dtype="float16")
    y = triton_kernel.forward(made, x, weight, torch.ones(5), torch.zeros(5), None)
    assert y.dtype == torch.float16
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


def test_tiles_grow_with_the_rows_and_hold_what_there_is():
    made = Problem("torch", "cuda", "int8", 1, 4096, 4096)
    tiles = [triton_kernel.configure(dataclasses.replace(made, rows=rows)) for rows in (1, 64, 4096)]
    assert [found["block_m"] for found in tiles] == [16, 64, 128]
    assert triton_kernel.configure(dataclasses.replace(made, inputs=100, rows=4096))["block_m"] == 32


@pytest.mark.parametrize("rows", [1, 4096])
def test_candidates_are_distinct_and_start_with_the_rule(rows):
    made = Problem("torch", "cuda", "int8", rows, 4096, 4096)
    found = triton_kernel.candidates(made)
    assert dict(found[0]) == triton_kernel.configure(made)
    assert len(set(found)) == len(found) > 3


def test_more_rows_than_32_bits_count_are_refused():
    made = Problem("torch", "cuda", "int8", 64, 64, 64)
    assert triton_kernel.refusal(made) is None
    assert "32 bits" in triton_kernel.refusal(dataclasses.replace(made, rows=2**30))
