"""FLOPs of torch models against the formulas of `flops.py`, forward and training."""

import pytest

pytest.importorskip("torch")

import torch
from profile_torch_models import Net, work_of
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from perfkit import reference
from perfkit.profiling import flops, torch_flops
from perfkit.profiling.torch_count import counted

BATCH, STEPS = 4, 5


def count(model, inputs, mode="inference", **training):
    work = work_of(model, inputs, mode, **training)
    return counted(work, work.backend.finish(work))


def both(model, inputs, forward, own):
    """A model's forward pass is `forward`, and a training step that and the backward pass without `own`."""
    assert count(model, inputs).flops() == forward
    assert count(model, inputs, "training").flops() == forward + flops.backward(forward, own)


def test_the_reference_cnn():
    model, (x,) = reference.load("cnn", framework="torch", batch_size=BATCH)
    conv = flops.convolution(BATCH, 1, 32, (3, 3), (26, 26))
    both(model, (x,), conv + flops.linear(BATCH, 5408, 128) + flops.linear(BATCH, 128, 10), conv)


def test_the_reference_lstm():
    model, (x,) = reference.load("lstm", framework="torch", batch_size=BATCH)
    steps = x.shape[0]
    lstm = flops.recurrent("lstm", steps, BATCH, 10, 50)
    both(model, (x,), lstm + flops.linear(BATCH, 50, 1), flops.recurrent_inputs("lstm", steps, BATCH, 10, 50))


def test_the_reference_text_lstm():
    """Its first layer reads an embedding, whose gradient is needed."""
    model, inputs = reference.load("text_lstm", framework="torch", batch_size=BATCH)
    steps = inputs[0].shape[1]
    both(model, inputs, flops.recurrent("lstm", steps, BATCH, 100, 128, layers=2) + flops.linear(BATCH, 128, 1), 0)


def test_a_transformer_block():
    """In eval mode torch runs it as one operator, in training as many."""
    block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    x = torch.randn(3, 7, 16)
    both(block, (x,), flops.transformer_block(3, 2, 7, 16, 32), flops.linear(3 * 7, 16, 48))
    assert any("_transformer_encoder_layer_fwd" in name for name in count(block, (x,)).operators)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_padded_rows_of_a_transformer_block_do_not_count():
    block = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1)
    padding = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
    found = count(block, {"src": torch.randn(2, 7, 16), "src_key_padding_mask": padding}).flops()
    assert found == flops.transformer_block(1, 2, 7, 16, 32) + flops.transformer_block(1, 2, 4, 16, 32)


def test_attention_counts_no_recomputation():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, q, k, v):
            return nn.functional.scaled_dot_product_attention(q * self.scale, k * self.scale, v * self.scale)

    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 8)
    both(Attention(), (q, k, v), flops.attention(2, 3, 5, 9, 8), 0)


@pytest.mark.parametrize(("kind", "layer"), [("lstm", nn.LSTM), ("gru", nn.GRU), ("rnn", nn.RNN)])
@pytest.mark.parametrize(("layers", "directions"), [(1, 1), (2, 2)])
def test_recurrent_layers(kind, layer, layers, directions):
    model = layer(6, 8, layers, bidirectional=directions == 2)
    assert count(model, (torch.randn(STEPS, BATCH, 6),)).flops() == flops.recurrent(
        kind, STEPS, BATCH, 6, 8, layers, directions
    )


class Wrapped(nn.Module):
    """A recurrent layer that returns its outputs alone, so that the loss is of these."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


@pytest.mark.parametrize(("kind", "layer"), [("lstm", nn.LSTM), ("gru", nn.GRU), ("rnn", nn.RNN)])
@pytest.mark.parametrize(("layers", "directions"), [(1, 1), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("steps", [1, STEPS])
def test_recurrent_layers_in_training(kind, layer, layers, directions, steps):
    """Also those that torch takes apart, whose first step needs no gradient of its state."""
    model = Wrapped(layer(6, 8, layers, bidirectional=directions == 2))
    forward = flops.recurrent(kind, steps, BATCH, 6, 8, layers, directions)
    both(model, (torch.randn(steps, BATCH, 6),), forward, flops.recurrent_inputs(kind, steps, BATCH, 6, 8, directions))


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
@pytest.mark.parametrize(("layers", "directions"), [(1, 1), (2, 2)])
def test_an_lstm_with_projections(layers, directions):
    model = Wrapped(nn.LSTM(6, 8, layers, bidirectional=directions == 2, proj_size=3))
    forward = flops.recurrent("lstm", STEPS, BATCH, 6, 8, layers, directions, projected=3)
    own = flops.recurrent_inputs("lstm", STEPS, BATCH, 6, 8, directions)
    both(model, (torch.randn(STEPS, BATCH, 6),), forward, own)


def test_packed_sequences_count_their_own_steps():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = nn.GRU(6, 8)

        def forward(self, x):
            lengths = torch.tensor([5, 3, 2, 1])
            return self.gru(nn.utils.rnn.pack_padded_sequence(x, lengths))[1]

    forward = flops.recurrent("gru", 1, 5 + 3 + 2 + 1, 6, 8)
    both(Packed(), (torch.randn(5, 4, 6),), forward, flops.recurrent_inputs("gru", 1, 11, 6, 8))


def test_the_calls_that_are_counted_are_those_that_run():
    """What completes the FLOPs of the first step adds no call."""
    model, x = Wrapped(nn.GRU(6, 8)), torch.randn(STEPS, BATCH, 6)
    calls = count(model, (x,), "training").calls["aten::mm", "layer", "backward"]
    assert len(calls) == 1 + STEPS + STEPS - 1  # gradients of both weights, and of every state but the first


def test_perfkits_own_recurrent_layers():
    from perfkit.kernels.rnn import torch_op  # noqa: F401 - defines the operators

    weights = [w for inputs in (6, 16) for _ in "><" for w in (torch.empty(32, inputs), torch.empty(32, 8))]
    x, h, options = torch.empty(STEPS, BATCH, 6), torch.empty(4, BATCH, 8), ("LSTM", False, True, False)
    forward = flops.recurrent("lstm", STEPS, BATCH, 6, 8, 2, 2)
    called = (x, None, h, h, weights)
    assert torch_flops.count(torch.ops.perfkit.rnn.default, (*called, *options, True, ""), {}, None) == forward
    backward = (*called, *[None] * 4, x, h, h, *options, "")
    own = flops.recurrent_inputs("lstm", STEPS, BATCH, 6, 8, 2)
    for wanted in (False, True):
        x.requires_grad_(wanted)
        found = torch_flops.count(torch.ops.perfkit.rnn_backward.default, backward, {}, None)
        assert found == flops.backward(forward, 0 if wanted else own)


def test_perfkits_own_convolutions():
    from perfkit.kernels.conv2d import torch_op  # noqa: F401 - defines the operators

    x, weight, options = torch.empty(BATCH, 2, 9, 9), torch.empty(8, 2, 3, 3), ([2, 2], [1, 1, 0, 2], [1, 1], 1)
    forward = flops.convolution(BATCH, 2, 8, (3, 3), (5, 5))
    called = (x, weight, None, *options, "relu", 2, False, "")
    assert torch_flops.count(torch.ops.perfkit.conv2d.default, called, {}, None) == forward
    for wanted, products in (([False, True, True], 1), ([True, True, True], 2)):
        backward = (x, weight, None, x, x, *options, "relu", 2, wanted, "")
        found = torch_flops.count(torch.ops.perfkit.conv2d_backward.default, backward, {}, None)
        assert found == products * forward


def test_cudnns_recurrent_layers():
    """Called on what cuDNN would be called on: the formula needs no card."""
    weights = [torch.empty(32, 6), torch.empty(32, 8), torch.empty(32), torch.empty(32)]
    x, h = torch.empty(STEPS, BATCH, 6), torch.empty(1, BATCH, 8)
    options = (2, 8, 0, 1, False, 0.0, True, False, [], None)
    forward = flops.recurrent("lstm", STEPS, BATCH, 6, 8)
    called = (x, weights, 4, None, h, h, *options)
    assert torch_flops.count(torch.ops.aten._cudnn_rnn.default, called, {}, None) == forward
    backward = (x, weights, 4, None, h, h, x, x, h, h, *options, x, [False, True, True, True])
    found = torch_flops.count(torch.ops.aten._cudnn_rnn_backward.default, backward, {}, None)
    assert found == flops.backward(forward, flops.recurrent_inputs("lstm", STEPS, BATCH, 6, 8))


def test_a_model_that_forbids_looking_at_what_it_saves():
    class Inner(Net):
        def forward(self, x):
            return super().forward(x) * torch.func.grad(lambda a: a.sum() ** 2)(x).mean()

    x = torch.randn(BATCH, 64)
    found = count(Inner(), (x,), "training")
    assert found.flops() == count(Net(), (x,), "training").flops()
    assert not found.saved_bytes


def test_of_two_branches_the_one_that_runs_counts():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda x: self.fc(x), lambda x: self.fc(self.fc(x)), (x,))

    once = flops.linear(BATCH, 8, 8)
    assert count(Branching(), (torch.ones(BATCH, 8),)).flops() == once
    assert count(Branching(), (-torch.ones(BATCH, 8),)).flops() == 2 * once


def test_grouped_strided_and_transposed_convolutions_are_as_torch_counts_them():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1, groups=2), nn.ConvTranspose2d(8, 4, 2, 2), nn.Conv1d(9, 2, 1))
    model = nn.Sequential(*model[:2], nn.Flatten(0, 1), nn.Conv1d(8, 2, 1))
    x = torch.randn(2, 4, 8, 8)
    with FlopCounterMode(display=False) as counter:
        model(x)
    assert count(model, (x,)).flops() == counter.get_total_flops()
    grouped = flops.convolution(2, 4, 8, (3, 3), (4, 4), groups=2)
    transposed = flops.convolution(2, 8, 4, (2, 2), (4, 4))
    assert counter.get_total_flops() == grouped + transposed + flops.convolution(8, 8, 2, (1,), (8,))


def test_each_module_has_its_own():
    found = count(Net(), (torch.randn(BATCH, 64),), "training")
    first, last = flops.linear(BATCH, 64, 128), flops.linear(BATCH, 128, 32)
    assert found.flops("first") == first + flops.backward(first, first)
    assert found.flops("block") == found.flops("block.1") == last + flops.backward(last)
    assert found.flops("block.0") == 0


def test_what_a_module_keeps_for_the_backward_pass():
    """A linear layer keeps its input, a ReLU its output: which is the next layer's input, and counts once."""
    found = count(Net(), (torch.randn(BATCH, 64),), "training")
    assert found.saved_bytes == {"first": BATCH * 64 * 4, "block.0": BATCH * 128 * 4}
    assert count(Net(), (torch.randn(BATCH, 64),)).saved_bytes == {}


def test_bytes_that_must_move():
    calls = count(Net(), (torch.randn(BATCH, 64),)).calls
    (product,) = calls["aten::addmm", "first", "forward"]
    assert product.moved_bytes == 4 * (128 + BATCH * 64 + 64 * 128 + BATCH * 128)
    (view,) = calls["aten::t", "first", "forward"]
    assert view.moved_bytes == 0
    embedding = count(nn.Embedding(1000, 8), (torch.zeros(3, dtype=torch.int64),))
    (lookup,) = embedding.calls["aten::embedding", "", "forward"]
    assert lookup.moved_bytes == 2 * (3 * 8 * 4) + 3 * 8
