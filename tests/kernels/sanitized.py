"""What test_sanitizer.py runs in a process with AddressSanitizer: every CPU kernel on ragged sizes."""

import torch
from torch import nn

from perfkit.quantization.torch_rnn_int8 import quantize_rnn

RECURRENT = (nn.LSTM, nn.GRU, nn.RNN)
SIZES = [(1, 1, 1, 1, 1), (7, 17, 2, 5, 2), (33, 50, 3, 9, 1)]
"""Inputs, hidden units, batch rows, steps, layers."""


def rnn_int8():
    for kind in RECURRENT:
        for inputs, hidden, batch, steps, layers in SIZES:
            module = kind(inputs, hidden, layers, bidirectional=layers > 1).eval()
            x = torch.randn(steps, batch, inputs)
            quantize_rnn(module)
            with torch.inference_mode():
                module(x)
                lengths = torch.arange(batch).remainder(steps).add(1)
                module(nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False))
            yield


def main():
    count = sum(1 for kernel in (rnn_int8,) for _ in kernel())
    print(count, "cases, all of their calls under AddressSanitizer")
