"""Removing units of torch models: what is left computes what the original does with those units at zero."""

import warnings

import pytest

pytest.importorskip("torch")

import torch
from prune_torch_models import bound, cases, outputs, pruned, silenced
from sample_models import torch_models
from torch import nn

import perfkit
from perfkit import InvalidInputError, UnsupportedError
from perfkit.backends import backend
from perfkit.pruning.amounts import kept
from perfkit.recipes.prune import Prune

pytestmark = pytest.mark.usefixtures("hasty")


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


def test_complex_units_are_ranked_and_checked_by_both_parts():
    """By their real parts alone others would go: those are largest where the whole is smallest."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, dtype=torch.cfloat), nn.Tanh(), nn.Linear(8, 3, dtype=torch.cfloat))
    sizes = torch.arange(1, 9)[:, None]
    with torch.no_grad():
        model[0].weight.copy_(torch.complex(0.1 / sizes, 0.1 * sizes).expand(8, 6))
    x = torch.randn(4, 6, dtype=torch.cfloat)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "Casting complex values to real discards the imaginary part"
        warnings.simplefilter("ignore", perfkit.PerfkitWarning)  # that it is slower, by chance
        result = perfkit.optimize(model, "prune(round_to=1)", example_inputs=(x,), tolerance=10.0)
    torch.testing.assert_close(result.model[0].weight, model[0].weight[4:])
    with torch.no_grad():
        model[0].weight[:4], model[0].bias[:4] = 0, 0
    torch.testing.assert_close(result.model(x), model(x))


class Regularized(nn.Sequential):
    """Hands out a weight beside its output."""

    def forward(self, x):
        return super().forward(x), self[2].bias


def test_a_weight_among_the_outputs_is_compared_without_a_warning():
    model = Regularized(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "Converting a tensor with requires_grad=True to a scalar"
        warnings.simplefilter("ignore", perfkit.PerfkitWarning)  # that it is slower, by chance
        result = perfkit.optimize(model, "prune", example_inputs=(torch.randn(4, 6),), tolerance=10.0)
    assert result.model[0].out_features == 4
