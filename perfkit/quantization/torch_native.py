"""Integer layers on x86 CPUs by perfkit's own kernels, layer by layer, where these are no slower than oneDNN's."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from perfkit.kernels._int8 import Grid
from perfkit.kernels._torch import Known
from perfkit.kernels.conv2d.problem import options
from perfkit.kernels.conv2d_int8 import cpu_kernel as convolution
from perfkit.kernels.conv2d_int8 import cpu_shape
from perfkit.kernels.conv2d_int8.torch_op import problem as convolution_problem
from perfkit.kernels.linear_int8 import grid_shape
from perfkit.kernels.linear_int8 import on_grid as linear
from perfkit.quantization.torch_ranges import Affine

_linears, _convs = Known(grid_shape.OP), Known(cpu_shape.OP)


def product(module: Any, bias: Tensor | None, x: Tensor, grid: Affine | int, out: torch.dtype) -> Tensor | None:
    """What a linear layer or a convolution over images makes of x, which it takes; None where oneDNN is to compute it.

    Args:
        grid: of x; the largest q alone to have it read from x, of a linear layer.
        out: float32 or bfloat16.
    """
    x = x if x.dtype == torch.float32 else x.float()
    kernel = _linear if isinstance(module, nn.Linear) else _conv
    known = Grid(0.0, 0, grid) if isinstance(grid, int) else Grid(grid.scale, grid.zero, grid.top)
    return kernel(module, bias, x, known, out)


def _linear(module: Any, bias: Tensor | None, x: Tensor, grid: Grid, out: torch.dtype) -> Tensor | None:
    weight = module.weight_int8

    def problem() -> grid_shape.Problem:
        sizes = prod(x.shape[:-1]), weight.size(1), weight.size(0)
        return grid_shape.Problem(*sizes, grid, y=str(out).removeprefix("torch."))

    if x.size(-1) != weight.size(1):
        return None
    made, choice = _linears((x.shape, weight.shape, grid, out), problem, None)
    if choice.implementation != "cpu" or (packed := linear.packed(weight, module.weight_scale)) is None:
        return None
    return linear.caller(made, x.shape[:-1])(x.contiguous(), packed, bias)


def _conv(module: Any, bias: Tensor | None, x: Tensor, grid: Grid, out: torch.dtype) -> Tensor | None:
    weight, place = module.weight_int8, (module.stride, module.padding, module.dilation, module.groups)
    if x.size(1) != module.in_channels:
        return None
    try:
        made, choice = _convs(
            (x.shape, x.stride(), weight.shape, *place, grid, out),
            lambda: convolution_problem(x, weight, options(*place, None, None), grid, out),
            None,
        )
    except ValueError:  # nothing is left of such an image: torch says so
        return None
    if choice.implementation != "cpu":
        return None
    if (packed := convolution.packed(made, weight, module.weight_scale)) is None:
        return None
    layout = torch.channels_last if made.x_last else torch.contiguous_format
    return convolution.caller(made)(x.contiguous(memory_format=layout), packed, bias)
