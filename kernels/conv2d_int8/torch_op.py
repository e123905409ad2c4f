"""`conv2d_int8`: the op on torch tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from perfkit._errors import InvalidInputError, UnsupportedError
from perfkit.kernels import _int8_torch
from perfkit.kernels._int8 import Grid
from perfkit.kernels.conv2d.problem import options
from perfkit.kernels.conv2d.problem import problem as sizes_of
from perfkit.kernels.conv2d_int8 import cpu_kernel, cpu_shape
from perfkit.kernels.conv2d_int8.problem import Problem


def conv2d_int8(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    grid: Any,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    activation: str | None = None,
    pool: int | None = None,
    out_grid: Any = None,
    out_dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> Tensor:
    """The largest of each pool × pool window of act(conv(x) + bias), x rounded to the grid and the weight int8.

    Args:
        x: (N, I, H, W), float32; or uint8, on the grid. NCHW or channels_last.
        weight: (O, I, height, width), int8.
        weight_scale: (O,), float32, positive.
        bias: (O,), float32, or None.
        grid: of x: something with `scale`, `zero` and `top`.
        stride, padding, dilation, activation, pool: as in `perfkit.kernels.conv2d.conv2d`.
        out_grid: of y, uint8; None for floats.
        out_dtype: of y without a grid: float32 or bfloat16.
        channels_last: y lies NHWC.

    Returns:
        y: (N, O, H', W').

    Raises:
        InvalidInputError: sizes, dtypes or options that do not go together.
        UnsupportedError: the kernel cannot be built here, or its sums could overflow.
    """
    _int8_torch.check(x, weight, weight_scale, bias, 4)
    if out_dtype not in (torch.float32, torch.bfloat16):
        raise InvalidInputError(f"out_dtype is {out_dtype}: expected torch.float32 or torch.bfloat16")
    made = problem(x, weight, options(stride, padding, dilation, 1, activation, pool), Grid.of(grid), out_dtype)
    y_grid = None if out_grid is None else Grid.of(out_grid)
    made = Problem(made.sizes, made.grid, made.x, made.x_last, "uint8" if y_grid else made.y, channels_last, y_grid)
    if why := cpu_shape.refusal(made):
        raise UnsupportedError(f"the int8 convolution kernel does not take this call: {why}")
    if (kept := cpu_kernel.packed(made, weight, weight_scale)) is None:
        raise InvalidInputError("weight_scale is not positive and finite throughout")
    x = x.contiguous(memory_format=torch.channels_last if made.x_last else torch.contiguous_format)
    return cpu_kernel.caller(made)(x, kept, None if bias is None else bias.contiguous())


def problem(x: Tensor, weight: Tensor, given: Any, grid: Grid, out_dtype: torch.dtype) -> Problem:
    """What is asked of such tensors; y lies as x does.

    Args:
        given: see `perfkit.kernels.conv2d.problem.options`.
    """
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    sizes = sizes_of(
        given,
        framework="torch",
        device="cpu",
        dtypes={"x": "float32"},
        image=x.shape,
        kernel=weight.shape,
        bias=None,
        channels_last=last,
        needs_grad=False,
    )
    kinds = [str(dtype).removeprefix("torch.") for dtype in (x.dtype, out_dtype)]
    return Problem(sizes, grid, kinds[0], last, kinds[1], last)
