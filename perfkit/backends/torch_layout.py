"""The order in which torch stores images and volumes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from perfkit._report import Effect
from perfkit._workload import Workload
from perfkit.backends.torch_precision import named
from perfkit.backends.torch_surgery import around_forward, map_tensors

CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d, nn.Conv3d, nn.ConvTranspose3d)
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
"""By the dimensions of a tensor: (N, C, H, W) and (N, C, D, H, W)."""


def channels_last(work: Workload) -> tuple[Workload, Effect]:
    """Store convolutions' weights, and inputs of as many dimensions, with the channels innermost."""
    layers = {name: module for name, module in named(work.model) if isinstance(module, CONVOLUTIONS)}
    if not layers:
        return work, Effect(notes=("the model has no convolution over images or volumes",))
    dimensions = {len(module.kernel_size) + 2 for module in layers.values()}

    def innermost(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous(memory_format=FORMATS[tensor.dim()]) if tensor.dim() in dimensions else tensor

    for module in layers.values():
        for parameter in module.parameters():
            parameter.data = innermost(parameter.data)

    def wrap(forward: Callable) -> Callable:
        def converted(module, *args, **kwargs):
            args, kwargs = map_tensors(innermost, (args, kwargs))
            return forward(module, *args, **kwargs)

        return converted

    around_forward(work.model, wrap)
    return work, Effect(tuple(layers))
