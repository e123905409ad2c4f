"""The recurrent layers in plain torch operations, step by step: what every implementation is held to. Slow.

It is differentiable as often as wanted. float64 is computed in float64, everything else in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from perfkit.kernels.rnn.problem import Problem


def forward(
    problem: Problem,
    x: Tensor,
    rows: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Sequence[Tensor]],
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """All layers and directions; see `perfkit.kernels.rnn.lstm`, and `torch_op` for `rows`.

    Returns:
        y, hn, cn, in x's dtype; cn is None but for LSTM.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    weights = [[weight.to(dtype) for weight in direction] for direction in weights]
    h0, c0 = h0.to(dtype), (torch.zeros_like(h0) if c0 is None else c0).to(dtype)
    steps, there = _steps(problem, x.to(dtype), rows, batch_first)
    h_n, c_n = [], []
    for layer in range(problem.layers):
        sides = []
        for way in range(problem.directions):
            i = layer * problem.directions + way
            side, h, c = _direction(problem.mode, steps, there, weights[i], h0[i], c0[i], reverse=way == 1)
            sides.append(side)
            h_n.append(h)
            c_n.append(c)
        steps = [torch.cat(step, 1) for step in zip(*sides, strict=True)]
    y = torch.cat(steps) if problem.ragged == "packed" else torch.stack(steps, 1 if batch_first else 0)
    cn = torch.stack(c_n).to(x.dtype) if problem.mode == "LSTM" else None
    return y.to(x.dtype), torch.stack(h_n).to(x.dtype), cn


def _steps(problem: Problem, x: Tensor, rows: Tensor | None, batch_first: bool) -> tuple[list[Tensor], list]:
    """The input of each step, (rows, I), and which rows are there: (B, 1), or None where all of them are."""
    if problem.ragged == "packed":
        return list(x.split(rows.tolist())), [None] * problem.steps
    steps = list(x.unbind(1 if batch_first else 0))
    if problem.ragged == "no":
        return steps, [None] * problem.steps
    there = [(rows.to(x.device) > t)[:, None] for t in range(problem.steps)]
    # not only left out of the states: zero times a NaN would be in the weights' gradients
    return [torch.where(now, step, 0.0) for step, now in zip(steps, there, strict=True)], there


def _direction(mode, steps, there, weights, h, c, *, reverse: bool) -> tuple[list[Tensor], Tensor, Tensor]:
    """Outputs of each step and the final states."""
    w_ih, w_hh, b_ih, b_hh = (*weights, None, None)[:4]
    out = [None] * len(steps)
    for t in reversed(range(len(steps))) if reverse else range(len(steps)):
        count = len(steps[t])  # of packed rows, the first ones are there
        a = torch.nn.functional.linear(steps[t], w_ih, b_ih)
        u = torch.nn.functional.linear(h[:count], w_hh, b_hh)
        new_h, new_c = _cell(mode, a, u, h[:count], c[:count])
        out[t] = new_h
        if there[t] is not None:
            out[t] = torch.where(there[t], new_h, 0.0)
            new_h, new_c = torch.where(there[t], new_h, h), torch.where(there[t], new_c, c)
        h, c = torch.cat([new_h, h[count:]]), torch.cat([new_c, c[count:]])
    return out, h, c


def _cell(mode: str, a: Tensor, u: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """One step, from the gates' input parts and hidden parts, biases included."""
    if mode == "LSTM":
        i, f, g, o = (a + u).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c
    if mode == "GRU":
        (a_r, a_z, a_n), (u_r, u_z, u_n) = a.chunk(3, 1), u.chunk(3, 1)
        z, n = (a_z + u_z).sigmoid(), (a_n + (a_r + u_r).sigmoid() * u_n).tanh()
        return (1 - z) * n + z * h, c
    return (a + u).tanh() if mode == "RNN_TANH" else (a + u).relu(), c
