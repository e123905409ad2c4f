"""Torch layers on 4-bit weights: two to a byte, in groups along the input features with a scale and an offset each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from perfkit.backends.torch_surgery import derive

ROWS = 16
"""PyTorch's CPU kernel takes output features in multiples of this."""


def grouped(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight (rows, features) as integers 0…15, and the scale and the value at 8 of each group, (rows, groups).

    `w ≈ scale * (q - 8) + middle`. The last group is filled up with the last feature, which changes no range: the
    integers are (rows, groups * group_size).
    """
    weight = weight.detach().float()
    filling = weight[:, -1:].expand(-1, -weight.shape[1] % group_size)
    groups = torch.cat([weight, filling], 1).view(len(weight), -1, group_size)
    low, high = groups.amin(-1), groups.amax(-1)
    scale = (high - low) / 15
    scale = torch.where(scale > 0, scale, 1.0)
    values = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, 15)
    return values.flatten(1).to(torch.int32), scale, low + 8 * scale


def refusal(module: nn.Module, group_size: int) -> str:
    """Why a linear or embedding cannot be put on 4 bits; empty where it can."""
    weight = module.weight
    if weight.device.type != "cpu" and isinstance(module, nn.Linear):
        return f"on {weight.device.type} this is torchao's part"
    needed = _needed_bytes(module, group_size)
    if needed >= weight.nbytes:
        return f"in groups of {group_size} its {weight.nbytes} bytes would be {needed}"
    return ""


def _needed_bytes(module: nn.Module, group_size: int) -> int:
    """Bytes of the packed weight with its scales in float32."""
    rows, features = module.weight.shape
    groups = -(-features // group_size)
    if isinstance(module, nn.Embedding):
        return rows * (-(-features // 2) + groups * 8)
    rows += -rows % ROWS
    return rows * groups * (group_size // 2 + 8)


def linear(module: nn.Linear, group_size: int) -> None:
    """A linear that unpacks 4-bit weights inside of its matrix product."""
    values, scale, middle = grouped(module.weight, group_size)
    missing = -len(values) % ROWS
    values, scale, middle = (F.pad(part, (0, 0, 0, missing)) for part in (values, scale, middle))
    _register(
        module, torch._convert_weight_to_int4pack_for_cpu(values, 1), torch.stack([scale, middle], -1), group_size
    )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = input.reshape(-1, self.in_features)
        if missing := -self.in_features % self.group_size:
            rows = F.pad(rows, (0, missing))
        scales = self.weight_scale.to(input.dtype).transpose(0, 1).contiguous()
        out = torch._weight_int4pack_mm_for_cpu(rows.contiguous(), self.weight_int4, self.group_size, scales)
        out = out[:, : self.out_features].view(*input.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias

    def weight(self) -> torch.Tensor:
        unit = torch.eye(self.in_features, device=self.weight_int4.device)
        columns = forward(self, unit)
        return (columns if self.bias is None else columns - self.bias).T

    derive(module, forward=forward, weight=property(weight, doc="The weight in float32, unpacked at each reading."))


def embedding(module: nn.Embedding, group_size: int) -> None:
    """An embedding of 4-bit rows: a lookup reads an eighth of the bytes, and the scales."""
    values, scale, middle = grouped(module.weight, group_size)
    packed = (values[:, ::2] | values[:, 1::2] << 4).to(torch.uint8)
    kept = -(-module.embedding_dim // 2)  # of the last group's filling, nothing is stored
    _register(module, packed[:, :kept].contiguous(), torch.stack([scale, middle], -1), group_size)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        packed, (scale, middle) = self.weight_int4[input], self.weight_scale[input].unbind(-1)
        values = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
        values = F.pad(values, (0, scale.shape[-1] * self.group_size - values.shape[-1]))
        values = values.unflatten(-1, (-1, self.group_size))
        rows = ((values - 8.0) * scale.unsqueeze(-1) + middle.unsqueeze(-1)).flatten(-2)
        return rows[..., : self.embedding_dim].to(self.weight_dtype)

    def weight(self) -> torch.Tensor:
        return forward(self, torch.arange(self.num_embeddings, device=self.weight_int4.device))

    derive(module, forward=forward, weight=property(weight, doc="The rows in float32, unpacked at each reading."))


def _register(module: nn.Module, packed: torch.Tensor, scale: torch.Tensor, group_size: int) -> None:
    module.weight_dtype = module.weight.dtype
    del module.weight
    module.group_size = group_size
    for name, tensor in (("weight_int4", packed), ("weight_scale", scale)):
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
