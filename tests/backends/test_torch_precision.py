"""Low precision on models whose dtypes and layers are not the usual ones: what is told is what runs."""

import copy
import functools

import pytest

pytest.importorskip("torch")

import torch
import torch.nn.functional as F
from applied_recipes import applied
from torch import nn

import perfkit

pytestmark = pytest.mark.filterwarnings("ignore::perfkit.PerfkitWarning")


class Own(nn.Module):
    """A linear layer that is no nn.Linear, a layer that is never called, and a tensor that is no buffer."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.unused = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.table = torch.randn(4)

    def forward(self, x):
        return self.norm(F.linear(x, self.weight)) + self.table


def test_the_layers_that_autocast_runs_are_told_and_no_others():
    torch.manual_seed(0)
    effect = applied(Own(), "bf16", torch.randn(3, 4)).effect
    assert effect.touched == ("Own",)
    reasons = {item.name: item.reason for item in effect.skipped}
    assert reasons.keys() == {"unused", "norm"}
    assert "not called" in reasons["unused"]
    assert "leaves it in float32" in reasons["norm"]


def test_a_transformer_runs_in_bfloat16():
    """torch's fast path does not look for autocast on a CPU, and would run in float32 all the same."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), torch.randn(2, 5, 16)
    found = applied(model, "bf16", x)
    assert "layers.0.linear1" in found.effect.touched
    assert found.fidelity.relative_error > 2**-12, "as exact as float32: nothing was rounded to 8 bits"


@pytest.mark.parametrize("recipe", ["bf16", "half"])
def test_nothing_to_cast_is_no_effect_and_changes_nothing(recipe):
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    for model, example in ((nn.Softmax(-1), x), (nn.Linear(4, 4).bfloat16(), x.bfloat16())):
        result = applied(model, recipe, example)
        assert result.effect.status == "NO_EFFECT"
        assert result.effect.notes
        assert torch.equal(result.model(example), model(example))


def test_bf16_does_nothing_to_float64():
    model, x = nn.Linear(4, 4).double(), torch.randn(3, 4).double()
    effect = applied(model, "bf16", x).effect
    assert effect.status == "NO_EFFECT"
    assert "float64" in effect.skipped[0].reason


@pytest.mark.parametrize(
    ("recipe", "dtype"), [("half", torch.float64), ("half", torch.float16), ("bf16", torch.float16)]
)
def test_outputs_return_in_the_models_precision(recipe, dtype):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype), torch.randn(3, 4).to(dtype)
    result = applied(model, recipe, x)
    assert result.effect.status == "applied"
    with torch.no_grad():
        y, expected = result.model(x), model(x)
    assert y.dtype == dtype
    # two layers of unit roundoff 2^-8 on sums of values below 1
    torch.testing.assert_close(y, expected, rtol=0, atol=4 * 2**-8)


class Mixed(nn.Module):
    """A norm in float32 among layers in bfloat16, as language models have it."""

    def __init__(self):
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(4), nn.Linear(4, 4).bfloat16()

    def forward(self, x):
        return self.fc(self.norm(x).bfloat16())


@pytest.mark.parametrize("recipe", ["half", "bf16"])
def test_outputs_of_a_model_in_two_precisions_stay_in_theirs(recipe):
    torch.manual_seed(0)
    result = applied(Mixed(), recipe, torch.randn(3, 4))
    assert result.effect.status == "applied"
    assert result.model(torch.randn(3, 4)).dtype == torch.bfloat16


class Filled(nn.Module):
    """A state and a matrix that the forward makes in float32; and parameters that are no layer's."""

    def __init__(self):
        super().__init__()
        self.inner, self.cell, self.norm = nn.Linear(4, 8), nn.GRUCell(8, 8), nn.LayerNorm(8)
        self.scale, self.last = nn.Parameter(torch.rand(8)), nn.Linear(8, 2)
        self.register_buffer("shift", torch.randn(8))

    def forward(self, x):
        state = torch.zeros(x.size(0), 8)
        for step in range(x.size(1)):
            state = self.cell(self.norm(self.inner(x[:, step])) * self.scale + self.shift, state) @ torch.eye(8)
        return self.last(state)


def test_half_casts_layers_one_by_one_where_the_forward_makes_float32():
    torch.manual_seed(0)
    model, x = Filled().eval(), torch.randn(3, 5, 4)
    result = perfkit.apply(model, "half", example_inputs=(x,))
    effect = result.report.steps[0].effect
    assert effect.touched == ("inner", "cell", "last")
    assert {item.name for item in effect.skipped} == {"Filled", "norm"}
    assert "each layer computes in bfloat16 by itself" in effect.notes[0]
    for name, tensor in result.model.state_dict().items():
        own = model.state_dict()[name]
        assert torch.equal(tensor, own.to(torch.bfloat16 if name.split(".")[0] in effect.touched else torch.float32))
    with torch.no_grad():
        y, exact = result.model(x), model(x)
    assert y.dtype == torch.float32
    assert 0 < (y - exact).norm() <= 3e-2 * exact.norm()
    assert all(tensor.dtype == torch.float32 for tensor in model.state_dict().values())


class Bare(nn.Module):
    """No layer that could be cast by itself."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return x @ self.weight @ torch.eye(4)


def test_half_says_why_it_cannot_cast_a_model():
    with pytest.raises(perfkit.UnsupportedError, match=r"weights in bfloat16 do not fit the rest of Bare"):
        perfkit.apply(Bare(), "half", example_inputs=(torch.randn(3, 4),))


def test_half_takes_tensors_along_that_are_no_buffers():
    torch.manual_seed(0)
    result = applied(Own(), "half", torch.randn(3, 4))
    assert result.model.table.dtype == torch.bfloat16
    assert result.fidelity.reference == "a float64 run of the original"


def trained(model, x):
    """What training in half makes of a model whose outputs shall become 0."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return applied(model, "half", x, loss=lambda y, _: y.square().mean(), targets=x, optimizer=optimizer)


class Averaging(nn.Module):
    """Keeps an average of its inputs, `above` a layer or by itself, from the given call on."""

    def __init__(self, layer=None, since=0):
        super().__init__()
        self.layer, self.since, self.calls = layer or nn.Identity(), since, 0
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, x):
        self.calls += 1
        if self.training and self.calls > self.since:
            self.mean.lerp_(x.detach().mean(0).to(self.mean.dtype), 0.01)
        return self.layer(x - self.mean)


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm], ids=["new", "old"])
def test_what_is_written_in_training_stays_in_float32(norm):
    torch.manual_seed(0)
    found = trained(nn.Sequential(norm(nn.Linear(16, 16)), Averaging(), nn.Linear(16, 4)), torch.randn(8, 16))
    assert found.fidelity.ok
    reasons = {item.name: item.reason for item in found.effect.skipped}
    assert "mean" in reasons.pop("1")
    assert all("float32" in reason for reason in reasons.values())
    assert len(reasons) == 1
    assert "2" in found.effect.touched


@pytest.mark.parametrize("layer", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_gradients_stay_in_float32(layer):
    torch.manual_seed(0)
    ids = torch.arange(12).reshape(4, 3)
    found = trained(nn.Sequential(layer(12, 16, sparse=True), nn.Linear(16, 4)), ids)
    assert found.fidelity.ok
    assert "sparse" in found.effect.skipped[0].reason
    assert found.effect.touched == ("1",)


def test_constant_buffers_train_in_half():
    """Beside them the next layer would get float32."""
    torch.manual_seed(0)
    model = Averaging(nn.Linear(16, 4), since=10**6)
    found = trained(model, torch.randn(8, 16))
    assert found.fidelity.ok
    assert found.model.mean.dtype == torch.float32, "as it was, for state_dict"


class Looking(nn.Module):
    """Adds a table that it never registered, and writes to it from the given call on."""

    def __init__(self, since):
        super().__init__()
        self.layer, self.since, self.calls = nn.Linear(16, 4), since, 0
        self.table, self.last = torch.randn(16), torch.zeros(4)

    def forward(self, x):
        self.calls += 1
        if self.training and self.calls > self.since:
            self.table.mul_(0.5)
        y = self.layer(x + self.table)
        self.last = y.detach().mean(0)
        return y


def test_constants_that_are_no_buffers_train_in_half():
    torch.manual_seed(0)
    model = Looking(since=10**6)
    found = trained(model, torch.randn(8, 16))
    assert found.fidelity.ok
    assert found.effect.touched == ("layer",)
    assert found.model.state_dict().keys() == model.state_dict().keys()
    assert found.model.table.dtype == torch.float32
    assert torch.equal(found.model.table, model.table)
    assert "table" in vars(model), "the caller's model holds it as it did"


def test_half_loses_no_constant_that_is_written_later():
    torch.manual_seed(0)
    with pytest.raises(perfkit.UnsupportedError, match=r"table was written to.*'bf16'"):
        trained(Looking(since=20), torch.randn(8, 16))


def test_half_says_why_it_cannot_train_a_model():
    torch.manual_seed(0)
    with pytest.raises(perfkit.UnsupportedError, match=r"stay in float32 .*'bf16'"):
        trained(Averaging(nn.Linear(16, 4)), torch.randn(8, 16))


def test_half_loses_nothing_that_is_written_later():
    torch.manual_seed(0)
    with pytest.raises(perfkit.UnsupportedError, match="mean was written to"):
        trained(Averaging(nn.Linear(16, 4), since=20), torch.randn(8, 16))


def test_tied_weights_train_in_half():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(8, 16), nn.Linear(16, 16), nn.Linear(16, 8, bias=False))
    model[2].weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.arange(8)
    assert applied(model, "half", ids, loss=F.cross_entropy, targets=ids, optimizer=optimizer).fidelity.ok


class Shared(nn.Module):
    """One layer in several places."""

    def __init__(self):
        super().__init__()
        self.first = self.again = nn.Linear(16, 16)
        self.rest = nn.Sequential(self.first, nn.Tanh(), self.first, nn.Linear(16, 4))

    def forward(self, x):
        return self.rest(self.again(x))


def test_a_layer_in_several_places_trains_in_half():
    torch.manual_seed(0)
    model, x, y = Shared(), torch.randn(32, 16), torch.arange(32) % 4
    plain = copy.deepcopy(model)
    sgd = functools.partial(torch.optim.SGD, lr=0.5)
    training = {"mode": "training", "loss": F.cross_entropy, "targets": y, "optimizer": sgd}
    result, optimizer = perfkit.apply(model, "half", example_inputs=(x,), **training), sgd(plain.parameters())
    for _ in range(5):
        result.train_step(((x,), y))
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        optimizer.step()
    assert isinstance(result.model.first.weight, nn.Parameter)
    moved = [(other.first.weight - model.first.weight).detach() for other in (result.model, plain)]
    assert float((moved[0] - moved[1]).norm()) < 0.1 * float(moved[1].norm())  # each gradient in bfloat16
