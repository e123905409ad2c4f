"""The recipe `fused_kernels` in PyTorch: what is swapped, what is not and why, and that nothing else changes."""

import copy

import pytest

pytest.importorskip("torch")

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from perfkit import reference
from perfkit._chain import chain_of
from perfkit._recipe_files import recipe_class
from perfkit._variant import apply
from perfkit._workload import Inputs, Training, Workload
from perfkit.backends import torch_fused_conv, torch_fused_group, torch_fused_rnn
from perfkit.backends.torch_backend import BACKEND
from perfkit.kernels import trace

SUMS = 1024
"""Above the number of terms in any sum here."""

TOLERANCE = {"rtol": SUMS**0.5 * 2**-23, "atol": SUMS**0.5 * 2**-23}
"""Sums in another order: each of n roundings moves a result by 2^-24 of it, sqrt(n) of them together; twice that."""


def swapped(model, inputs, *, trains=False, recipe="fused_kernels", **options):
    """The recipe applied to a copy, and its effect."""
    inputs = inputs if inputs is None or isinstance(inputs, tuple) else (inputs,)
    training = Training(None, None, torch.optim.SGD(model.parameters(), 0.1)) if trains else None
    mode = "training" if trains else "inference"
    work = Workload(BACKEND, model, inputs and Inputs(inputs), mode, "cpu", training)
    work = BACKEND.copy(work)
    work.model.train(trains)
    result, effect = recipe_class(recipe)(**options).torch(work)
    return result.model, effect


def reasons(effect):
    return {item.name: item.reason for item in effect.skipped}


def kernels_in(model, *inputs):
    """Which implementations a call of the model runs in."""
    with trace() as choices, torch.no_grad():
        model(*inputs)
    return [choice.implementation for choice in choices]


def assert_same(one, other):
    torch.testing.assert_close(one, other, **TOLERANCE)


class Net(nn.Module):
    """Layers that a subclass calls in a way of its own."""

    def __init__(self):
        super().__init__()
        self.conv, self.second = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3)
        self.norm, self.relu, self.pool = nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)
        self.inplace = nn.ReLU(inplace=True)
        with torch.no_grad():
            self.norm.running_mean.uniform_(-0.5, 0.5)
            self.norm.running_var.uniform_(0.5, 2)
            self.norm.weight.uniform_(0.5, 2)
            self.norm.bias.uniform_(-0.5, 0.5)


class Modules(Net):
    def forward(self, x):
        x = self.pool(self.relu(self.conv(x)))
        return self.relu(x.flatten(1) - 0.1)


class Statements(Net):
    def forward(self, x):
        x = self.conv(x)
        x = self.relu(x)
        return self.pool(x)


class Names(Net):
    def forward(self, x):
        convolved = self.conv(x)
        positive = F.relu(convolved)
        pooled = F.max_pool2d(positive, 2, stride=2)
        return pooled.sum(1)


class Functions(Net):
    def forward(self, x):
        return F.max_pool2d(F.relu(self.conv(x), inplace=True), kernel_size=(2, 2))


class TorchFunctions(Net):
    def forward(self, x):
        return torch.max_pool2d(torch.relu(self.conv(x)), 2)


class Methods(Net):
    def forward(self, x):
        return self.pool(self.conv(x).relu())


class MethodsInPlace(Net):
    def forward(self, x):
        return self.pool(self.conv(x).relu_())


class PoolFirst(Net):
    def forward(self, x):
        return self.inplace(self.pool(self.conv(x)))


class Normed(Net):
    def forward(self, x):
        return self.pool(self.relu(self.norm(self.conv(x))))


class Loop(Net):
    def forward(self, x):
        for conv in (self.conv, self.second):
            x = F.max_pool2d(F.relu(conv(x)), 2)
        return x


class Shared(Net):
    def forward(self, x):
        x = self.pool(self.relu(self.conv(x)))
        return self.pool(self.relu(self.second(self.pool(self.relu(self.second(x))))))


class Branches(Net):
    def forward(self, x, loud: bool = False):
        if self.training:
            x = x + 1
        x = self.pool(self.relu(self.conv(x)))
        return x * 2 if loud or x.sum() > 0 else x


class Outer(nn.Module):
    """Calls its parts with keywords, from a dict."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 3), nn.MaxPool2d(2)
        )

    def forward(self, *, batch):
        return {"features": self.features(batch["x"])}


WHOLE = "conv + ReLU + 2×2 max-pool"
SPELLINGS = [
    (Modules, {"conv": WHOLE}),
    (Statements, {"conv": WHOLE}),
    (Names, {"conv": WHOLE}),
    (Functions, {"conv": WHOLE}),
    (TorchFunctions, {"conv": WHOLE}),
    (Methods, {"conv": WHOLE}),
    (MethodsInPlace, {"conv": WHOLE}),
    (PoolFirst, {"conv": WHOLE}),
    (Normed, {"conv": "conv + batch norm + ReLU + 2×2 max-pool"}),
    (Loop, {"conv": WHOLE, "second": WHOLE}),
    (Shared, {"conv": WHOLE, "second": WHOLE}),
    (Branches, {"conv": WHOLE}),
]


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
    assert "no convolution" in effect.notes[0]


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


RECURRENT = [
    (nn.LSTM, {}),
    (nn.GRU, {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    (nn.RNN, {"nonlinearity": "relu", "bias": False}),
    (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
]


@pytest.mark.parametrize(("kind", "options"), RECURRENT)
def test_a_recurrent_layer_in_every_form_of_input(kind, options):
    torch.manual_seed(0)
    model = kind(5, 7, **options).eval()
    directions = model.num_layers * (2 if model.bidirectional else 1)
    padded = torch.randn(4, 6, 5)
    result, effect = swapped(model, padded)
    assert effect.touched == (kind.__name__,)
    assert type(result).__name__ == kind.__name__
    assert isinstance(result, kind)
    packed = pack_sequence([torch.randn(length, 5) for length in (3, 6, 1)], enforce_sorted=False)
    batch = padded.size(0 if model.batch_first else 1)

    def state(*shape):
        states = tuple(torch.randn(directions, *shape, 7) for _ in range(2))
        return states if kind is nn.LSTM else states[0]

    cases = [(padded, None), (padded, state(batch)), (packed, None), (packed, state(3)), (padded[0], None),
             (padded[0], state()), (padded.transpose(0, 1), None)]  # fmt: skip
    with torch.no_grad():
        for given, hx in cases:
            assert kernels_in(result, given, hx) == ["cpu"]
            assert_same(result(given, hx), model(given, hx))
        assert_same(result(padded, hx=state(batch))[0].shape, model(padded)[0].shape)
    wide = copy.deepcopy(result).double()
    assert_same(wide(padded.double())[0], copy.deepcopy(model).double()(padded.double())[0])
    for wrong in (padded[..., :3], padded[None], torch.ones(2, 2, 5, dtype=torch.int64)):
        with pytest.raises((ValueError, RuntimeError)):
            result(wrong)


def test_weights_are_read_at_each_call():
    torch.manual_seed(0)
    model, x = nn.LSTM(5, 7), torch.randn(4, 6, 5)
    result, _ = swapped(model, x)
    other = nn.LSTM(5, 7)
    result.load_state_dict(other.state_dict())
    assert_same(result(x), other(x))
    with torch.no_grad():
        result.weight_hh_l0.zero_()
        other.weight_hh_l0.zero_()
    assert_same(result(x), other(x))
    assert_same(copy.deepcopy(result)(x), other(x))
    third = nn.LSTM(5, 7)
    assert_same(torch.func.functional_call(result, dict(third.named_parameters()), (x,)), third(x))


def test_dropout_between_layers_only_in_training():
    torch.manual_seed(0)
    model, x = nn.LSTM(5, 7, num_layers=2, dropout=0.5), torch.randn(4, 6, 5)
    result, _ = swapped(model, x)
    result.train()
    assert not torch.equal(result(x)[0], result(x)[0])
    assert_same(result.eval()(x), model.eval()(x))


class OwnForward(nn.LSTM):
    def forward(self, x, hx=None):
        return super().forward(x * 2, hx)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_reasons_why_a_recurrent_layer_stays():
    x = torch.randn(4, 6, 5)
    parametrized = nn.LSTM(5, 7)
    torch.nn.utils.parametrizations.orthogonal(parametrized, "weight_hh_l0")
    cases = {
        OwnForward(5, 7): "forward of its own",
        nn.LSTM(5, 7, proj_size=3): "proj_size=3",
        parametrized: "parametrization",
        nn.LSTM(5, 7).double(): "float64",
    }
    for model, reason in cases.items():
        given = x.double() if "64" in reason else x
        result, effect = swapped(nn.Sequential(model).eval(), given)
        assert reason in reasons(effect)["0"]
        assert_same(result(given), model.eval()(given))


def test_what_the_library_would_run_is_not_swapped(monkeypatch):
    monkeypatch.setattr("perfkit.kernels._native.find_compiler", lambda: None)
    from perfkit.kernels import _op

    _op._choose.cache_clear()
    _, effect = swapped(nn.LSTM(6, 9), torch.randn(3, 2, 6))
    _op._choose.cache_clear()
    assert not effect.touched
    assert "library" in reasons(effect)["LSTM"]
    assert "compiler" in reasons(effect)["LSTM"]


def test_without_inputs_everything_that_could_be_is_swapped():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten())
    _, effect = swapped(model, None)
    assert effect.touched == ("0",)
    assert "not known" in effect.notes[0]
    _, effect = swapped(nn.GRU(2, 3), None)
    assert effect.touched == ("GRU",)


def small(name):
    """A reference model's task, and eight rows of its examples."""
    task = reference.task(name)
    inputs = task.example_inputs if isinstance(task.example_inputs, tuple) else (task.example_inputs,)
    rows = 1 if name in ("lstm", "rnn") else 0  # where they are
    return task, tuple(each.narrow(rows, 0, 8) for each in inputs), task.targets[:8]


def workload(model, inputs, training=None):
    mode = "training" if training else "inference"
    return BACKEND.copy(Workload(BACKEND, model.train(bool(training)), Inputs(inputs), mode, "cpu", training))


@pytest.mark.parametrize("name", ["cnn", "cnn2", "lstm", "rnn", "text_lstm"])
def test_training_the_reference_models_gives_the_same_gradients_and_losses(name):
    task, inputs, targets = small(name)
    result, effect = swapped(task.model, inputs, trains=True)
    assert effect.touched
    assert all("is the library's here" in item.reason for item in effect.skipped)
    gradients = []
    for each in (task.model.train(), result):
        each.zero_grad()
        loss = task.loss(each(*inputs), targets)
        loss.backward()
        gradients.append((loss, [parameter.grad for parameter in each.parameters()]))
    assert_same(gradients[1][0], gradients[0][0])
    for new, old in zip(gradients[1][1], gradients[0][1], strict=True):
        # sums over the batch, the steps and the pixels: relative to the largest entry
        torch.testing.assert_close(new, old, rtol=0, atol=float(old.abs().max()) * 4 * TOLERANCE["rtol"])
    optimizer = torch.optim.SGD(task.model.parameters(), 1e-2)  # not Adam, which makes steps of roundings
    work = workload(task.model, inputs, Training(task.loss, targets, optimizer))
    done = apply(chain_of("fused_kernels"), work)
    curves = [BACKEND.losses(each, BACKEND.finish(each), 10, 0) for each in (work, done.works[-1])]
    assert curves[0][-1] != curves[0][0]
    assert curves[1] == pytest.approx(curves[0], rel=10 * TOLERANCE["rtol"])


CHAINS = [
    ("bf16+fused_kernels", "cnn", ("conv1",)),
    ("bf16+fused_kernels", "lstm", ("lstm",)),
    ("half+fused_kernels", "text_lstm", ("lstm",)),
    ("channels_last+fused_kernels", "cnn", ("conv1",)),
    ("int8+fused_kernels", "lstm", ()),
    ("int8+fused_kernels", "cnn", ("conv1",)),
    ("int8_weight_only+fused_kernels", "cnn", ("conv1",)),
]


@pytest.mark.parametrize(("chain", "name", "touched"), CHAINS)
def test_chains(chain, name, touched):
    """What earlier steps put around a forward stays around it, and layers that they changed stay theirs."""
    _, inputs, _ = small(name)
    model = reference.load(name)[0].eval()
    chain = chain_of(chain)
    done = apply(chain, workload(model, inputs))
    effect = done.steps[-1].effect
    linear = [name for name in effect.touched if isinstance(model.get_submodule(name), nn.Linear)]
    assert tuple(name for name in effect.touched if name not in linear) == touched
    if not touched:
        assert "forward of its own" in effect.skipped[0].reason
    result = done.works[-1].model
    along = sum("by one call with the layer before it" in note for note in effect.notes)
    assert kernels_in(result, *inputs).count("cpu") == len(effect.touched) - along
    with torch.no_grad():
        new, old = result(*inputs), model(*inputs)
    assert new.dtype == old.dtype
    assert float((new - old).norm() / old.norm()) < chain.tolerance + TOLERANCE["rtol"]


def test_a_convolution_on_integer_weights_keeps_them_and_the_grid_of_its_pool():
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


def test_bf16_reaches_the_kernels():
    _, inputs, _ = small("lstm")
    done = apply(chain_of("bf16+fused_kernels"), workload(reference.load("lstm")[0].eval(), inputs))
    seen, run = [], torch_fused_rnn.run

    def noted(*args):
        y, hn, cn = run(*args)
        seen.append(y.dtype)
        return y, hn, cn

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch_fused_rnn, "run", noted)
        done.works[-1].model(*inputs)
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize("name", ["cnn", "lstm"])
def test_compiled_whole(name):
    _, inputs, _ = small(name)
    model = reference.load(name)[0].eval()
    done = apply(chain_of("fused_kernels+compile(fullgraph=True)"), workload(model, inputs))
    with BACKEND.watching_compiles() as log:
        result = done.works[-1].model(*inputs)
    assert (log().graphs, log().breaks) == (1, ())
    assert not torch._dynamo.config.allow_rnn, "the setting is torch's"
    assert_same(result, model(*inputs))
    other = nn.LSTM(3, 4)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="LSTM"):
        torch.compile(other, fullgraph=True, backend="eager")(torch.ones(2, 1, 3))


def test_a_group_is_what_the_user_wrote():
    """Links are called in their order, with their arguments, whatever they are."""
    links = ((torch.add, (1,), {"alpha": 2}), torch.neg, nn.Identity())
    assert torch_fused_group.group(links, torch.tensor(3.0)) == -1


def test_auto_may_try_it():
    from perfkit._search import sensible

    model, inputs = reference.load("lstm")
    chains, left_out = sensible(Workload(BACKEND, model.eval(), Inputs(inputs), "inference", "cpu"))
    assert any("fused_kernels" in str(chain) for chain in chains)
    chains, left_out = sensible(
        Workload(BACKEND, nn.Linear(3, 2).eval(), Inputs((torch.ones(1, 3),)), "inference", "cpu")
    )
    assert "fused_kernels" in [item.recipe for item in left_out]


class Head(nn.Module):
    """Linear layers with and without a ReLU behind them."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(160, 130), nn.Linear(130, 140), nn.Linear(140, 150, bias=False)
        self.relu = nn.ReLU()

    def forward(self, x):
        x = self.relu(self.first(x))
        x = F.relu(self.second(x))
        return self.third(x)


def linear_kernels_everywhere(monkeypatch):
    """The kernel of linear layers takes whatever it can, on any CPU."""
    from perfkit.kernels import _op
    from perfkit.kernels.linear import cpu_shape, torch_call

    monkeypatch.setattr(cpu_shape, "slower", lambda _problem: None)
    monkeypatch.setattr(torch_call, "_known", {})
    _op._choose.cache_clear()


@pytest.mark.parametrize("of_sequential", [False, True])
def test_linear_layers_with_relu(monkeypatch, of_sequential):
    """What changes after the swap is seen: written and replaced weights, hooks, gradients, another dtype."""
    linear_kernels_everywhere(monkeypatch)
    torch.manual_seed(0)
    model, x = Head().eval(), torch.randn(3, 160)
    names = ["first", "second", "third"]
    if of_sequential:
        model = nn.Sequential(model.first, nn.ReLU(), model.second, nn.ReLU(), model.third).eval()
        names = ["0", "2", "4"]
    result, effect = swapped(model, x)
    assert effect.touched == tuple(names)
    assert kernels_in(result, x) == ["cpu"] * 3
    first, second, third = (result.get_submodule(name) for name in names)
    with torch.no_grad():
        assert_same(result(x), model(x))
        for part in (result, model):
            part.get_submodule(names[0]).weight.mul_(0.5)
            part.get_submodule(names[1]).bias = nn.Parameter(torch.ones(140))
            part.get_submodule(names[2]).weight.data = torch.ones(150, 140)
        assert_same(result(x), model(x))
    seen = []
    hook = first.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.no_grad():
        assert_same(result(x), model(x))
    assert float(seen[0].min()) < 0, "it is shown what the layer makes, before ReLU"
    hook.remove()
    result(x).sum().backward()
    model(x).sum().backward()
    for new, old in zip(result.parameters(), model.parameters(), strict=True):
        assert_same(new.grad, old.grad)
    assert not [each for each in kernels_in_training(result, x) if each == "cpu"]
    with torch.no_grad():
        half, expected = result.bfloat16()(x.bfloat16()), model.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    # each layer's output is rounded, and so may differ by a place of bfloat16
    assert float((half - expected).norm() / expected.norm()) < 3 * torch.finfo(torch.bfloat16).eps
    assert all(isinstance(layer, nn.Linear) for layer in (first, second, third))


def kernels_in_training(model, *inputs):
    with trace() as choices:
        model(*inputs)
    return [choice.implementation for choice in choices]


def test_linear_layers_that_are_not_touched(monkeypatch):
    _, effect = swapped(nn.Linear(2, 2), torch.randn(1, 2))
    assert "too little work" in reasons(effect)["Linear"]
    linear_kernels_everywhere(monkeypatch)
    _, effect = swapped(Head(), torch.randn(3, 160), trains=True)
    assert effect.status == "NO_EFFECT"

    class Own(nn.Linear):
        def forward(self, input):
            return super().forward(input) + 1

    model, x = nn.Sequential(Own(160, 130), nn.ReLU()), torch.randn(3, 160)
    result, effect = swapped(model, x)
    assert "a forward of its own" in reasons(effect)["0"]
    assert_same(result(x), model(x))


def test_linear_layers_under_autocast_and_compiled(monkeypatch):
    """There torch computes: its casts, and the compiler's own product."""
    linear_kernels_everywhere(monkeypatch)
    model, x = Head().eval(), torch.randn(3, 160)
    _, effect = swapped_after_bf16(model, x)
    assert not effect.touched
    result, _ = swapped(model, x)
    compiled = torch.compile(result, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert_same(compiled(x), model(x))


def swapped_after_bf16(model, x):
    done = apply(chain_of("bf16+fused_kernels"), workload(model, (x,)))
    return done.works[-1].model, done.steps[-1].effect
