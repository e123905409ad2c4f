"""Layers on integers, with the ReLU and max-pool that follow them, as one call of perfkit's kernels for bytes.

For layers whose input is rounded to a grid that is known beforehand. What stands between two of them in a sequence
(`torch_fused_sequence.py`) is then bytes on the second one's grid: the numbers are those that each by itself gives.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from perfkit.backends import torch_fused_conv as convolutions
from perfkit.backends.torch_surgery import INTEGER, derive, on_grid
from perfkit.kernels._int8 import Grid
from perfkit.kernels._torch import observer
from perfkit.kernels.conv2d.problem import options
from perfkit.kernels.conv2d_int8 import cpu_kernel as convolution
from perfkit.kernels.conv2d_int8 import cpu_shape
from perfkit.kernels.conv2d_int8.problem import Problem as Convolution
from perfkit.kernels.conv2d_int8.torch_op import problem as convolution_problem
from perfkit.kernels.linear_int8_static import cpu_kernel as linear
from perfkit.kernels.linear_int8_static import cpu_shape as linear_shape
from perfkit.kernels.linear_int8_static.problem import Problem as Linear

FUSES = "_perfkit_fuses_int8"
"""Marks the classes of the layers whose groups run together on integers."""

Problem = Convolution | Linear


class Group(NamedTuple):
    """What of a group runs together: its problem, what the pool rounds to, and how many outermost links are left."""

    problem: Problem
    rounds: Callable[[Tensor], Tensor] | None
    rest: int

    def __str__(self) -> str:
        made = self.problem
        sizes = made if isinstance(made, Linear) else made.sizes
        parts = ["Linear" if made is sizes else "conv", *(["ReLU"] if sizes.activation else [])]
        pool = 1 if made is sizes else sizes.pool
        return " + ".join([*parts, *([f"{pool}×{pool} max-pool"] if pool > 1 else [])]) + " on integers"


def is_integer(thing: Any) -> bool:
    return getattr(type(thing), INTEGER, False)


def is_fused(thing: Any) -> bool:
    return getattr(type(thing), FUSES, False)


def fuse(module: nn.Module) -> None:
    """Let the groups that begin with `module` run together."""
    derive(module, **{FUSES: True})


def reading(links: tuple, x: Any) -> Group | None:
    """What of a group runs together on `x`, by itself or in a sequence; None where nothing does."""
    layer = links[-1]
    if not on_grid(layer) or not _plain(layer, x) or convolutions.seen(layer) or "forward" in vars(layer):
        return None
    grid = Grid(layer.input_grid.scale, layer.input_grid.zero, layer.input_grid.top)
    if isinstance(layer, nn.Linear):
        if x.dim() < 1 or x.size(-1) != layer.in_features:
            return None
        relu = len(links) > 1 and convolutions.step_of(links[-2])[0] == "relu"
        sizes = prod(x.shape[:-1]), layer.in_features, layer.out_features
        made = Linear(*sizes, grid, "relu" if relu else None)
        return None if linear_shape.refusal(made) else Group(made, None, len(links) - 1 - relu)
    read = convolutions.following(links)
    if layer.padding_mode != "zeros" or layer.groups > 1 or x.dim() != 4 or read.norm is not None:
        return None
    if x.size(1) != layer.in_channels:
        return None
    given = options(*convolutions.options_of(layer, read))
    try:
        made = convolution_problem(x, layer.weight_int8, given, grid, torch.float32)
    except ValueError:  # nothing is left of such an image: torch says so
        return None
    return None if cpu_shape.refusal(made) else Group(made, read.rounds, read.rest)


def _plain(layer: nn.Module, x: Any) -> bool:
    """Numbers are wanted of plain tensors on CPU, and no more."""
    tensors = [x, *(layer._parameters.get(name) for name in ("weight_int8", "weight_scale", "bias"))]
    tensors = [each for each in tensors if each is not None]
    return (
        all(isinstance(each, Tensor) and each.is_cpu for each in tensors)
        and x.dtype == torch.float32
        and bool(x.numel())
        and all(each.dtype == torch.float32 for each in tensors[2:])
        and not any(each.is_inference() for each in tensors[1:])
        and not (torch.is_grad_enabled() and any(each.requires_grad for each in tensors))
        and not torch._C._is_any_autocast_enabled()
        and observer(tensors) is None
    )


def written(layer: nn.Module) -> tuple:
    """What a layer's packed weight and its grid were, beside where its tensors lie."""
    tensors = layer._parameters["weight_int8"], layer._parameters["weight_scale"]
    return vars(layer).get("input_grid"), *(None if each.is_inference() else each._version for each in tensors)


def pays(problem: Problem, *, recorded: bool = False) -> bool:
    """Whether the kernel is no slower than oneDNN on such a layer by itself."""
    op = linear_shape.OP if isinstance(problem, Linear) else cpu_shape.OP
    return op.choose(problem, recorded=recorded).implementation == "cpu"


def packed(layer: nn.Module, problem: Problem) -> Tensor | None:
    """Its weight as the kernel reads it; None where its scales do not keep the order of numbers."""
    if isinstance(problem, Linear):
        return linear.packed(layer.weight_int8, layer.weight_scale)
    return convolution.packed(problem, layer.weight_int8, layer.weight_scale)


def together(layer: nn.Module, read: Group, x: Tensor) -> Tensor | None:
    """What a group computes, by one call; None where its weight cannot be packed."""
    made, bias = read.problem, layer.bias
    if (weight := packed(layer, made)) is None:
        return None
    if isinstance(made, Linear):
        run, layout = linear.caller(made, tuple(x.shape[:-1])), torch.contiguous_format
    else:
        run = convolution.caller(made)
        layout = torch.channels_last if made.x_last else torch.contiguous_format
    y = run(x.contiguous(memory_format=layout), weight, None if bias is None else bias.contiguous())
    return y if read.rounds is None else read.rounds(y)


def alone(links: tuple, x: Tensor) -> tuple[list | None, Tensor | None]:
    """A layer by itself, as `torch_fused_sequence.run` asks: what it is, and what it makes of x."""
    read = reading(links, x)
    if read is None or not pays(read.problem):
        return None, None
    y = together(links[-1], read, x)
    return None if y is None else [(links[-1], read.problem)], y
