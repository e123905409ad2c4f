"""Integer layers on x86 CPUs by perfkit's own kernels, layer by layer, where these are no slower than oneDNN's."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, nn

import perfkit.kernels.sequence.torch_auto  # noqa: F401 - registers torch.ops.perfkit.int8_auto
from perfkit.kernels import _int8
from perfkit.kernels._int8 import Grid
from perfkit.kernels._torch import Known
from perfkit.kernels.conv2d.problem import options
from perfkit.kernels.conv2d_int8 import cpu_kernel as convolution
from perfkit.kernels.conv2d_int8 import cpu_shape
from perfkit.kernels.conv2d_int8.torch_op import problem as convolution_problem
from perfkit.kernels.linear_int8_static import cpu_kernel as linear
from perfkit.kernels.linear_int8_static import cpu_shape as linear_shape
from perfkit.kernels.linear_int8_static.problem import Problem as Linear
from perfkit.measure.environment import has
from perfkit.quantization.torch_ranges import Affine

_linears, _convs = Known(linear_shape.OP), Known(cpu_shape.OP)


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

    def problem() -> Linear:
        sizes = prod(x.shape[:-1]), weight.size(1), weight.size(0)
        return Linear(*sizes, grid, y=str(out).removeprefix("torch."))

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


def stays_whole(module: nn.Module, grid: Affine) -> bool:
    """Whether a layer is left to torch.compile as one operation, of which perfkit's kernels are expected to take calls.

    With AMX's tiles oneDNN's kernels are, and the compiler is given what it makes those of.
    """
    if has("amx_int8") or _int8.slower() is not None:
        return False
    if isinstance(module, nn.Conv2d):
        if module.padding_mode != "zeros" or module.groups > 1:
            return False
    elif not isinstance(module, nn.Linear):
        return False
    return _int8.refusal(Grid(grid.scale, grid.zero, grid.top), prod(module.weight_int8.shape[1:])) is None


def called(module: Any, x: Tensor, grid: Affine) -> Tensor:
    """What such a layer computes, as Dynamo traces it."""
    place: tuple = ((), (), ())
    if isinstance(module, nn.Conv2d):
        left, right, top, bottom = module._reversed_padding_repeated_twice
        place = module.stride, (top, bottom, left, right), module.dilation
    tensors = module.weight_int8, module.weight_scale, module.weight_zero, module.bias
    return torch.ops.perfkit.int8_auto(x, *tensors, grid.scale, grid.zero, grid.top, *place)
