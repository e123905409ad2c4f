"""int8 recurrent layers, paired with the eager float32 ones in the same run."""

import copy

import pytest
import torch
from torch import nn

from perfkit.kernels.rnn_int8 import torch_op
from perfkit.measure import timing
from perfkit.quantization.torch_rnn_int8 import quantize_rnn

INPUTS, HIDDEN, LAYERS, STEPS = 100, 128, 2, 128
"""The text model's: what bench/test_recipes.py calls text_lstm, without its embedding."""


@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
def test_inference(cell, batch, paired):
    torch.manual_seed(0)
    original = cell(INPUTS, HIDDEN, LAYERS).eval()
    quantized = copy.deepcopy(original)
    quantize_rnn(quantized)
    x = torch.randn(STEPS, batch, INPUTS)

    def caller(model):
        def call():
            with torch.inference_mode():
                return model(x)

        return call

    before, after = caller(original), caller(quantized)
    expected, found = before()[0], after()[0]
    latency, _, comparison = timing.paired(before, after, baseline="eager float32", variant_name="int8", budget_s=10)
    paired(
        after,
        comparison,
        instructions=torch_op.instructions(),
        relative_error=float((expected - found).norm() / expected.norm()),
        original_ms=latency.median_ms,
    )
