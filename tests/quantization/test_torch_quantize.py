"""Quantized torch models: what they keep in memory, which layers are chosen, and what the caller is told."""

import copy
import io

import pytest

pytest.importorskip("torch")

import torch
from sample_models import arguments, torch_models, training
from torch import nn

import perfkit
from perfkit import InvalidInputError
from perfkit._report import Effect
from perfkit.backends.adapter import CompileLog
from perfkit.quantization import torch_onednn, torch_quantize
from perfkit.quantization.torch_fold import fold_norms
from perfkit.recipes.int4_weight_only import Int4WeightOnly
from perfkit.recipes.int8 import Int8

pytestmark = pytest.mark.usefixtures("hasty")
QUANTIZERS = ("int8", "int8_dynamic", "int8_weight_only", "int4_weight_only")


def optimized(recipe, model, inputs, **options):
    return perfkit.optimize(model, recipe, example_inputs=inputs, **options).report


def steps(report):
    return report.steps[0].effect


@pytest.mark.parametrize("name", torch_models())
@pytest.mark.parametrize("recipe", QUANTIZERS)
def test_every_model_is_quantized_or_said_why_not(name, recipe):
    given = arguments("torch", name)
    report = perfkit.optimize(**given, recipe=recipe).report
    effect = steps(report)
    held = {
        name or type(given["model"]).__name__
        for name, module in given["model"].named_modules()
        if list(module.parameters(recurse=False))
    }
    folded = {note.split()[0] for note in effect.notes if "is folded into" in note}
    assert held == {*effect.touched, *(item.name for item in effect.skipped), *folded}
    assert report.fidelity.ok


def test_a_module_used_twice_and_a_view_after_a_convolution():
    report = optimized("int8", *arguments("torch", "cnn").values())
    assert set(steps(report).touched) == {"conv", "fc"}
    assert "norm is folded into conv" in steps(report).notes


def test_memory_and_state_dict_are_a_quarter():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(500, 128), nn.Flatten(), nn.Linear(1280, 256), nn.ReLU(), nn.Linear(256, 10))
    result = perfkit.optimize(model, "int8", example_inputs=(torch.randint(0, 500, (16, 10)),))
    assert result.report.before.model_bytes / result.report.after.model_bytes > 3.5
    saved = {name: io.BytesIO() for name in ("before", "after")}
    torch.save(model.state_dict(), saved["before"])
    torch.save(result.model.state_dict(), saved["after"])
    assert saved["before"].tell() / saved["after"].tell() > 3.5


def test_state_is_saved_loaded_and_copied_with_its_grids():
    x = torch.randn(16, 8)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    one = perfkit.optimize(model, "int8", example_inputs=(x,)).model
    other = perfkit.optimize(copy.deepcopy(model), "int8", example_inputs=(3 * x,)).model
    assert not torch.equal(one(x), other(x))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(x), other(x))
    assert torch.equal(copy.deepcopy(one)(x), one(x))


def test_norms_are_folded_only_where_nothing_else_takes_the_convolution():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)
            self.after, self.last = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)
            self.norm.running_mean.fill_(1.0)
            self.last.running_var.fill_(4.0)

        def forward(self, x):
            y = self.conv(x)
            return self.last(self.after(y + self.norm(y)))

    model, x = Both().eval(), torch.randn(2, 1, 9, 9)
    work = perfkit.backends.of(model).bind(
        model, None, (x,), mode="inference", loss=None, targets=None, optimizer=None, seed=0
    )
    folded = fold_norms(work, {"conv": work.model.conv, "after": work.model.after})
    assert folded == {"last": "after"}
    torch.testing.assert_close(work.model(x), model(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(work.model.conv.weight, model.conv.weight)


class Conv1D(nn.Module):
    """As transformers has it, for GPT-2: a linear layer with its weight the other way round."""

    __module__ = "transformers.pytorch_utils"

    def __init__(self, outputs, inputs):
        super().__init__()
        self.nf, self.bias = outputs, nn.Parameter(torch.ones(outputs))
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


@pytest.mark.parametrize("recipe", [*QUANTIZERS, "int8(exclude='2')"])
def test_linear_layers_of_gpt2(recipe):
    torch.manual_seed(0)
    shared = Conv1D(32, 64)
    model, x = nn.Sequential(shared, nn.ReLU(), Conv1D(64, 32), shared), torch.randn(2, 3, 64)
    saved = copy.deepcopy(model.state_dict())
    result = perfkit.apply(model, recipe, example_inputs=(x,))
    assert steps(result.report).touched == (("0",) if "exclude" in recipe else ("0", "2"))
    assert result.model[0] is result.model[3]
    with torch.no_grad():
        exact, y = model(x), result.model(x)
    assert float((y - exact).norm() / exact.norm()) < (Int4WeightOnly if "int4" in recipe else Int8).tolerance
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.warns(perfkit.PerfkitWarning, match="it is the whole model"):
        perfkit.apply(Conv1D(4, 4), "int8", example_inputs=(torch.randn(2, 4),))


class NormAndAct(nn.BatchNorm2d):
    """A batch norm with an activation in it, as timm has it."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.SiLU()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


def test_of_a_norm_with_an_activation_the_activation_stays():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), NormAndAct(8), nn.Conv2d(8, 4, 1)), torch.randn(2, 3, 9, 9)
    model(x)
    result = perfkit.apply(model.eval(), "int8", example_inputs=(x,))
    assert "1 is folded into 0" in steps(result.report).notes
    assert type(result.model[1]) is nn.SiLU
    with torch.no_grad():
        exact, y = model(x), result.model(x)
    assert float((y - exact).norm() / exact.norm()) < Int8.tolerance


def test_depthwise_convolutions_stay_in_floats_unless_they_are_asked_for():
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8)),
        torch.randn(2, 3, 9, 9),
    )
    effect = steps(perfkit.apply(model, "int8", example_inputs=(x,)).report)
    assert effect.touched == ("0",)
    assert ["floats are faster" in item.reason for item in effect.skipped if item.name == "1"] == [True]
    assert "2 is folded into 1" in effect.notes
    asked = steps(perfkit.apply(model, "int8(include='*')", example_inputs=(x,)).report)
    assert asked.touched == ("0", "1")


def test_integer_kernels_come_with_compile_and_without_it_from_onednn_or_it_is_said_to_be_simulated(monkeypatch):
    given = arguments("torch", "cnn")
    assert not steps(perfkit.apply(**given, recipe="int8").report).simulated
    monkeypatch.setattr(torch_onednn, "missing", lambda: "no oneDNN")
    alone = steps(perfkit.optimize(**given, recipe="int8").report)
    assert alone.simulated
    assert any("'+compile' makes integer kernels" in note for note in alone.notes)
    monkeypatch.undo()
    compiled = perfkit.optimize(**given, recipe="int8+compile").report
    assert not steps(compiled).simulated
    made = {"the compiler made 2 integer kernels", "compiled, 2 layers are 2 call(s) of perfkit's integer kernels"}
    assert made & set(steps(compiled).notes), "the first with AMX's tiles"
    assert compiled.fidelity.ok


def test_a_compiler_that_makes_no_integer_kernels_is_told_of():
    told = Int8().observed(Effect(("conv",), simulated=True), CompileLog(graphs=1))
    assert told.simulated
    assert any("the compiler made integer kernels of none" in note for note in told.notes)
    assert not any("+compile" in note for note in told.notes)


class Force(nn.Module):
    """A gradient in the forward."""

    def __init__(self):
        super().__init__()
        self.inner, self.energy = nn.Linear(4, 16), nn.Linear(16, 1)

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.energy(torch.tanh(self.inner(x))).sum(), x)[0]


@pytest.mark.parametrize("recipe", ["int8", "int8_dynamic", "int8_weight_only"])
def test_gradients_in_the_forward_are_told_of(recipe):
    with pytest.raises(perfkit.UnsupportedError, match=r"Force computes gradients in its forward .* with exclude="):
        perfkit.apply(Force(), recipe, example_inputs=(torch.randn(32, 4),))


def test_integer_kernels_take_other_batch_sizes():
    model, (x,) = arguments("torch", "cnn").values()
    result = perfkit.optimize(model, "int8+compile", example_inputs=(x,))
    with torch.no_grad():
        for rows in (1, 3, 4, 9):
            other = torch.randn(rows, *x.shape[1:])
            exact = model.eval()(other)
            assert (result.model(other) - exact).norm() / exact.norm() < 0.05


def test_include_exclude_and_a_pattern_that_matches_nothing():
    given = arguments("torch", "resnet")
    report = perfkit.optimize(**given, recipe=Int8(include="first.*", exclude=["first.3"])).report
    assert steps(report).touched == ("first.0",)
    assert {item.reason for item in steps(report).skipped if item.name in ("first.3", "stem")} == {"excluded"}
    with pytest.raises(InvalidInputError, match=r"include='frist\.\*' matches no layer.*did you mean"):
        perfkit.optimize(**given, recipe="int8(include='frist.*')")
    with pytest.raises(InvalidInputError, match="exclude=3"):
        Int8(exclude=3)


def test_layers_whose_weight_is_read_and_never_called():
    effect = steps(optimized("int8", *arguments("torch", "transformer").values()))
    assert "layers.0.linear1" in effect.touched, "not bypassed by the encoder layer's fast path"
    assert any(item.name == "layers.0.self_attn.out_proj" for item in effect.skipped)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], "empty"),
        (iter(()), "empty"),
        ([torch.randn(3, 4)], "3 sample"),
        ("data.csv", "a str"),
        (17, "an? int"),
        ([torch.randn(32, 5)], "calibration batch 1"),
    ],
)
def test_calibration_that_cannot_be_used(calibration, message):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(InvalidInputError, match=message):
        perfkit.optimize(model, "int8", example_inputs=(torch.randn(2, 4),), calibration=calibration)


def test_calibration_data_is_used_and_said():
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    alone = steps(optimized("int8", model, (x,)))
    assert any("the example inputs alone" in note for note in alone.notes)
    given = steps(optimized("int8", model, (x,), calibration=[x + i for i in range(10)]))
    assert "ranges read from 20 samples" in given.notes
    without_inputs = perfkit.optimize(model, "int8", calibration=[torch.randn(16, 4)]).report
    assert without_inputs.not_measured
    assert perfkit.plan(model, "int8").steps[0].refusal


def test_trained_rounding_is_kept_by_the_integer_model():
    given = training("torch")
    result = perfkit.optimize(**given, recipe="qat(weight_bits=4)", mode="training")
    batch = given["example_inputs"], given["targets"]
    losses = [float(result.train_step(batch)) for _ in range(40)]
    assert losses[-1] < losses[0] / 5
    trained = result.model.eval()
    converted = perfkit.optimize(trained, "int8(weight_bits=4)", example_inputs=batch[0], tolerance=1e-5)
    assert set(steps(converted.report).touched) == {"0", "4"}
    with torch.no_grad():
        torch.testing.assert_close(converted.model(*batch[0]), trained(*batch[0]))
    plain = perfkit.optimize(given["model"], "int8(weight_bits=4)", example_inputs=batch[0], tolerance=1.0)
    assert plain.report.fidelity.relative_error > 1e-3, "which rounding afterwards does not reach"


def test_a_teacher_pulls_the_training_towards_its_outputs():
    given = training("torch")
    result = perfkit.optimize(**given, recipe="qat(weight_bits=2, distill=True)", mode="training")
    inputs = given["example_inputs"]
    model, original = result.model, given["model"].eval()

    def distance():
        with torch.no_grad():
            return float((model.eval()(*inputs) - original(*inputs)).norm())

    before = distance()
    # Labels that say the opposite: without a teacher the outputs would leave the original's.
    for _ in range(40):
        model.train()
        result.train_step((inputs, given["targets"]))
    with_teacher = distance()
    alone = perfkit.optimize(**given, recipe="qat(weight_bits=2)", mode="training")
    model = alone.model
    for _ in range(40):
        model.train()
        alone.train_step((inputs, given["targets"]))
    assert with_teacher < distance()
    assert before > 0


def test_the_way_through_torchao_touches_the_chosen_layers():
    pytest.importorskip("torchao")
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval(), torch.randn(4, 64)
    work = perfkit.backends.of(model).bind(
        model, None, (x,), mode="inference", loss=None, targets=None, optimizer=None, seed=0
    )
    work, effect = torch_quantize._int8_by_torchao(work, Int8(exclude="2"))
    assert effect.touched == ("0",)
    assert type(work.model[0].weight) is not nn.Parameter
    assert type(work.model[2].weight) is nn.Parameter
    assert (work.model(x) - model(x)).norm() / model(x).norm() < 0.05
