"""One direction of one layer in plain torch operations: the definition that the kernel is held to, bit for bit.

Integer products are taken in float64, which holds them exactly. Everything else is float32 operations in the kernel's
order, each rounded once. Slow: for tests, and for reading.

Letters: T time steps, B batch rows, P all rows of all steps, I input features, H hidden units, G gates, N = G H.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LOG2_E = 1.44269504  # as float32 holds it
FITTED = (0.00132695190, 0.00967129134, 0.0555071086, 0.240222469, 0.693147004, 1.0)


@dataclass(frozen=True)
class Layer:
    """One direction's weights.

    Args:
        mode: "LSTM", "GRU", "RNN_TANH" or "RNN_RELU".
        q_ih: (N, I), int8; q_hh: (N, H), int8.
        scale_ih, scale_hh: (N,), float32.
        bias: (N,), float32: b_ih + b_hh, for the GRU's n gate b_ih alone.
        bias_hn: (H,), float32: b_hh of the GRU's n gate; None for other cells.
    """

    mode: str
    q_ih: Tensor
    scale_ih: Tensor
    q_hh: Tensor
    scale_hh: Tensor
    bias: Tensor
    bias_hn: Tensor | None = None


def quantize(x_PK: Tensor, floor: float, fixed: float = 0.0) -> tuple[Tensor, Tensor]:
    """Round each row to integers in [-127, 127]: (P, K), float32, and its scale: (P, 1); see the package's head."""
    largest = x_PK.abs().amax(1, keepdim=True).clamp_min(floor)
    scale = torch.where(largest > 1e-30, largest / 127, 0.0)
    # not 127 / largest: torch computes that as 127 times the reciprocal, rounded twice
    inverse = torch.where(largest > 1e-30, torch.full_like(largest, 127) / largest, 0.0)
    if fixed > 0:
        scale, inverse = torch.full_like(scale, fixed), 1 / torch.full_like(scale, fixed)
    spoilt = (x_PK * 0).sum(1, keepdim=True)
    return (x_PK * inverse).clamp(-127, 127).round(), scale + spoilt


def parts(x_PK: Tensor, q_NK: Tensor, scale_N: Tensor, floor: float, fixed: float = 0.0) -> Tensor:
    """The product of quantized rows and quantized weights, times both scales: (P, N)."""
    q_PK, scale = quantize(x_PK, floor, fixed)
    return (q_PK.double() @ q_NK.double().T).float() * (scale_N * scale)


def exp2(y: Tensor) -> Tensor:
    """2^y for y clamped to [-30, 30], to a relative error of 3e-7: 2^n (1 + r q(r)), n the nearest integer."""
    y = y.clamp(-30, 30)
    n = y.round()
    r = y - n
    p = torch.full_like(r, FITTED[0])
    for coefficient in FITTED[1:]:
        p = p * r + coefficient
    return (p.view(torch.int32) + (n.int() << 23)).view(torch.float32)


def decay(x: Tensor) -> Tensor:
    """e^-x."""
    return exp2(x * -LOG2_E)


def decay_twice(x: Tensor) -> Tensor:
    """e^-2x."""
    return exp2(x * (-2 * LOG2_E))


def lstm(a: Sequence[Tensor], u: Sequence[Tensor], _h: Tensor, c: Tensor, _: None) -> tuple[Tensor, Tensor]:
    i, f, g, o = decay(a[0] + u[0]), decay(a[1] + u[1]), decay_twice(a[2] + u[2]), decay(a[3] + u[3])
    inputs, keep = (1 + i) * (1 + g), 1 + f
    c = (c * inputs + (1 - g) * keep) / (keep * inputs)
    e = decay_twice(c)
    return (1 - e) / ((1 + o) * (1 + e)), c


def gru(a: Sequence[Tensor], u: Sequence[Tensor], h: Tensor, c: Tensor, bias_hn: Tensor) -> tuple[Tensor, Tensor]:
    r = 1 / (1 + decay(a[0] + u[0]))
    z = decay(a[1] + u[1])
    n = decay_twice(a[2] + r * (u[2] + bias_hn))
    return (z * (1 - n) + h * (1 + n)) / ((1 + n) * (1 + z)), c


def rnn_tanh(a: Sequence[Tensor], u: Sequence[Tensor], _h: Tensor, c: Tensor, _: None) -> tuple[Tensor, Tensor]:
    e = decay_twice(a[0] + u[0])
    return (1 - e) / (1 + e), c


def rnn_relu(a: Sequence[Tensor], u: Sequence[Tensor], _h: Tensor, c: Tensor, _: None) -> tuple[Tensor, Tensor]:
    return (a[0] + u[0]).clamp_min(0), c


CELLS = {"LSTM": lstm, "GRU": gru, "RNN_TANH": rnn_tanh, "RNN_RELU": rnn_relu}


def layer(
    x_PI: Tensor,
    batch_sizes: Sequence[int],
    weights: Layer,
    h_BH: Tensor,
    c_BH: Tensor,
    *,
    x_floor: float = 0.0,
    x_fixed: float = 0.0,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs and final states of one direction.

    Args:
        x_PI: (P, I), float32, step after step, as in a PackedSequence.
        batch_sizes: rows of each step, never rising.
        h_BH, c_BH: initial states, (B, H), float32; c is passed through by cells that have none.
        x_floor, x_fixed: how inputs are quantized; see `quantize`.
        reverse: from the last step to the first.

    Returns:
        (P, H) outputs, (B, H) final h, (B, H) final c.
    """
    h, c = h_BH.clone(), c_BH.clone()
    hidden, cell = h.size(1), CELLS[weights.mode]
    h_floor = 0.0 if weights.mode == "RNN_RELU" else 1.0
    a_PN = parts(x_PI, weights.q_ih, weights.scale_ih, x_floor, x_fixed) + weights.bias
    steps = list(zip(a_PN.split(list(batch_sizes)), batch_sizes, strict=True))
    outputs = []
    for a_BN, rows in reversed(steps) if reverse else steps:
        u_BN = parts(h[:rows], weights.q_hh, weights.scale_hh, h_floor)
        h[:rows], c[:rows] = cell(a_BN.split(hidden, 1), u_BN.split(hidden, 1), h[:rows], c[:rows], weights.bias_hn)
        outputs.append(h[:rows].clone())
    return torch.cat(outputs[::-1] if reverse else outputs), h, c
