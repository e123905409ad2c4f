"""Quantization-aware training in torch: layers that round in `forward` and let gradients through."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from perfkit.backends.torch_surgery import derive
from perfkit.quantization.torch_ranges import Affine

MOMENTUM = 0.05
"""How fast the ranges follow the activations while the model trains."""

TRAINED = "_perfkit_qat_top"


def is_trained(module: nn.Module) -> bool:
    """Whether the module was prepared for quantization-aware training."""
    return hasattr(type(module), TRAINED)


def prepare(module: nn.Module, bits: int, top: int) -> None:
    """A linear, convolution or recurrent layer that rounds its weights, and its input unless it is recurrent.

    Weights are rounded per output channel to `bits`, inputs to the grid 0…`top` over a running range.
    """
    limit = 2 ** (bits - 1) - 1

    def rounded(weight: torch.Tensor) -> torch.Tensor:
        rows = weight.detach().flatten(1).abs().amax(1)
        scale = torch.where(rows > 0, rows, 1.0 * limit) / limit
        zero = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -limit, limit)

    def multiply(self, input: torch.Tensor) -> torch.Tensor:
        if self.training:
            _follow(self, input.detach())
        scale, zero = _grid(self, top)
        x = torch.fake_quantize_per_tensor_affine(input, scale, zero, 0, top)
        weight = rounded(self.weight)
        return (
            F.linear(x, weight, self.bias) if isinstance(self, nn.Linear) else self._conv_forward(x, weight, self.bias)
        )

    base = type(module)

    def recur(self, *args: Any, **kwargs: Any) -> Any:
        kept = self._flat_weights
        self._flat_weights = [rounded(weight) if weight.dim() == 2 else weight for weight in kept]
        try:
            return base.forward(self, *args, **kwargs)
        finally:
            self._flat_weights = kept

    if not isinstance(module, nn.RNNBase):
        module.register_buffer("input_low", torch.zeros(()))
        module.register_buffer("input_high", torch.zeros(()))
        module.register_buffer("input_seen", torch.zeros((), dtype=torch.bool))
    derive(module, forward=recur if isinstance(module, nn.RNNBase) else multiply, **{TRAINED: top})


def stripped(module: nn.Module) -> Affine | None:
    """Take the rounding off again; returns the grid that its input was trained on, None for a recurrent layer."""
    top = getattr(type(module), TRAINED)
    grid = None
    if not isinstance(module, nn.RNNBase):
        scale, zero = _grid(module, top)
        grid = Affine(float(scale), int(zero), top)
        del module.input_low, module.input_high, module.input_seen
    module.__class__ = type(module).__mro__[1]
    return grid


def _follow(module: nn.Module, x: torch.Tensor) -> None:
    low, high = x.aminmax()
    pace = torch.where(module.input_seen, MOMENTUM, 1.0)
    module.input_low += pace * (low.clamp_max(0.0) - module.input_low)
    module.input_high += pace * (high.clamp_min(0.0) - module.input_high)
    module.input_seen.fill_(True)


def _grid(module: nn.Module, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of the running range, as tensors."""
    span = module.input_high - module.input_low
    scale = torch.where(span > 0, span, 1.0 * top) / top
    zero = (-module.input_low / scale).round().to(torch.int32)
    return scale, zero
