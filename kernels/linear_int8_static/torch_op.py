"""`linear_int8_static`: the op on torch tensors."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from perfkit._errors import InvalidInputError, UnsupportedError
from perfkit.kernels import _int8_torch
from perfkit.kernels._int8 import Grid
from perfkit.kernels.linear_int8_static import cpu_kernel, cpu_shape
from perfkit.kernels.linear_int8_static.problem import Problem


def linear_int8_static(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    grid: Any,
    activation: str | None = None,
    out_grid: Any = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """act(x wᵀ + bias), x rounded to the grid and w int8, by the C++ kernel.

    Args:
        x: (..., K), float32; or uint8, on the grid.
        weight: (N, K), int8.
        weight_scale: (N,), float32, positive.
        bias: (N,), float32, or None.
        grid: of x: something with `scale`, `zero` and `top`.
        activation: None or "relu".
        out_grid: of y, uint8; None for floats.
        out_dtype: of y without a grid: float32 or bfloat16.

    Returns:
        y: (..., N).

    Raises:
        InvalidInputError: sizes, dtypes or options that do not go together.
        UnsupportedError: the kernel cannot be built here, or its sums could overflow.
    """
    _int8_torch.check(x, weight, weight_scale, bias, 2)
    if activation not in (None, "relu"):
        raise InvalidInputError(f"activation is {activation!r}: expected None or 'relu'")
    if x.dim() < 1 or x.size(-1) != weight.size(1):
        raise InvalidInputError(
            f"x has shape {list(x.shape)} and weight {list(weight.shape)}: expected (..., K), (N, K)"
        )
    y_grid = None if out_grid is None else Grid.of(out_grid)
    if out_dtype not in (torch.float32, torch.bfloat16):
        raise InvalidInputError(f"out_dtype is {out_dtype}: expected torch.float32 or torch.bfloat16")
    kinds = [str(dtype).removeprefix("torch.") for dtype in (x.dtype, torch.uint8 if y_grid else out_dtype)]
    made = Problem(prod(x.shape[:-1]), weight.size(1), weight.size(0), Grid.of(grid), activation, *kinds, y_grid)
    if why := cpu_shape.refusal(made):
        raise UnsupportedError(f"the int8 linear kernel does not take this call: {why}")
    if (kept := cpu_kernel.packed(weight, weight_scale)) is None:
        raise InvalidInputError("weight_scale is not positive and finite throughout")
    return cpu_kernel.caller(made, tuple(x.shape[:-1]))(
        x.contiguous(), kept, None if bias is None else bias.contiguous()
    )
