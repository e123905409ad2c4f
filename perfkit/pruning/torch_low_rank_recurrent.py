"""Recurrent torch layers whose input weights are a product of two thin matrices.

The first layer's `weight_ih` of all gates and directions, one below the other, is A·B: B is applied to the whole
sequence at once, and A takes the weights' place in a recurrent layer of smaller inputs. `weight_hh` stays whole: its
product with the state is inside of the kernel, and with factors each time step would have to run in Python.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from perfkit.backends.torch_surgery import with_data


class Reduced(nn.Module):
    """A recurrent layer on a projection of its inputs; called as the layer itself is.

    Args:
        reduce: (inputs → rank), without bias.
        recurrent: nn.LSTM, nn.GRU or nn.RNN with inputs of that rank.
    """

    def __init__(self, reduce: nn.Linear, recurrent: nn.RNNBase):
        super().__init__()
        self.reduce, self.recurrent = reduce, recurrent
        self.input_size = reduce.in_features

    def forward(self, input: Any, hx: Any = None) -> Any:
        """As of the recurrent layer, packed sequences included."""
        if isinstance(input, PackedSequence):
            return self.recurrent(with_data(input, self.reduce(input.data)), hx)
        return self.recurrent(self.reduce(input), hx)

    def __getattr__(self, name: str) -> Any:
        """`hidden_size`, `num_layers`, `flatten_parameters`, … are the recurrent layer's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "recurrent":
                raise
            return getattr(self.recurrent, name)


def input_weights(layer: nn.RNNBase) -> list[nn.Parameter]:
    """What the first layer's units multiply inputs with: (gates · hidden, inputs), for each direction."""
    return [getattr(layer, f"weight_ih_l0{end}") for end in ("", "_reverse")[: 1 + layer.bidirectional]]


def reduced(layer: nn.RNNBase, left: torch.Tensor, right: torch.Tensor) -> Reduced:
    """`layer` with the factors of its input weights; the parameters that stay are the same objects."""
    rank, columns = right.shape
    reduce = nn.Linear(columns, rank, bias=False, device=right.device, dtype=right.dtype)
    weights = input_weights(layer)
    reduce.weight.data = right
    reduce.weight.requires_grad_(weights[0].requires_grad)
    for weight, part in zip(weights, left.chunk(len(weights)), strict=True):
        weight.data, weight.grad = part.clone(), None
    layer.input_size = rank
    layer.flatten_parameters()
    return Reduced(reduce, layer).train(layer.training)
