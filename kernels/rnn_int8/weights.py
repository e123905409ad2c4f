"""The int8 weights of a recurrent layer: how they are quantized, and how they lie in memory.

Letters: G gates, H hidden units, N = G H output channels, K columns (input features, or hidden units).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from perfkit.kernels.rnn_int8.problem import PANEL, SLACK


def quantize(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Round to int8, one scale per output channel: q s ~ w, q in [-127, 127].

    Args:
        weight_NK: (N, K), float32.

    Returns:
        q: (N, K), int8; s: (N,), float32, the channel's largest magnitude / 127 (1 where all of it is zero).
    """
    largest = weight_NK.abs().amax(1)
    scale = torch.where(largest > 0, largest / 127, 1.0)
    return (weight_NK / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def pack(q_NK: Tensor, gates: int) -> Tensor:
    """The layout that the kernel reads, and the only form in which weights are kept; see `cpu_products.hpp`.

    Panels of 16 units, the last as wide as is left; in each, for every gate, every 4 columns (zeros fill the last) and
    every unit, 4 bytes. Then the sum of each channel's weights, (N,), int32, and 64 zero bytes.

    Args:
        q_NK: (N, K), int8, gate after gate as torch stores them.

    Returns:
        (packed_size(N, K),), int8.
    """
    q_GHK = q_NK.unflatten(0, (gates, -1))
    q_GHK4 = F.pad(q_GHK, (0, -q_GHK.size(2) % 4)).unflatten(2, (-1, 4))
    panels = [panel.transpose(1, 2).flatten() for panel in q_GHK4.split(PANEL, dim=1)]
    sums_N = q_NK.sum(1, dtype=torch.int32).view(torch.int8)
    return torch.cat([*panels, sums_N, q_NK.new_zeros(SLACK)])


def unpack(packed: Tensor, gates: int, hidden: int, columns: int) -> Tensor:
    """The inverse of `pack`: (N, K), int8."""
    groups = -(-columns // 4)
    widths = [min(PANEL, hidden - unit) for unit in range(0, hidden, PANEL)]
    panels = packed[: 4 * groups * gates * hidden].split([width * groups * gates * 4 for width in widths])
    blocks = [
        panel.view(gates, groups, width, 4).transpose(1, 2).flatten(2)
        for panel, width in zip(panels, widths, strict=True)
    ]
    return torch.cat(blocks, dim=1)[..., :columns].flatten(0, 1)
