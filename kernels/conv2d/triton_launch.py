"""How the Triton kernels of conv2d are launched: their programs, their arguments, and tensors as they read them.

`chosen` is what `triton_kernel.configure` gives, with what a tuner changed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from perfkit.kernels._launch import Launch
from perfkit.kernels.conv2d.problem import DEAD, Problem

FEW_CHANNELS = 16
"""With fewer input channels in a group, taps and channels are summed as one index: a product sums 16 at least."""

PROGRAMS = 264
"""Two for each processor of an H100. Of how many sum the weight's gradient depends on no device, for the same bits."""


def forward(problem, chosen, x, weight, bias, y, argmax, precision=None) -> Launch:
    """Writes y, and argmax where there is room for it."""
    from perfkit.kernels.conv2d.triton_forward import conv_pool

    outputs, (height, width) = problem.outputs // problem.groups, problem.out_size
    positions = problem.batch * height * width
    return Launch(
        conv_pool,
        _tiles(positions, chosen["block_m"]) * _tiles(outputs, chosen["block_n"]) * problem.groups,
        {"x": x, "weight": weight, "bias": bias, "y": y, "argmax": argmax, **_sizes(problem, x, y)},
        {
            **_constants(problem, precision),
            "RELU": problem.activation == "relu",
            "DEAD": DEAD,
            "WIDTH": chosen["width"],
            **_blocks(chosen),
        },
        _options(chosen),
    )


def weight_gradient(problem, chosen, x, d_y, argmax, d_weight, d_bias, precision=None) -> Launch:
    """Writes each slab's sums; see `partial_sums`."""
    from perfkit.kernels.conv2d.triton_backward import conv_pool_weight

    slabs, slab = _slabs(problem, chosen)
    return Launch(
        conv_pool_weight,
        slabs * _weight_tiles(problem, chosen),
        {
            "x": x,
            "d_y": d_y,
            "argmax": argmax,
            "d_weight": d_weight,
            "d_bias": d_bias,
            **_sizes(problem, x, d_y),
            "slab": slab,
        },
        {**_constants(problem, precision), **_blocks(chosen, "weight_")},
        _options(chosen, "weight_"),
    )


def input_gradient(problem, chosen, d_y, argmax, weight, d_x, precision=None) -> Launch:
    """Writes d_x."""
    from perfkit.kernels.conv2d.triton_backward import conv_pool_input

    stride_h, stride_w = problem.stride
    positions = problem.batch * _tiles(problem.height, stride_h) * _tiles(problem.width, stride_w)
    tiles = _tiles(problem.inputs // problem.groups, chosen["input_block_n"])
    return Launch(
        conv_pool_input,
        _tiles(positions, chosen["input_block_m"]) * stride_h * stride_w * problem.groups * tiles,
        {"d_y": d_y, "argmax": argmax, "weight": weight, "d_x": d_x, **_sizes(problem, d_x, d_y)},
        {**_constants(problem, precision), **_blocks(chosen, "input_")},
        _options(chosen, "input_"),
    )


def _sizes(problem: Problem, x: Tensor, y: Tensor) -> dict[str, int]:
    """The kernels' integers: sizes, and strides of tensors like x and like y."""
    names = ("image", "channel", "row", "column")
    return {
        "batch": problem.batch,
        "out_channels": problem.outputs // problem.groups,
        "groups": problem.groups,
        "height": problem.height,
        "width": problem.width,
        "pooled_height": problem.out_size[0],
        "pooled_width": problem.out_size[1],
        **{f"x_{name}": stride for name, stride in zip(names, x.stride(), strict=True)},
        **{f"y_{name}": stride for name, stride in zip(names, y.stride(), strict=True)},
    }


def _constants(problem: Problem, precision: str | None) -> dict[str, int | str]:
    return {
        "CHANNELS": problem.inputs // problem.groups,
        "KERNEL_H": problem.kernel_height,
        "KERNEL_W": problem.kernel_width,
        "STRIDE_H": problem.stride[0],
        "STRIDE_W": problem.stride[1],
        "PADDING_H": problem.padding[0],
        "PADDING_W": problem.padding[2],
        "DILATION_H": problem.dilation[0],
        "DILATION_W": problem.dilation[1],
        "POOL": problem.pool,
        "FLAT": is_flat(problem),
        "PRECISION": precision or precision_of(problem),
    }


def _blocks(chosen: dict[str, int], part: str = "") -> dict[str, int]:
    return {f"BLOCK_{letter}": chosen[f"{part}block_{letter.lower()}"] for letter in "MNK"}


def _options(chosen: dict[str, int], part: str = "") -> dict[str, int]:
    return {name: chosen[f"{part}{name}"] for name in ("num_warps", "num_stages")}


def precision_of(problem: Problem) -> str:
    """How float32 is multiplied: as torch's settings for convolutions let it be."""
    if problem.dtype != "float32" or problem.device != "cuda" or torch.version.hip:
        return "ieee"
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


def is_flat(problem: Problem) -> bool:
    """Whether taps and channels are summed as one index."""
    return problem.inputs // problem.groups < FEW_CHANNELS


def as_rows(problem: Problem, weight: Tensor) -> Tensor:
    """The weight as the kernels read it: each output channel's numbers, channels last unless there are few."""
    return (weight if is_flat(problem) else weight.permute(0, 2, 3, 1)).contiguous()


def as_pixels(problem: Problem, image: Tensor) -> Tensor:
    """x, or what is like y, as the kernels read it: channels last unless there are few, to load several at once."""
    return image if is_flat(problem) else image.contiguous(memory_format=torch.channels_last)


def from_rows(problem: Problem, rows: Tensor) -> Tensor:
    """The inverse of `as_rows`: (O, I, H, W), contiguous."""
    kernel, inputs = (problem.kernel_height, problem.kernel_width), problem.inputs // problem.groups
    if is_flat(problem):
        return rows.view(problem.outputs, inputs, *kernel)
    return rows.view(problem.outputs, *kernel, inputs).permute(0, 3, 1, 2).contiguous()


def partial_sums(problem: Problem, chosen: dict[str, int], x: Tensor, with_bias: bool) -> tuple[Tensor, Tensor | None]:
    """Room for each slab's sums: of weight, and of bias where there is one."""
    slabs, _ = _slabs(problem, chosen)
    weights = x.new_empty((slabs, problem.outputs, problem.taps), dtype=torch.float32)
    return weights, x.new_empty((slabs, problem.outputs), dtype=torch.float32) if with_bias and problem.bias else None


def _slabs(problem: Problem, chosen: dict[str, int]) -> tuple[int, int]:
    """How many programs share a tile of the weight's gradient, and how many places before the pool each sums over."""
    places = problem.batch * problem.out_size[0] * problem.out_size[1] * problem.pool**2
    step = chosen["weight_block_k"]
    count = max(1, min(chosen["weight_programs"] // _weight_tiles(problem, chosen), places // (8 * step)))
    slab = _tiles(_tiles(places, count), step) * step
    return _tiles(places, slab), slab


def _weight_tiles(problem: Problem, chosen: dict[str, int]) -> int:
    """Tiles of the weight's gradient, of all groups."""
    inputs, block = problem.inputs // problem.groups, chosen["weight_block_n"]
    columns = _tiles(problem.taps, block) if is_flat(problem) else problem.taps // inputs * _tiles(inputs, block)
    return _tiles(problem.outputs // problem.groups, chosen["weight_block_m"]) * columns * problem.groups


def empty(problem: Problem, like: Tensor, channels: int, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    layout = torch.channels_last if problem.channels_last else torch.contiguous_format
    shape = (problem.batch, channels, *size)
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=layout)


def _tiles(size: int, block: int) -> int:
    return -(-size // block)
