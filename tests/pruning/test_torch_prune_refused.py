"""Units of torch models that cannot be followed: they stay, and the report tells why."""

import functools

import pytest

pytest.importorskip("torch")

import torch
from prune_torch_models import Recurrent, bound, outputs, pruned, silenced
from sample_models import torch_models
from torch import nn
from torch.nn import functional as F

import perfkit
from perfkit import UnsupportedError
from perfkit.pruning.torch_units import NONE, Units


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


class Lent(nn.Module):
    """Calls its layers with other weights than theirs."""

    def __init__(self):
        super().__init__()
        self.net, self.scale = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), nn.Parameter(torch.rand(8))

    def forward(self, x):
        weights = {"0.weight": self.net[0].weight * self.scale[:, None]}
        return torch.func.functional_call(self.net, weights, (x,))


REFUSED = {
    "written sizes": (WrittenSizes, (2, 1, 8, 8), {"b": "sizes stand in its forward", "fc": "an output of the model"}),
    "regrouped": (Shuffled, (2, 1, 8, 8), {"a": "regrouped"}),
    "state given": (StatesGiven, (7, 3, 5), {"rnn": "initial state"}),
    "state returned": (StatesReturned, (7, 3, 5), {"rnn": "output of the model"}),
    "one direction returned": (HalfReturned, (7, 3, 5), {"rnn": "output of the model"}),
    "own parameter": (Functional, (2, 4), {"a": "values of fixed size in mul"}),
    "other weights": (Lent, (2, 4), {"net.0": "not its own, as by functional_call"}),
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


@pytest.mark.parametrize("recipe", ["prune(amount=0.5)", "low_rank(energy=0.5)"])
def test_what_adds_up_gradients_of_other_parameters_is_told_of(recipe):
    """Without processes: what the class does when it is made is not looked at."""

    class Replica(nn.parallel.DistributedDataParallel):
        def __init__(self, module):
            nn.Module.__init__(self)
            self.module = module

        def forward(self, x):
            return self.module(x)

        def __getstate__(self):
            return dict(vars(self))

        __setstate__ = nn.Module.__setstate__

    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    given = {
        "mode": "training",
        "loss": nn.functional.mse_loss,
        "targets": torch.ones(4, 2),
        "optimizer": functools.partial(torch.optim.SGD, lr=0.1),
    }
    with pytest.raises(UnsupportedError, match=r"DistributedDataParallel adds up .* \(model\.module\)"):
        perfkit.apply(Replica(model), recipe, example_inputs=(torch.ones(4, 4),), **given)
    assert perfkit.apply(model, recipe, example_inputs=(torch.ones(4, 4),), **given).report.steps[0].effect.touched
