"""torch's own recurrent layers, on the op's arguments: cuDNN on CUDA, oneDNN or plain operations on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from perfkit.kernels.rnn.problem import Problem

_FUNCTIONS = {"LSTM": torch.lstm, "GRU": torch.gru, "RNN_TANH": torch.rnn_tanh, "RNN_RELU": torch.rnn_relu}


def refusal(problem: Problem) -> str | None:
    """Why torch cannot take `problem`; None where it can."""
    if problem.device == "cuda" and problem.steps >= 2**16:
        return f"cuDNN fails on {problem.steps} steps: 65535 at most"
    return None


def forward(
    problem: Problem,
    x: Tensor,
    rows: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Sequence[Tensor]],
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """All layers and directions, differentiable, in torch's own precision; see `torch_op` for the arguments."""
    flat = [weight for direction in weights for weight in direction]
    unsorted = None
    if problem.ragged == "lengths":
        packed = pack_padded_sequence(x, rows, batch_first, enforce_sorted=False)
        x, rows, order, unsorted = packed
        h0, c0 = h0.index_select(1, order), None if c0 is None else c0.index_select(1, order)
    state = h0.contiguous() if c0 is None else (h0.contiguous(), c0.contiguous())
    # without dropout: `train` is what cuDNN must be told where a backward pass follows
    stack = (len(weights[0]) == 4, problem.layers, 0.0, problem.needs_grad, problem.directions == 2)
    function = _FUNCTIONS[problem.mode]
    if rows is None:
        y, hn, *cn = function(x, state, flat, *stack, batch_first)
    else:
        y, hn, *cn = function(x, rows, state, flat, *stack)
    if unsorted is not None:
        y, _ = pad_packed_sequence(packed._replace(data=y), batch_first, total_length=problem.steps)
        hn, cn = hn.index_select(1, unsorted), [state.index_select(1, unsorted) for state in cn]
    return y, hn, cn[0] if cn else None
