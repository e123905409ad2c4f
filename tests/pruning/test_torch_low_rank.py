"""Low-rank factorization of torch models: the error it promises, what it leaves alone, and optimizers."""

import math
from functools import partial

import pytest

pytest.importorskip("torch")

import torch
from sample_models import torch_models
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import perfkit
from perfkit import InvalidInputError, UnsupportedError
from perfkit.backends import backend
from perfkit.backends.torch_training import Trainer
from perfkit.pruning.torch_low_rank import factors
from perfkit.recipes.low_rank import LowRank

pytestmark = pytest.mark.usefixtures("hasty")

BACKEND = backend("torch")
INFERENCE = {"mode": "inference", "loss": None, "targets": None, "optimizer": None, "seed": 0}


def thin(rows, columns, rank, noise=0.0):
    """A weight of that rank, and noise."""
    weight = torch.randn(rows, rank) @ torch.randn(rank, columns) / math.sqrt(rank)
    return weight + noise * torch.randn(rows, columns)


def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 4))
    with torch.no_grad():
        model[0].weight.copy_(thin(30, 40, 3))
    return model, torch.randn(16, 40)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 0.9999])
@pytest.mark.parametrize("shape", [(30, 40), (40, 30), (5, 200)])
def test_smallest_rank_that_keeps_the_energy(energy, shape):
    torch.manual_seed(0)
    weight = thin(*shape, 4, noise=0.2).double()
    left, right = factors(weight, energy)
    rank, values = left.shape[1], torch.linalg.svdvals(weight).square()
    kept = float(values[:rank].sum() / values.sum())
    assert kept >= energy > float(values[: rank - 1].sum() / values.sum())
    error = float((weight - left @ right).norm() / weight.norm())
    assert error == pytest.approx(math.sqrt(1 - kept), abs=1e-12)
    assert error <= LowRank(energy=energy).tolerance


def test_complex_weights_keep_both_parts():
    torch.manual_seed(0)
    weight = torch.complex(thin(12, 10, 2), thin(12, 10, 2)) @ torch.diag(torch.linspace(1, 2, 10)).cfloat()
    left, right = factors(weight, 1 - 1e-9)
    assert left.shape[1] == 4  # of two sums of two products of rows and columns
    torch.testing.assert_close(left @ right, weight, rtol=1e-4, atol=1e-4)


def test_zero_weights():
    left, right = factors(torch.zeros(4, 3), 0.99)
    assert left.shape == (4, 1)
    assert torch.equal(left @ right, torch.zeros(4, 3))


def test_exact_where_the_rank_is_low():
    model, x = net()
    result = perfkit.optimize(model, recipe="low_rank(energy=0.999999)", example_inputs=(x,))
    effect = result.report.steps[0].effect
    assert effect.touched == ("0",)
    assert effect.notes == ("0: 30×40 → rank 3",)
    assert result.report.after.parameters == result.report.before.parameters - 30 * 40 + 3 * (30 + 40)
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-4, atol=1e-5)
    assert isinstance(model[0], nn.Linear), "the caller's model stays"
    reasons = {item.name: item.reason for item in effect.skipped}
    assert reasons["2"] == "rank 4 would need more: 136 numbers, and 4×30 has 120"


@pytest.mark.parametrize("name", ["cnn", "resnet", "transformer", "packed_lstm", "tied", "nested"])
def test_every_layer_is_touched_or_skipped(name):
    model, example_inputs = torch_models()[name]
    work = BACKEND.bind(model, None, example_inputs, **INFERENCE)
    _, effect = LowRank(energy=0.3).torch(BACKEND.copy(work))
    layers = [each for each, part in model.named_modules() if isinstance(part, (nn.Linear, nn.RNNBase))]
    assert sorted([*effect.touched, *(item.name for item in effect.skipped)]) == sorted(layers)
    reasons = {item.name: item.reason for item in effect.skipped}
    expected = {
        "transformer": {"layers.0.self_attn.out_proj": "the layer that holds it"},
        "tied": {"out": "shares a weight with embed"},
    }
    for layer, reason in expected.get(name, {}).items():
        assert reason in reasons[layer]


def test_recurrent_layers_of_full_rank_stay():
    model, example_inputs = torch_models()["packed_lstm"]
    _, effect = LowRank().torch(BACKEND.bind(model, None, example_inputs, **INFERENCE))
    reason = {item.name: item.reason for item in effect.skipped}["lstm"]
    assert reason.startswith("its input weights: rank 6 would need more: 420 numbers, and 64×6 has 384")
    assert "kernel that takes them whole" in reason


@pytest.mark.parametrize("given", [True, False], ids=["with inputs", "without inputs"])
def test_weights_read_by_a_fast_path_stay(given):
    """In evaluation nn.TransformerEncoderLayer takes the weights of its linears and does not call them."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True)
    with torch.no_grad():
        layer.linear1.weight.copy_(thin(64, 16, 2))
    model = nn.Sequential(layer, nn.Linear(16, 2)).eval()
    x = torch.randn(2, 5, 16)
    work = BACKEND.bind(model, None, (x,) if given else None, **INFERENCE)
    new, effect = LowRank().torch(work)
    assert effect.touched == ()
    with torch.no_grad():
        torch.testing.assert_close(new.model(x), model(x))


class Reader(nn.Module):
    """Gives an initial state and asks its recurrent layer for sizes."""

    def __init__(self, kind, **options):
        super().__init__()
        self.rnn = kind(24, 12, **options)
        self.fc = nn.Linear(12 * (1 + self.rnn.bidirectional), 4)

    def forward(self, x):
        layers = self.rnn.num_layers * (1 + self.rnn.bidirectional)
        rows = x.batch_sizes[0] if isinstance(x, PackedSequence) else x.shape[0 if self.rnn.batch_first else 1]
        state = torch.full((layers, rows, self.rnn.hidden_size), 0.1, dtype=self.fc.weight.dtype)
        sequence, _ = self.rnn(x, (state, state) if self.rnn.mode == "LSTM" else state)
        return self.fc(sequence.data if isinstance(sequence, PackedSequence) else sequence)


RECURRENT = {
    "lstm": (nn.LSTM, {}),
    "bidirectional 2-layer lstm": (nn.LSTM, {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    "bidirectional gru": (nn.GRU, {"bidirectional": True}),
    "rnn without biases": (nn.RNN, {"bias": False}),
}


def reader(name):
    torch.manual_seed(0)
    kind, options = RECURRENT[name]
    model = Reader(kind, **options)
    with torch.no_grad():
        for key, weight in model.rnn.named_parameters():
            if key.startswith("weight_ih_l0"):
                torch.manual_seed(1)  # both directions read the same two combinations of inputs
                weight.copy_(torch.randn(weight.shape[0], 2) @ torch.randn(2, 24) / 5)
    return model


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", RECURRENT)
def test_inputs_of_recurrent_layers(name, packed):
    model = reader(name)
    x = torch.randn(3, 6, 24)
    if packed:
        x = pack_padded_sequence(x, torch.tensor([6, 4, 1]), batch_first=True)
    work = BACKEND.bind(model, None, (x,), **INFERENCE)
    new, effect = LowRank(energy=1 - 1e-9).torch(BACKEND.copy(work))
    assert effect.touched == ("rnn",)
    rows = sum(len(weight) for key, weight in model.rnn.named_parameters() if key.startswith("weight_ih_l0"))
    assert effect.notes == (f"rnn: input weights {rows}×24 → rank 2",)
    assert BACKEND.size(new)[1] == BACKEND.size(work)[1] - rows * 24 + 2 * (rows + 24)
    with torch.no_grad():
        torch.testing.assert_close(new.model(x), model(x), rtol=1e-4, atol=1e-5)
    assert (new.model.rnn.input_size, new.model.rnn.recurrent.input_size) == (24, 2)


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers_train_on(name):
    x, y = torch.randn(3, 6, 24), torch.randn(3, 6, 4)
    optimizer, loss = partial(torch.optim.Adam, lr=1e-2), nn.functional.mse_loss
    given = {"mode": "training", "loss": loss, "targets": y, "optimizer": optimizer, "seed": 0}
    work = BACKEND.bind(reader(name), None, (x,), **given)
    new, _ = LowRank().torch(BACKEND.copy(work))
    held = [id(p) for group in new.training.optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in new.model.parameters())
    trainer = Trainer(new)
    losses = [float(trainer.step(new.inputs, y)) for _ in range(60)]
    assert losses[-1] < losses[0] / 2
    Trainer(work).step(work.inputs, y)
    with pytest.raises(UnsupportedError, match="factorize before training"):
        LowRank().torch(work)


def test_hooks_and_computed_weights_stay():
    model = nn.Sequential(*(nn.Linear(20, 20) for _ in range(3)))
    model[0].register_forward_hook(lambda *_: None)
    model[1] = nn.utils.parametrizations.spectral_norm(nn.Linear(20, 20))
    with torch.no_grad():
        model[0].weight.copy_(thin(20, 20, 1))
        model[2].weight.copy_(thin(20, 20, 1))
    work = BACKEND.bind(model, None, (torch.randn(2, 20),), **INFERENCE)
    _, effect = LowRank().torch(work)
    assert effect.touched == ("2",)
    reasons = {item.name: item.reason for item in effect.skipped}
    assert "hooks" in reasons["0"]
    assert "plain" in reasons["1"]


def test_model_that_is_one_layer():
    model = nn.Linear(40, 30)
    with torch.no_grad():
        model.weight.copy_(thin(30, 40, 3))
    _, effect = LowRank().torch(BACKEND.bind(model, None, (torch.randn(2, 40),), **INFERENCE))
    assert "the model itself" in effect.skipped[0].reason


def training_work(steps=0):
    model, x = net()
    y = torch.randn(16, 4)
    optimizer = partial(torch.optim.Adam, lr=1e-2)
    loss = nn.functional.mse_loss
    work = BACKEND.bind(model, None, (x,), mode="training", loss=loss, targets=y, optimizer=optimizer, seed=0)
    trainer = Trainer(work)
    for _ in range(steps):
        trainer.step(work.inputs, y)
    return work


def test_training_goes_on_with_the_factors():
    new, _ = LowRank(distill=True).torch(training_work())
    held = [id(p) for group in new.training.optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in new.model.parameters())
    assert isinstance(new.training.teacher[0], nn.Linear)
    before = new.model[0][0].weight.detach().clone()
    trainer = Trainer(new)
    losses = [float(trainer.step(new.inputs, new.training.targets)) for _ in range(60)]
    assert losses[-1] < losses[0] / 2
    assert not torch.equal(before, new.model[0][0].weight)


def test_optimizer_with_a_state_is_refused():
    with pytest.raises(UnsupportedError, match=r"'exp_avg'.*factorize before training"):
        LowRank().torch(training_work(steps=1))


@pytest.mark.parametrize("energy", [0, 1, -1, 2.0, "much", True, None])
def test_bad_energy(energy):
    with pytest.raises(InvalidInputError, match=r"low_rank.*energy"):
        LowRank(energy=energy)


def test_tolerance_follows_the_energy():
    assert LowRank(energy=0.75).tolerance == 0.5
    assert LowRank.tolerance == LowRank().tolerance == pytest.approx(0.1)


def test_refusals():
    model, x = net()
    with pytest.raises(UnsupportedError, match="distill=True is for training"):
        perfkit.optimize(model, recipe="low_rank(distill=True)", example_inputs=(x,))
    with pytest.raises(InvalidInputError, match="'1'"):
        perfkit.optimize(model, recipe="low_rank(include='1')", example_inputs=(x,))
