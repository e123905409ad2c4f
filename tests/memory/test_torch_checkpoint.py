"""Checkpointing in torch: the same losses, gradients and statistics, in less memory; some things are run once."""

import functools

import pytest

pytest.importorskip("torch")

import torch
from torch import nn

from perfkit import PerfkitWarning, backends
from perfkit._chain import chain_of
from perfkit._variant import apply
from perfkit.backends.torch_hooks import call_hooks


class Padded(nn.Module):
    """A recurrent layer that also returns its state."""

    def __init__(self, kind, **options):
        super().__init__()
        self.rnn = kind(6, 8, num_layers=2, **options)
        self.fc = nn.Linear(8, 2)

    def forward(self, x):
        out, state = self.rnn(x)
        last = state[0] if isinstance(state, tuple) else state
        return self.fc(out.mean(1 if self.rnn.batch_first else 0) + last[-1])


class Own(nn.Module):
    """Two blocks in a forward of its own, one of them with dropout."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Dropout(0.5), nn.Linear(32, 8))
        self.second = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 2))

    def forward(self, x):
        return self.second(x + self.first(x))


class Shared(nn.Module):
    """One layer in several places, also of a sequence."""

    def __init__(self):
        super().__init__()
        self.first = self.again = nn.Linear(8, 8)
        self.rest = nn.Sequential(self.first, nn.Tanh(), self.first, nn.GELU(), nn.Linear(8, 64), nn.Tanh())
        self.fc = nn.Linear(64, 2)

    def forward(self, x):
        return self.fc(self.rest(self.again(x)))


class Counts(nn.Module):
    """Changes a buffer in each forward."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        self.calls += 1
        return torch.tanh(self.fc(x))


class Echo(nn.Module):
    """Adds what it computed in the last call, which it keeps in an attribute."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.last = None

    def forward(self, x):
        before, y = self.last, torch.tanh(self.fc(x))
        self.last = y.detach()
        return y if before is None else y + before


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))

    def forward(self, x, cache=None):
        if cache is not None:
            cache.append(x)
        return x + self.inner(x)


class Listed(nn.Module):
    """Blocks in a list, as language models have them; with a cache that each of them may write to."""

    def __init__(self, caches=False):
        super().__init__()
        self.blocks, self.head, self.caches = nn.ModuleList(Block() for _ in range(4)), nn.Linear(8, 2), caches

    def forward(self, x):
        cache = [] if self.caches else None
        for block in self.blocks:
            x = block(x, cache=cache)
        assert cache is None or len(cache) == len(self.blocks)
        return self.head(x)


def among_others(layer):
    return nn.Sequential(nn.Linear(8, 8), layer, nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 2))


def with_computed_weights():
    """torch's recurrent layers compute such weights anew or not, as they remember them from the call before."""
    model = Padded(nn.LSTM)
    nn.utils.parametrizations.weight_norm(model.rnn, "weight_hh_l0")
    return model


def convolutional():
    layers = []
    for index in range(6):
        layers += [nn.Conv2d(4 if index else 1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=index % 2 == 0)]
    return nn.Sequential(*layers, nn.Dropout2d(0.3), nn.Flatten(), nn.Linear(4 * 256, 2))


MODELS = {
    "convolutions": (convolutional, lambda: torch.randn(4, 1, 16, 16)),
    "lstm": (lambda: Padded(nn.LSTM, batch_first=True), lambda: torch.randn(4, 23, 6)),
    "gru": (lambda: Padded(nn.GRU), lambda: torch.randn(23, 4, 6)),
    "own": (Own, lambda: torch.randn(4, 8)),
    "shared": (Shared, lambda: torch.randn(4, 8)),
    "spectral norm": (lambda: among_others(nn.utils.spectral_norm(nn.Linear(8, 8))), lambda: torch.randn(4, 8)),
    "listed": (Listed, lambda: torch.randn(4, 8)),
    "caching": (lambda: Listed(caches=True), lambda: torch.randn(4, 8)),
    "echo": (lambda: among_others(Echo()), lambda: torch.randn(4, 8)),
}


def sides(name, recipe="checkpoint(0.4)"):
    """A workload and what the recipe makes of it, both ready to be trained; and the effect."""
    torch.manual_seed(0)
    build, inputs = MODELS[name]
    model = build()
    backend = backends.of(model)
    work = backend.bind(
        model,
        None,
        (inputs(),),
        mode="training",
        seed=0,
        loss=lambda out, y: (out - y).square().mean(),
        targets=torch.randn(4, 2),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    )
    applied = apply(chain_of(recipe), work)
    return backend, work, applied.works[-1], applied.steps[0].effect


@pytest.mark.parametrize("name", MODELS)
def test_gradients_losses_and_statistics_are_the_originals(name):
    """Bit for bit; a recurrent layer's gradients are added up piece by piece, so there to rounding over 23 steps."""
    backend, before, after, effect = sides(name)
    assert effect.touched
    found = []
    for work in (before, after):
        finished = backend.finish(work)
        backend.seed(3)
        losses = [float(finished.train_step((work.inputs, work.training.targets))) for _ in range(3)]
        gradients = [parameter.grad for parameter in work.model.parameters()]
        found.append((losses, gradients, list(work.model.buffers())))
    near = {"rtol": 23 * 2**-22, "atol": 1e-6} if name in ("lstm", "gru") else {"rtol": 0, "atol": 0}
    assert found[1][0] == pytest.approx(found[0][0], rel=near["rtol"], abs=0)
    torch.testing.assert_close(found[1][1:], found[0][1:], **near)


@pytest.mark.parametrize("name", ["convolutions", "lstm"])
def test_less_is_held(name):
    backend, before, after, _ = sides(name)
    peaks = [backend.tensor_peak(work, backend.finish(work)).value for work in (before, after)]
    assert peaks[1] < 0.75 * peaks[0]


@pytest.mark.parametrize("name", MODELS)
def test_it_stays_the_same_module_and_infers_as_before(name):
    _, before, after, _ = sides(name)
    original, result = before.model.eval(), after.model.eval()
    assert isinstance(result, type(original))
    assert list(result.state_dict()) == list(original.state_dict())
    with torch.no_grad():
        assert torch.equal(result(*before.inputs.args), original(*before.inputs.args))


@pytest.mark.parametrize(("name", "found"), [("listed", "blocks.{}"), ("caching", "blocks.{}.inner")])
def test_what_is_in_a_list_is_run_again_and_what_writes_to_a_cache_is_not(name, found):
    *_, effect = sides(name, "checkpoint(0.01)")
    assert {found.format(index) for index in range(3)} <= set(effect.touched)
    assert not any(each in effect.touched for each in ("blocks.0", "blocks.0.inner") if each != found.format(0))
    told = {item.name for item in effect.skipped if "such as a cache" in item.reason}
    assert told == ({f"blocks.{index}" for index in range(4)} if name == "caching" else set())


def test_what_changes_its_buffers_is_run_once(monkeypatch):
    monkeypatch.setitem(MODELS, "counts", (lambda: among_others(Counts()), lambda: torch.randn(4, 8)))
    backend, _, after, effect = sides("counts", "checkpoint(0.01)")
    assert [item.name for item in effect.skipped] == ["1"]
    assert "changes its buffers" in effect.skipped[0].reason
    backend.finish(after).train_step((after.inputs, after.training.targets))
    assert after.model[1].calls == 1


def test_recurrent_layers_with_computed_weights_are_run_once(monkeypatch):
    monkeypatch.setitem(MODELS, "computed", (with_computed_weights, lambda: torch.randn(23, 4, 6)))
    backend, _, after, effect = sides("computed")
    assert "rnn" in [item.name for item in effect.skipped]
    backend.finish(after).train_step((after.inputs, after.training.targets))


def test_a_sequence_shorter_than_the_pieces_runs_whole():
    _, _, after, _ = sides("lstm")
    assert after.model(torch.randn(4, 1, 6)).shape == (4, 2)


def test_a_budget_that_cannot_be_kept_is_said():
    *_, effect = sides("convolutions", "checkpoint(0.0001)")
    assert "cannot be kept: this is the least" in " ".join(effect.notes)


def counted_calls(monkeypatch, build, hooked, later=False):
    """How often a hook is called in one step, and the effect; the hook is there from the start, or comes in later."""
    calls = []

    def hook(module, given, output):
        calls.append(module)

    def with_hook():
        model = build()
        if not later:
            model.get_submodule(hooked).register_forward_hook(hook)
        return model

    monkeypatch.setitem(MODELS, "hooked", (with_hook, lambda: torch.randn(4, 8)))
    backend, _, after, effect = sides("hooked", "checkpoint(0.01)")
    if later:
        after.model.get_submodule(hooked).register_forward_hook(hook)
    finished = backend.finish(after)
    calls.clear()
    finished.train_step((after.inputs, after.training.targets))
    return len(calls), effect


@pytest.mark.parametrize("build", [lambda: among_others(nn.Tanh()), lambda: among_others(Own().first), Own])
def test_hooks_are_called_once(monkeypatch, build):
    names = [name for name, _ in build().named_modules()]
    for hooked in names:
        calls, effect = counted_calls(monkeypatch, build, hooked)
        assert calls == 1, hooked
        assert effect.touched


def test_a_hook_that_comes_later_is_called_once_and_that_is_said(monkeypatch):
    with pytest.warns(PerfkitWarning, match="Remove the hook"):
        assert counted_calls(monkeypatch, lambda: among_others(nn.Tanh()), "1", later=True)[0] == 1


def test_gradient_hooks_of_modules_are_called_once_and_what_torch_hooks_runs_again():
    backend, _, after, _ = sides("convolutions", "checkpoint(0.01)")
    calls = []
    after.model[3].register_full_backward_hook(lambda *_: calls.append(1))
    backend.finish(after).train_step((after.inputs, after.training.targets))
    assert calls == [1]
    layer = nn.utils.spectral_norm(nn.Linear(8, 8))
    assert layer._forward_pre_hooks
    assert not call_hooks(layer)
    layer.register_forward_pre_hook(functools.partial(lambda *_: None))
    assert len(call_hooks(layer)) == 1
