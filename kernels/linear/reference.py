"""The layer in torch's own operations."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """act(x weightᵀ + bias), as `torch_call.linear` has it."""
    y = F.linear(x, weight, bias)
    return F.relu(y) if activation == "relu" else y
