"""Integer products on CPU through torch's own operators, which are exact or are not used.

`torch._int_mm`, oneDNN's int8 product, is several times faster than float32 where the CPU has VNNI. (Its quantized
linear layer, `torch.ops.onednn.qlinear_pointwise`, which the int8 recipe reaches with an unsigned x, falls back to
plain loops for a signed one.) Without VNNI oneDNN adds pairs of products in 16 bits, which saturate: wrong numbers. So
it is tried on the largest ones once. Where it fails, products run in float32, in pieces of K that float32 sums exactly:
the same integers at float32's speed.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from perfkit.kernels.linear_int8 import reference
from perfkit.kernels.linear_int8.problem import Problem

EXACT_INPUTS = 2**24 // (128 * 128)
"""Sums of so many products of bytes are below 2^24, up to which float32 holds every integer."""


def forward(
    problem: Problem, x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, x_scale: Tensor | None
) -> Tensor:
    """(M, N) in float32; see `reference.linear_int8` for the arguments."""
    if x_scale is None:
        x, x_scale = _quantized(x.float())
    return _finish(problem, sums(x, weight), x_scale, weight_scale, bias)


def sums(q_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """The integer products, int32: (M, N)."""
    (rows, inputs), outputs = q_MK.shape, weight_NK.size(0)
    if inputs > 1 and int_mm_is_exact():
        # a dimension of size 1 may have any stride, and oneDNN, which takes it at its word, then computes nothing:
        # https://github.com/pytorch/pytorch/issues/195066
        q_MK = q_MK.contiguous().as_strided((rows, inputs), (inputs, 1))
        weight_NK = weight_NK.contiguous().as_strided((outputs, inputs), (inputs, 1))
        return torch._int_mm(q_MK, weight_NK.t())
    total = q_MK.new_zeros((rows, outputs), dtype=torch.int32)
    for first in range(0, inputs, EXACT_INPUTS):
        piece = slice(first, first + EXACT_INPUTS)
        total += (q_MK[:, piece].float() @ weight_NK[:, piece].float().t()).int()
    return total


@functools.cache
def int_mm_is_exact() -> bool:
    """Whether torch._int_mm is right for the largest numbers here: with this CPU, this torch, these oneDNN settings."""
    for rows, inputs, outputs in ((1, 64, 64), (2, 8, 3), (33, 129, 77), (64, 512, 128)):
        for sign in (1, -1):
            q = torch.full((rows, inputs), 127, dtype=torch.int8)
            weight = torch.full((outputs, inputs), 127 * sign, dtype=torch.int8)
            if not torch.equal(
                torch._int_mm(q, weight.t()), torch.full((rows, outputs), sign * 127**2 * inputs, dtype=torch.int32)
            ):
                return False
    return True


def _quantized(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    q, scale = reference.quantize(torch, x_MK)
    return q.to(torch.int8), scale


def _finish(problem: Problem, sums_MN: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """`reference.finish` in the fewest passes: in place."""
    y = sums_MN.float().mul_(x_scale).mul_(weight_scale)
    if bias is not None:
        y.add_(bias)
    return y.relu_() if problem.activation == "relu" else y
