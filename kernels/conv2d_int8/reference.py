"""`conv2d_int8` in plain torch operations, with exact sums in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from perfkit.kernels.conv2d_int8.problem import Problem
from perfkit.kernels.linear_int8_static.reference import finished, rounded


def conv2d_int8(problem: Problem, x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """y, NCHW in its sizes; see `torch_op.conv2d_int8` for the arguments."""
    sizes, grid = problem.sizes, problem.grid
    q = x if x.dtype == torch.uint8 else rounded(x, grid)
    top, bottom, left, right = sizes.padding
    padded = F.pad(q.double() - grid.zero, (left, right, top, bottom))
    sums = F.conv2d(padded, weight.double(), stride=sizes.stride, dilation=sizes.dilation).movedim(1, -1)
    y = finished(sums, grid, weight_scale, bias, sizes.activation, None, torch.float32).movedim(-1, 1)
    y = F.max_pool2d(y, sizes.pool) if sizes.pool > 1 else y
    return y.to(getattr(torch, problem.y)) if problem.y_grid is None else rounded(y, problem.y_grid)
