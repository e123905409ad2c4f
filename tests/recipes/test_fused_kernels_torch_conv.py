"""The recipe `fused_kernels` on torch convolutions: what is swapped, what is not and why; what changes after it."""

import copy

import pytest

pytest.importorskip("torch")

import torch
import torch.nn.functional as F
from conv_spellings import SPELLINGS, Modules, Net, Normed
from fused_torch import TOLERANCE, assert_same, kernels_in, reasons, small, swapped, workload
from torch import nn

from perfkit import reference
from perfkit._chain import chain_of
from perfkit._variant import apply
from perfkit._workload import Inputs, Workload
from perfkit.backends import torch_fused_conv, torch_fused_group, torch_fused_int8
from perfkit.backends.torch_backend import BACKEND
from perfkit.quantization import torch_onednn


@pytest.mark.parametrize(("kind", "expected"), SPELLINGS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_convolution_with_what_follows_it(kind, expected):
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(3, 1, 30, 29)
    result, effect = swapped(model, x)
    notes = dict(note.split(": ", 1) for note in effect.notes)
    assert {name: notes[name].split(" on ")[0] for name in effect.touched} == expected
    assert isinstance(result, kind)
    assert result.state_dict().keys() == model.state_dict().keys()
    assert set(kernels_in(result, x)) == {"cpu"}
    with torch.no_grad():
        assert_same(result(x), model(x))
    assert not kernels_in(model, x), "the original is as it was"


class UsedTwice(Net):
    def forward(self, x):
        convolved = self.conv(x)
        return self.relu(convolved) + convolved.mean()


class Returned(Net):
    def forward(self, x):
        x = self.conv(x)
        y = self.relu(x)
        return self.pool(y), x


class PositiveReturned(Net):
    def forward(self, x):
        x = self.relu(self.conv(x))
        return self.pool(x), x


class Elsewhere(Net):
    def forward(self, x):
        return self.second(self.conv(x))


class Padded(Net):
    def forward(self, x):
        return F.max_pool2d(self.conv(x), 3, 2, 1)


class Handled(Net):
    def forward(self, x):
        try:
            x = self.conv(x)
            x = self.relu(x)
        except RuntimeError:
            return x
        return x


def test_a_value_that_something_else_reads_is_still_there():
    torch.manual_seed(0)
    x = torch.randn(3, 1, 30, 29)
    alone, without_pool = "directly follows it in", "conv + ReLU is the library's here"
    before_rows = "nothing that follows it runs in the kernel"
    for kind, reason in {
        UsedTwice: alone, Returned: alone, Elsewhere: before_rows, Handled: alone, PositiveReturned: without_pool
    }.items():  # fmt: skip
        model = kind().eval()
        result, effect = swapped(model, x)
        assert reason in reasons(effect)["conv"], kind
        torch.testing.assert_close(result(x), model(x), rtol=0, atol=0)
        without, effect = swapped(model, None)  # where nothing was seen, more is swapped
        assert bool(effect.touched) == (kind in (Elsewhere, PositiveReturned))
        torch.testing.assert_close(without(x), model(x), **TOLERANCE)


def test_reasons_why_a_convolution_stays():
    torch.manual_seed(0)
    x = torch.randn(3, 1, 30, 29)
    _, effect = swapped(Padded().eval(), x)
    assert "overlaps, pads" in reasons(effect)["conv"]
    assert "not called" in reasons(effect)["second"]
    model = Modules().eval()
    model.conv.register_forward_hook(lambda *_: None)
    _, effect = swapped(model, x)
    assert "has hooks" in reasons(effect)["conv"]
    _, effect = swapped(Modules().eval(), x, exclude=("conv",))
    assert "include/exclude" in reasons(effect)["conv"]
    _, effect = swapped(Normed(), x, trains=True)
    assert "batch's own statistics" in reasons(effect)["conv"]
    reflecting = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), nn.ReLU())
    _, effect = swapped(reflecting, x)
    assert "padding_mode='reflect'" in reasons(effect)["0"]
    _, effect = swapped(nn.Identity(), torch.randn(1, 2))
    assert effect.status == "NO_EFFECT"
    assert "none of the layers that the kernels are for" in effect.notes[0]


def test_a_forward_without_source_is_left_alone():
    space = {"Net": Net}
    exec("class Hidden(Net):\n    def forward(self, x):\n        return self.relu(self.conv(x))", space)
    model, x = space["Hidden"]().eval(), torch.randn(2, 1, 9, 9)
    result, effect = swapped(model, x)
    assert "Hidden.forward: the source" in reasons(effect)["conv"]
    assert_same(result(x), model(x))


def test_a_source_that_is_not_what_runs_is_left_alone():
    class Changed(Net):
        def forward(self, x):
            return self.relu(self.conv(x))

    Changed.forward.__code__ = Changed.forward.__code__.replace(co_consts=("another",))
    _, effect = swapped(Changed().eval(), torch.randn(2, 1, 9, 9))
    assert "is not the code that runs" in reasons(effect)["conv"]


class Outer(nn.Module):
    """Calls its parts with keywords, from a dict."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 3), nn.MaxPool2d(2)
        )

    def forward(self, *, batch):
        return {"features": self.features(batch["x"])}


def test_sequential_and_keyword_inputs():
    torch.manual_seed(0)
    model = Outer().eval()
    given = {"x": torch.randn(2, 1, 12, 12)}
    work = BACKEND.copy(Workload(BACKEND, model, Inputs((), {"batch": given}), "inference", "cpu"))
    done = apply(chain_of("fused_kernels"), work)
    assert done.steps[0].effect.touched == ("features.0", "features.4")
    with torch.no_grad():
        assert_same(done.works[0].model(batch=given), model(batch=given))


def test_what_changes_after_the_swap_is_seen():
    """A group looks at what it is given each time: hooks, replaced modules, norms that train again, written weights."""
    torch.manual_seed(0)
    x = torch.randn(3, 1, 30, 29)
    model = Normed().eval()
    result, _ = swapped(model, x)
    with torch.no_grad():
        for each in (result, model):
            each(x)
            each.conv.weight.mul_(2)
            each.norm.running_mean.add_(1)
        assert_same(result(x), model(x))
        other = copy.deepcopy(model)
        other.conv.weight.neg_()
        for each in (result, model):
            each.load_state_dict(other.state_dict())
        assert_same(result(x), other(x))
        for each in (result, model):
            each.relu = nn.GELU()
        assert_same(result(x), model(x))
        assert_same(copy.deepcopy(result)(x), model(x))
    seen = []
    result.relu = nn.ReLU()
    handle = result.conv.register_forward_hook(lambda _module, _args, y: seen.append(tuple(y.shape)))
    assert not kernels_in(result, x)
    assert seen == [(3, 8, 28, 27)]
    handle.remove()
    assert kernels_in(result, x) == ["cpu"]

    def watching(_module, _args, y):
        seen.append("somewhere")

    for watches in (False, True):  # a hook on all modules, which wants every output or only to know where it is
        setattr(watching, torch_fused_conv.WATCHES, watches)
        handle = nn.modules.module.register_module_forward_hook(watching)
        assert kernels_in(result, x) == (["cpu"] if watches else [])
        handle.remove()
    result.train()
    assert not kernels_in(result, x)
    result.eval().double()
    assert result(x.double()).dtype == torch.float64


def test_a_folded_norm_passes_gradients_on():
    torch.manual_seed(0)
    x = torch.randn(3, 1, 30, 29)
    model = Normed().eval()
    result, _ = swapped(model, x)
    gradients = []
    for each in (model, result):
        each(x).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in each.named_parameters()})
    assert gradients[1]["norm.weight"] is not None
    for name, gradient in gradients[0].items():
        assert (gradient is None) == (gradients[1][name] is None)
        if gradient is not None:
            scale = float(gradient.abs().max())
            torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=scale * TOLERANCE["rtol"])


def test_a_convolution_on_integer_weights_keeps_them_and_the_grid_of_its_pool(monkeypatch):
    """Where no kernel for integers takes it."""
    monkeypatch.setattr(torch_fused_int8, "reading", lambda *_: None)
    monkeypatch.setattr(torch_onednn, "missing", lambda: "no oneDNN")  # with it the layer after the pool rounds
    _, inputs, _ = small("cnn")
    before = apply(chain_of("int8"), workload(reference.load("cnn")[0].eval(), inputs)).works[-1].model
    work = workload(reference.load("cnn")[0].eval(), inputs)
    model = apply(chain_of("int8+fused_kernels"), work).works[-1].model
    pooled, integers = [], {}
    for each in (before, model):
        each.fc1.register_forward_pre_hook(lambda _, args: pooled.append(args[0]))
        with torch.no_grad():
            each(*inputs)
        integers[each] = each.conv1.weight_int8
    assert torch.equal(*integers.values())
    grid = model.fc1.input_grid
    assert torch.equal(pooled[1], grid.rounded(pooled[1]))
    # The convolution's own input is no longer rounded: half a step of it, times the weights that meet it.
    weight = model.conv1.weight.abs().flatten(1).sum(1).max()
    most = float(before.conv1.input_grid.scale / 2 * weight) + grid.scale
    assert 0 < float((pooled[1] - pooled[0]).abs().max()) <= most


def test_a_group_is_what_the_user_wrote():
    """Links are called in their order, with their arguments, whatever they are."""
    links = ((torch.add, (1,), {"alpha": 2}), torch.neg, nn.Identity())
    assert torch_fused_group.group(links, torch.tensor(3.0)) == -1
