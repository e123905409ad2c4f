"""Removing units of torch models: what is left computes what the original does with those units at zero."""

import copy

import pytest

pytest.importorskip("torch")

import torch
from sample_models import torch_models
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import perfkit
from perfkit import InvalidInputError, UnsupportedError
from perfkit.backends import backend
from perfkit.pruning.amounts import kept
from perfkit.pruning.torch_units import NONE, Units
from perfkit.recipes.prune import Prune

pytestmark = pytest.mark.usefixtures("hasty")


class Recurrent(nn.Module):
    """A recurrent layer whose sequence and states both reach the outputs, through linear layers only."""

    def __init__(self, kind, **options):
        super().__init__()
        self.rnn = kind(5, 12, **options)
        width = 24 if self.rnn.bidirectional else 12
        self.all, self.last = nn.Linear(width, 3), nn.Linear(width, 2)

    def forward(self, x):
        sequence, states = self.rnn(x)
        h = states[0] if isinstance(states, tuple) else states
        last = torch.cat([h[-2], h[-1]], -1) if self.rnn.bidirectional else h[-1]
        return self.all(sequence), self.last(last)


class Cells(nn.Module):
    """Both states of an LSTM are read, and its layers' sum."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(5, 12, 2)
        self.fc, self.memory = nn.Linear(12, 3), nn.Linear(12, 3)

    def forward(self, x):
        _, (h, c) = self.rnn(x)
        return self.fc(h[0] + h[1]) + self.memory(c[0])


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.rnn = nn.Linear(6, 8), nn.LSTM(8, 8, 2, bidirectional=True)
        self.fc = nn.Linear(16, 3)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(torch.tanh(self.embed(x)), lengths)
        padded, lengths = pad_packed_sequence(self.rnn(packed)[0])
        return self.fc(padded), lengths


class Gathered(nn.Module):
    """Picks the last valid step, as the text models do."""

    def __init__(self):
        super().__init__()
        self.embed, self.rnn, self.fc = nn.Embedding(9, 5), nn.GRU(5, 12, 2, batch_first=True), nn.Linear(12, 2)

    def forward(self, ids, lengths):
        hidden, _ = self.rnn(self.embed(ids))
        last = (lengths - 1)[:, None, None].expand(-1, 1, hidden.size(2))
        return self.fc(torch.gather(hidden, 1, last).squeeze(1))


class Dense(nn.Module):
    """Concatenations, a split, padding, a transposed convolution, in-place and functional operations."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(11, 8, 3, padding=1)
        self.norm, self.mix = nn.BatchNorm2d(19), nn.Conv2d(19, 6, 1)
        self.up, self.out = nn.ConvTranspose2d(6, 12, 2, 2), nn.Conv2d(12, 2, 1)

    def forward(self, x):
        for layer in (self.a, self.b):
            x = torch.cat([x, F.relu6(layer(x), inplace=True)], 1)
        x = F.pad(self.mix(F.gelu(self.norm(x))), (1, 1, 1, 1))
        return self.out(F.avg_pool2d(F.leaky_relu(self.up(x)), 2))


class Separable(nn.Module):
    """Depthwise convolutions with a multiplier, instance norm, PReLU and a gate per channel."""

    def __init__(self):
        super().__init__()
        self.first, self.depth = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 3, groups=8)
        self.norm, self.act = nn.InstanceNorm2d(16, affine=True), nn.PReLU(16)
        self.squeeze, self.excite = nn.Linear(16, 6), nn.Linear(6, 16)
        self.fc = nn.Linear(16, 3)

    def forward(self, x):
        x = self.act(self.norm(self.depth(self.first(x))))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))
        return self.fc((x * gate[:, :, None, None]).amax((2, 3)))


class Attended(nn.Module):
    """Recurrent units summed over time with weights of their own, and a residual around a linear layer."""

    def __init__(self):
        super().__init__()
        self.rnn, self.weigh = nn.RNN(5, 12, batch_first=True), nn.Linear(12, 1)
        self.more, self.fc = nn.Linear(12, 12), nn.Linear(12, 2)

    def forward(self, x):
        hidden, _ = self.rnn(x)
        shares = torch.softmax(self.weigh(hidden), 1)
        pooled = (shares.transpose(1, 2) @ hidden).squeeze(1)
        return self.fc(pooled + torch.tanh(self.more(pooled)))


class Repeated(nn.Module):
    """One layer is called twice, on what the first call made."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.out = nn.Linear(5, 12), nn.Linear(12, 12), nn.Linear(12, 2)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        return self.out(torch.relu(self.again(torch.relu(self.again(x)))))


class Normed(nn.Module):
    """Channels last, a batch norm over features, unflatten, stack and index."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(5, 12), nn.BatchNorm1d(12), nn.Linear(24, 2)

    def forward(self, x):
        x = self.norm(self.a(x).movedim(-1, 1)).movedim(1, -1)
        both = torch.stack([x[:, 0], x[:, [1, 2, 3]].amax(1)])
        return self.b(both.transpose(0, 1).flatten(1).unsqueeze(1))


def cases():
    torch.manual_seed(0)
    images, steps, rows = torch.randn(3, 3, 8, 8), torch.randn(7, 4, 5), torch.randn(4, 7, 5)
    known = torch_models()
    ids, lengths = torch.randint(0, 9, (4, 7)), torch.tensor([7, 5, 5, 2])
    return {
        "cnn": (*known["cnn"], {"conv"}),
        "resnet": (*known["resnet"], {"stem", "first.0", "first.3", "shortcut", "second.0", "second.3"}),
        "transformer": (*known["transformer"], {"layers.0.linear1", "layers.1.linear1"}),
        "lstm": (Recurrent(nn.LSTM), (steps,), {"rnn"}),
        "lstm without biases": (Recurrent(nn.LSTM, bias=False), (steps,), {"rnn"}),
        "bidirectional 2-layer gru": (Recurrent(nn.GRU, num_layers=2, bidirectional=True), (steps,), {"rnn"}),
        "bidirectional 2-layer lstm": (
            Recurrent(nn.LSTM, num_layers=2, bidirectional=True, batch_first=True, dropout=0.5), (rows,), {"rnn"},
        ),
        "3-layer rnn": (Recurrent(nn.RNN, num_layers=3), (steps,), {"rnn"}),
        "relu rnn, one sequence": (Recurrent(nn.RNN, nonlinearity="relu"), (steps[:, 0],), {"rnn"}),
        "both states": (Cells(), (steps,), {"rnn"}),
        "packed": (Packed(), (torch.randn(7, 4, 6), lengths), {"embed", "rnn"}),
        "gathered": (Gathered(), (ids, lengths), {"rnn"}),
        "concatenations": (Dense(), (images,), {"a", "b", "mix", "up"}),
        "depthwise and gate": (Separable(), (images,), {"first", "depth", "squeeze", "excite"}),
        "pooled over time": (Attended(), (rows,), {"rnn", "more"}),
        "one layer twice": (Repeated(), (rows[0],), {"first", "again"}),
        "moved dimensions": (Normed(), (rows,), {"a"}),
        "1d": (
            nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(24, 3)),
            (torch.randn(2, 3, 8),), {"0"},
        ),
    }  # fmt: skip


def bound(model, example_inputs):
    """A workload on a copy of the model whose parameters and statistics are all different from each other."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.uniform_(0.1, 0.6).mul_(torch.sign(torch.randn_like(tensor)) if tensor.ndim > 1 else 1)
    settings = {"loss": None, "targets": None, "optimizer": None, "seed": 0}
    return backend("torch").bind(model, None, example_inputs, mode="inference", **settings)


def pruned(work, **options):
    return Prune(**options).torch(work.backend.copy(work))


def silenced(original, smaller):
    """The original with those outputs of its layers at zero that are missing in `smaller`.

    Which ones is read off the biases (where there are none, the rows of the recurrent weights), all different.
    """
    silent, parts = copy.deepcopy(original), dict(smaller.named_modules())
    for name, module in silent.named_modules():
        rows = {}
        for key, tensor in module.named_parameters(recurse=False):
            kind, _, end = key.partition("_l") if isinstance(module, nn.RNNBase) else (key, "", "")
            if kind in ("bias", "bias_hh") or (isinstance(module, nn.RNNBase) and not module.bias and "hh" in kind):
                columns = tensor if tensor.ndim == 1 else tensor.abs().amax(1)
                others = getattr(parts[name], key)
                left = others if others.ndim == 1 else None
                rows[end] = ~torch.isin(columns, left) if left is not None else missing_rows(tensor, others)
        with torch.no_grad():
            for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                end = key.partition("_l")[2] if isinstance(module, nn.RNNBase) else ""
                if end in rows and not key.startswith(("running_var", "num_batches_tracked", "weight_hr")):
                    dim = 1 if getattr(module, "transposed", False) and tensor.ndim > 1 else 0
                    tensor.movedim(dim, 0)[rows[end]] = 0
    return silent


def missing_rows(weight, smaller):
    """Rows of a recurrent weight of which no part is left; a row that lost columns keeps most of its values."""
    return torch.stack([~torch.isin(row, smaller).any() for row in weight])


def outputs(work):
    with torch.no_grad():
        model = copy.deepcopy(work.model).double().eval()
        given = [x.double() if x.is_floating_point() else x for x in work.inputs.args]
        return list(work.backend.leaves(model(*given, **work.inputs.kwargs)))


@pytest.mark.parametrize("name", cases())
def test_removing_is_silencing(name):
    model, example_inputs, expected = cases()[name]
    work = bound(model, example_inputs)
    new, effect = pruned(work, round_to=1)
    assert set(effect.touched) == expected
    reference, found = outputs(work.replace(model=silenced(work.model, new.model))), outputs(new)
    for one, other in zip(found, reference, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)  # float64, other order of summation
    assert any(not torch.allclose(one, other) for one, other in zip(found, outputs(work), strict=True))
    assert work.backend.size(new)[1] < work.backend.size(work)[1]
    assert type(new.model).__mro__[-3:] == type(work.model).__mro__[-3:]
    assert isinstance(new.model, type(model))
    assert new.model.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("name", cases())
def test_sizes_and_notes(name):
    model, example_inputs, _ = cases()[name]
    work = bound(model, example_inputs)
    new, effect = pruned(work, round_to=1)
    before, after = dict(work.model.named_modules()), dict(new.model.named_modules())
    for touched, note in zip(effect.touched, effect.notes, strict=True):
        layer = after[touched]
        attribute = next(key for key in ("out_channels", "out_features", "hidden_size") if hasattr(layer, key))
        old, small = getattr(before[touched], attribute), getattr(layer, attribute)
        assert small == old // 2
        assert note.startswith(f"{touched}: {old} → {small} ")
    rebuilt = {nn.Linear: ("in_features", "out_features"), nn.LSTM: ("input_size", "hidden_size")}
    for layer in after.values():
        for kind, arguments in rebuilt.items():
            if type(layer) is kind and not getattr(layer, "bidirectional", False):
                options = {key: getattr(layer, key) for key in ("num_layers", "batch_first") if hasattr(layer, key)}
                fresh = kind(*(getattr(layer, key) for key in arguments), bias=bool(layer.bias is not None), **options)
                if kind is nn.Linear:
                    assert fresh.weight.shape == layer.weight.shape
                else:
                    assert fresh.weight_ih_l0.shape == layer.weight_ih_l0.shape
                    assert fresh.weight_hh_l0.shape == layer.weight_hh_l0.shape
        if isinstance(layer, nn.modules.batchnorm._NormBase):
            assert layer.num_features == len(layer.weight)
            assert layer.running_mean is None or len(layer.running_mean) == layer.num_features
    assert len(effect.touched) + len(effect.skipped) == sum(
        isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase)) for layer in before.values()
    ), "every layer is touched or skipped"
    assert all(item.reason for item in effect.skipped)


class WrittenSizes(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(128, 2)

    def forward(self, x):
        return self.fc(F.relu(self.b(F.relu(self.a(x)))).view(-1, 128))


class Shuffled(nn.Module):
    """Regroups its channels, as ShuffleNet does: other channels meet others once some are gone."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = self.a(x)
        rows, channels, *size = x.shape
        return self.b(x.view(rows, 2, channels // 2, *size).transpose(1, 2).reshape(rows, channels, *size))


class StatesGiven(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.fc = nn.LSTM(5, 8), nn.Linear(8, 2)

    def forward(self, x):
        state = torch.zeros(1, x.shape[1], 8, dtype=x.dtype)
        return self.fc(self.rnn(x, (state, state))[0])


class StatesReturned(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.fc = nn.GRU(5, 8), nn.Linear(8, 2)

    def forward(self, x):
        sequence, state = self.rnn(x)
        return self.fc(sequence), state


class Pixels(nn.Module):
    """Four channels become one of four times the size."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(4, 2, 3)

    def forward(self, x):
        return self.b(F.pixel_shuffle(self.a(x), 2))


class Squeezed(nn.Module):
    """With one unit left, squeeze() takes its dimension too."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 2), nn.Linear(2, 2)

    def forward(self, x):
        return self.b(self.a(x[:, None]).squeeze())


class Unread(nn.Module):
    """Its layers' units are summed, which one more unit would change the mean of."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(1, 2)

    def forward(self, x):
        return self.b(self.a(x).mean(-1, keepdim=True))


class HalfReturned(nn.Module):
    """One direction is an output, so the other may not lose units either: hidden_size is one number."""

    def __init__(self):
        super().__init__()
        self.rnn, self.fc = nn.GRU(5, 8, bidirectional=True), nn.Linear(8, 2)

    def forward(self, x):
        sequence, _ = self.rnn(x)
        return sequence[..., :8], self.fc(sequence[..., 8:])


class Functional(nn.Module):
    """A parameter of its own scales the units."""

    def __init__(self):
        super().__init__()
        self.a, self.scale, self.b = nn.Linear(4, 8), nn.Parameter(torch.rand(8)), nn.Linear(8, 2)

    def forward(self, x):
        return self.b(self.a(x) * self.scale)


REFUSED = {
    "written sizes": (WrittenSizes, (2, 1, 8, 8), {"b": "sizes stand in its forward", "fc": "an output of the model"}),
    "regrouped": (Shuffled, (2, 1, 8, 8), {"a": "regrouped"}),
    "state given": (StatesGiven, (7, 3, 5), {"rnn": "initial state"}),
    "state returned": (StatesReturned, (7, 3, 5), {"rnn": "output of the model"}),
    "one direction returned": (HalfReturned, (7, 3, 5), {"rnn": "output of the model"}),
    "own parameter": (Functional, (2, 4), {"a": "values of fixed size in mul"}),
    "pixel shuffle": (Pixels, (2, 3, 8, 8), {"a": "used by pixel_shuffle"}),
    "squeezed": (Squeezed, (3, 4), {"a": "does not run"}),
    "averaged": (Unread, (3, 4), {"a": "used by mean"}),
    "attention": (
        lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True),
        (2, 5, 16),
        {"self_attn.out_proj": "belongs to self_attn (MultiheadAttention)"},
    ),
    "sigmoid": (
        lambda: nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 2)),
        (2, 4),
        {"0": "do not stay zero"},
    ),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)),
        (2, 4),
        {"0": "normalizes over all units"},
    ),
    "grouped": (
        lambda: nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 2, 1)),
        (2, 1, 8, 8),
        {"0": "groups must stay equal", "1": "groups must stay equal"},
    ),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 8)), nn.Linear(8, 2)),
        (2, 4),
        {"0": "not a plain one"},
    ),
    "projected": (
        lambda: Recurrent(lambda *_: nn.LSTM(5, 16, proj_size=12)),
        (7, 3, 5),
        {"rnn": "proj_size"},
    ),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_stays(name):
    make, shape, expected = REFUSED[name]
    torch.manual_seed(0)
    work = bound(make(), (torch.randn(shape),))
    new, effect = pruned(work, round_to=1)
    reasons = {item.name: item.reason for item in effect.skipped}
    for layer, reason in expected.items():
        assert reason in reasons[layer]
        assert layer not in effect.touched
    reference = outputs(work.replace(model=silenced(work.model, new.model)))
    for one, other in zip(outputs(new), reference, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pair", [(0, 3), (3, 0)])
def test_what_is_fixed_stays_fixed_when_united(pair):
    units = Units()
    first, second = units.axis("first", 3), units.axis("second", 3)
    units.fix(torch.tensor([3]), "is needed")
    units.unite([torch.tensor([pair[0]]), torch.tensor([pair[1]])], "add")
    units.unite([torch.tensor([1, 2]), torch.tensor([NONE, 4])], "cat")
    found = units.structure()
    assert found.free(torch.cat([*found.axes["first"], *found.axes["second"]])).tolist() == [
        False, False, True, False, True, True,
    ]  # fmt: skip
    assert set(found.fixed.values()) == {"is needed", "meets values of fixed size in cat"}
    assert (first[0][0], second[0][0]) == (0, 3)


def test_one_layer_that_cannot_go_keeps_no_other():
    work = bound(WrittenSizes(), (torch.randn(2, 1, 8, 8),))
    _, effect = pruned(work, round_to=1)
    assert effect.touched == ("a",)


def test_tied_weights_stay():
    model, given = torch_models()["tied"]
    work = bound(model, given)
    _, effect = pruned(work, round_to=1)
    reasons = {item.name: item.reason for item in effect.skipped}
    assert "shares a weight with embed" in reasons["out"]
    assert "shares a weight with embed" in reasons["body"]


@pytest.mark.parametrize(
    ("size", "amount", "round_to", "expected"),
    [(64, 0.5, 8, 32), (50, 0.5, 8, 24), (10, 0.5, 8, 5), (16, 0.5, 8, 8), (12, 0.5, 8, 6), (100, 0.3, 1, 70),
     (16, 0.1, 8, 16), (1, 0.9, 8, 1), (3, 0.99, 1, 1), (128, 0.75, 32, 32)],
)  # fmt: skip
def test_rounding(size, amount, round_to, expected):
    assert kept(size, amount, round_to) == expected


def test_nothing_left_to_remove_is_said():
    work = bound(nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2)), (torch.randn(2, 4),))
    _, effect = pruned(work, amount=0.1)
    assert effect.touched == ()
    assert "leaves nothing to remove" in effect.skipped[0].reason


def test_include_and_exclude():
    work = bound(*torch_models()["resnet"])
    _, effect = pruned(work, round_to=1, include="first.0")
    assert effect.touched == ("first.0",)
    _, effect = pruned(work, round_to=1, exclude=("stem",))
    assert set(effect.touched) == {"first.0", "shortcut", "second.0", "second.3"}
    reasons = {item.name: item.reason for item in effect.skipped}
    assert "stem" in reasons["first.3"], "it is added to stem's output"
    with pytest.raises(InvalidInputError, match="stam"):
        pruned(work, exclude="stam")


def test_the_smallest_go():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        model[0].weight[[1, 4, 6, 7]] *= 1e-3
        kept_rows = model[0].weight[[0, 2, 3, 5]].clone()
    settings = {"mode": "inference", "loss": None, "targets": None, "optimizer": None, "seed": 0}
    work = backend("torch").bind(model, None, (torch.randn(2, 4),), **settings)
    new, _ = pruned(work, round_to=1)
    assert torch.equal(new.model[0].weight, kept_rows)


def test_activation_looks_at_the_data():
    """Two units with large weights, but on an input that is always zero."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[9.0, 0, 0, 0], [0, 1, 0, 0], [8, 0, 0, 0], [0, 0, 1, 1]]))
    x = torch.rand(5, 4) + 1
    x[:, 0] = 0
    settings = {"mode": "inference", "loss": None, "targets": None, "optimizer": None, "seed": 0}
    work = backend("torch").bind(model, None, (x,), **settings)
    new, _ = pruned(work, round_to=1, criterion="activation")
    assert new.model[0].weight.abs().max() == 1
    torch.testing.assert_close(new.model(x), model(x))
    elsewhere = work.replace(calibration=(work.backend.as_inputs(work, (x.roll(1, dims=1),)),))
    new, _ = pruned(elsewhere, round_to=1, criterion="activation")
    assert new.model[0].weight.abs().max() == 9, "calibration data come before the example inputs"


@pytest.mark.parametrize("name", ["bidirectional 2-layer lstm", "packed", "depthwise and gate", "1d"])
def test_activation_runs_on_every_kind(name):
    model, example_inputs, expected = cases()[name]
    _, effect = pruned(bound(model, example_inputs), round_to=1, criterion="activation")
    assert set(effect.touched) == expected


def test_dead_units_go_first():
    """With a criterion that does not see that they are dead: their activation is zero like the others'."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].bias.zero_()
        model[0].weight[[2, 3]] = 0
    settings = {"mode": "inference", "loss": None, "targets": None, "optimizer": None, "seed": 0}
    work = backend("torch").bind(model, None, (torch.zeros(2, 4),), **settings)
    new, _ = pruned(work, round_to=1, criterion="activation")
    assert bool(new.model[0].weight.abs().sum(1).gt(0).all())


@pytest.mark.parametrize(
    "options",
    [{"amount": 0}, {"amount": 1}, {"amount": "half"}, {"amount": True}, {"structure": "rows"}, {"structure": "4:2"},
     {"structure": "4:4"}, {"criterion": "size"}, {"schedule": -1}, {"schedule": 1.5}, {"round_to": 0},
     {"structure": "2:4", "schedule": 5}, {"structure": "unstructured", "criterion": "taylor"}, {"include": 3}],
    ids=str,
)  # fmt: skip
def test_bad_options(options):
    with pytest.raises(InvalidInputError, match=f"prune.*{next(iter(options))}"):
        Prune(**options)


@pytest.mark.parametrize(
    ("options", "reason"),
    [("schedule=5", "training"), ("distill=True", "training"), ("criterion='taylor'", "activation")],
)
def test_refusals_in_inference(options, reason):
    model, example_inputs = torch_models()["cnn"]
    with pytest.raises(UnsupportedError, match=reason):
        perfkit.optimize(model, recipe=f"prune({options})", example_inputs=example_inputs)


def test_needs_example_inputs():
    with pytest.raises(UnsupportedError, match="example_inputs"):
        perfkit.optimize(torch_models()["cnn"][0], recipe="prune")


def test_far_outputs_are_refused_and_can_be_allowed():
    model, example_inputs = torch_models()["resnet"]
    with pytest.raises(perfkit.FidelityError):
        perfkit.optimize(model, recipe="prune(round_to=1)", example_inputs=example_inputs)
    result = perfkit.optimize(model, recipe="prune(round_to=1)", example_inputs=example_inputs, tolerance=10)
    assert result.report.after.parameters < result.report.before.parameters / 2
    assert "stem: 8 → 4 channels" in result.report.steps[0].effect.notes
    assert not result.report.steps[0].effect.simulated


def test_before_another_recipe():
    model, example_inputs = torch_models()["resnet"]
    result = perfkit.optimize(model, recipe="prune(round_to=1)+half", example_inputs=example_inputs, tolerance=10)
    assert result.model.stem.weight.shape == (4, 3, 3, 3)
