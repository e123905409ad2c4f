"""`linear_int8_static` in plain torch operations, with exact sums in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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
    """The same in plain torch operations, with exact sums in float64."""
    q = x if x.dtype == torch.uint8 else rounded(x, grid)
    sums = (q.double() - grid.zero) @ weight.double().t()
    return finished(sums, grid, weight_scale, bias, activation, out_grid, out_dtype)


def rounded(x: Tensor, grid: Any) -> Tensor:
    """The q of x, uint8, in the order of torch's `quantize_per_tensor`."""
    return x.float().mul(1.0 / grid.scale).round_().add_(grid.zero).clamp_(0, grid.top).nan_to_num_(0).to(torch.uint8)


def finished(sums, grid, weight_scale, bias, activation, out_grid, out_dtype) -> Tensor:
    """What is done with sums whose last dimension is the outputs'."""
    y = sums.float() * torch.tensor(grid.scale, dtype=torch.float32) * weight_scale
    y = y if bias is None else y + bias
    y = y.relu() if activation == "relu" else y
    return y.to(out_dtype) if out_grid is None else rounded(y, out_grid)
