"""Linear layers, with the ReLU that follows them, as one call of `perfkit.kernels.linear`.

Each layer's own forward is what runs in the kernel; where a module's forward hands over its groups
(`torch_fused_group.py`), the ReLU behind a layer runs in it too.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from perfkit.backends.torch_surgery import derive, on_grid
from perfkit.kernels.linear.torch_call import linear

FUSES = "_perfkit_fuses_linear"
"""Marks the classes of the linear layers that run in the kernel where it takes them."""


def refusal(module: nn.Linear) -> str | None:
    """Why a linear layer cannot be swapped, whatever it is called with; None where it can."""
    if type(module).forward is not nn.Linear.forward:
        return f"this {module._get_name()} has a forward of its own, which would be lost"
    return None


def is_fused(thing: Any) -> bool:
    return getattr(type(thing), FUSES, False)


def may_begin(thing: Any) -> bool:
    """Whether it is a linear layer as torch has it, or one that runs in the kernel, or on integers of a known grid."""
    return isinstance(thing, nn.Linear) and (
        type(thing).forward is nn.Linear.forward or is_fused(thing) or on_grid(thing)
    )


def fuse(module: nn.Linear) -> None:
    """Let every call of `module` run in the kernel where it takes it."""

    def forward(self: nn.Linear, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)

    derive(module, forward=forward, **{FUSES: True})
