"""Calls of the int8 recurrent kernel, held against its reference."""

import torch

from perfkit.kernels.rnn_int8 import reference, torch_op, weights
from perfkit.kernels.rnn_int8.problem import GATES

MODES = tuple(GATES)


def make(mode, inputs, hidden):
    gates, bound = GATES[mode], hidden**-0.5
    q_ih, scale_ih = weights.quantize(torch.empty(gates * hidden, inputs).uniform_(-bound, bound))
    q_hh, scale_hh = weights.quantize(torch.empty(gates * hidden, hidden).uniform_(-bound, bound))
    bias = torch.empty(gates * hidden).uniform_(-bound, bound)
    bias_hn = torch.empty(hidden).uniform_(-bound, bound) if mode == "GRU" else None
    return reference.Layer(mode, q_ih, scale_ih, q_hh, scale_hh, bias, bias_hn)


def tensors(layer):
    gates = GATES[layer.mode]
    packed = (
        weights.pack(layer.q_ih, gates),
        layer.scale_ih,
        weights.pack(layer.q_hh, gates),
        layer.scale_hh,
        layer.bias,
    )
    return [*packed, *([layer.bias_hn] if layer.mode == "GRU" else [])]


def run(layer, x, batch_sizes, h, c, *, scale=0.0, more=(), bidirectional=False):
    """The kernel on one direction (or on those in `more` too)."""
    lstm, hidden = layer.mode == "LSTM", h.size(-1)
    parts = [part for each in (layer, *more) for part in tensors(each)]
    states = [state if state.dim() == 3 else state[None] for state in (h, c)]
    scale = torch.tensor(scale)
    return torch_op.rnn_int8(
        x, batch_sizes, states[0], states[1] if lstm else None, parts, layer.mode, hidden, bidirectional, False, scale
    )


def assert_is_the_reference(mode, inputs, hidden, batch, steps, **options):
    layer = make(mode, inputs, hidden)
    # Initial states far outside of [-1, 1] too: nothing promises that they are in it.
    x, h, c = torch.randn(steps, batch, inputs), 2 * torch.randn(batch, hidden), torch.randn(batch, hidden)
    fixed = options.get("scale", 0.0)
    out, h_n, c_n = run(layer, x, None, h, c, **options)
    expected = reference.layer(x.flatten(0, 1), [batch] * steps, layer, h, c, x_fixed=fixed)
    assert torch.equal(out.flatten(0, 1), expected[0])
    assert torch.equal(h_n[0], expected[1])
    if mode == "LSTM":
        assert torch.equal(c_n[0], expected[2])
    assert out.isfinite().all()
