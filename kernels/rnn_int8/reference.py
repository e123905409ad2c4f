"""One direction of one layer in plain torch operations: the definition that the kernel is held to, bit for bit.

Integer products are taken in float64, which holds them exactly. Everything else is float32 operations in the kernel's
order, each rounded once; `fused` is a product and a sum that are rounded once together. Slow: for tests, and for
reading.

Letters: T time steps, B batch rows, P all rows of all steps, I input features, H hidden units, G gates, N = G H.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LOG2_E = 1.44269504  # as float32 holds it
FITTED = (0.05500893, 0.24221097, 0.6932829, 1.0)
FACTORS = {
    "LSTM": (-LOG2_E, -LOG2_E, -2 * LOG2_E, -LOG2_E),
    "GRU": (-LOG2_E, -LOG2_E, -2 * LOG2_E),
    "RNN_TANH": (-2 * LOG2_E,),
    "RNN_RELU": (1.0,),
}
"""What the gates are multiplied by, in their scales and biases: they are exponents of 2 then; see cpu_cells.hpp."""


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


def fused(a: Tensor, b: Tensor, c: Tensor | float) -> Tensor:
    """a b + c, rounded once: torch has no operation for it on CPU.

    The product is exact in float64. Its sum with c is rounded to odd, so that rounding it again goes the right way.
    """
    product, c = a.double() * b.double(), torch.as_tensor(c, dtype=torch.float32).double()
    total = product + c
    part = total - product
    cut = (product - (total - part)) + (c - part)
    found = total.view(torch.int64)
    change = torch.where((cut > 0) == (total > 0), 1, -1)
    inexact = (cut != 0) & total.isfinite() & (found % 2 == 0)
    return torch.where(inexact, found + change, found).view(torch.float64).float()


def parts(x_PK: Tensor, q_NK: Tensor, scale_N: Tensor, addend_PN: Tensor, floor: float, fixed: float = 0.0) -> Tensor:
    """The product of quantized rows and quantized weights, times both scales, plus something: (P, N)."""
    q_PK, scale = quantize(x_PK, floor, fixed)
    return fused((q_PK.double() @ q_NK.double().T).float(), scale_N * scale, addend_PN)


def exp2(y: Tensor) -> Tensor:
    """2^y for y clamped to [-30, 30], to a relative error of 1.1e-4: 2^n (1 + r q(r)), n the nearest integer."""
    y = y.clamp(-30, 30)
    n = y.round()
    r = y - n
    p = torch.full_like(r, FITTED[0])
    for coefficient in FITTED[1:]:
        p = fused(p, r, coefficient)
    return (p.view(torch.int32) + (n.int() << 23)).view(torch.float32)


def tanh_from(e: Tensor) -> Tensor:
    """tanh(x) from e^-2x."""
    return (1 - e) / (1 + e)


def lstm(a: Sequence[Tensor], _h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = (exp2(gate) for gate in a)
    above, below = 1 - g, 1 + g
    inputs = fused(i, below, below)
    c = fused(c, inputs, fused(f, above, above)) / fused(f, inputs, inputs)
    e = exp2(c * (-2 * LOG2_E))
    return (1 - e) / fused(o, 1 + e, 1 + e), c


def gru(a: Sequence[Tensor], h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    r, z = 1 / (1 + exp2(a[0])), 1 / (1 + exp2(a[1]))
    n = tanh_from(exp2(fused(r, a[2], a[3])))
    return fused(z, h - n, n), c


def rnn_tanh(a: Sequence[Tensor], _h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    return tanh_from(exp2(a[0])), c


def rnn_relu(a: Sequence[Tensor], _h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    return a[0].clamp_min(0), c


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
    h_fixed: float = 0.0,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs and final states of one direction.

    Args:
        x_PI: (P, I), float32, step after step, as in a PackedSequence.
        batch_sizes: rows of each step, never rising.
        h_BH, c_BH: initial states, (B, H), float32; c is passed through by cells that have none.
        x_floor, x_fixed: how inputs are quantized; see `quantize`. h_fixed: the same of hidden states.
        reverse: from the last step to the first.

    Returns:
        (P, H) outputs, (B, H) final h, (B, H) final c.
    """
    h, c = h_BH.clone(), c_BH.clone()
    hidden, cell = h.size(1), CELLS[weights.mode]
    h_floor = 0.0 if weights.mode == "RNN_RELU" else 1.0
    factor_N = torch.tensor(FACTORS[weights.mode]).repeat_interleave(hidden)
    scale_ih, scale_hh, bias = weights.scale_ih * factor_N, weights.scale_hh * factor_N, weights.bias * factor_N
    a_PN = parts(x_PI, weights.q_ih, scale_ih, bias, x_floor, x_fixed)
    steps = list(zip(a_PN.split(list(batch_sizes)), batch_sizes, strict=True))
    outputs = []
    for a_BN, rows in reversed(steps) if reverse else steps:
        input_n = []
        if weights.bias_hn is not None:  # the GRU's n gate keeps its parts apart: hidden, input
            input_n = [a_BN[:, 2 * hidden :]]
            hidden_n = (weights.bias_hn * factor_N[2 * hidden :]).expand_as(input_n[0])
            a_BN = torch.cat([a_BN[:, : 2 * hidden], hidden_n], 1)
        gates = parts(h[:rows], weights.q_hh, scale_hh, a_BN, h_floor, h_fixed).split(hidden, 1)
        h[:rows], c[:rows] = cell([*gates, *input_n], h[:rows], c[:rows])
        outputs.append(h[:rows].clone())
    return torch.cat(outputs[::-1] if reverse else outputs), h, c
