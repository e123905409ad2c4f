"""Models and inputs of a stranger's: taken as they are, or refused in plain words; never changed."""

import collections
import copy
import dataclasses
import functools
import types

import pytest

pytest.importorskip("torch")

import torch
from applied_recipes import applied
from torch import nn

import perfkit
from perfkit import InvalidInputError, PerfkitWarning, UnsupportedError
from perfkit.backends.torch_bind import as_inputs

pytestmark = pytest.mark.filterwarnings("ignore::perfkit.PerfkitWarning")


class Calling(nn.Module):
    """A linear layer, and whatever `how(model, x)` does around it."""

    def __init__(self, how):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.how = how

    def forward(self, x):
        return self.how(self, x)


def refused(model, *example_inputs):
    with pytest.raises(InvalidInputError) as raised:
        perfkit.plan(model, "bf16", example_inputs=example_inputs)
    return str(raised.value)


class Feature(nn.Module):
    """Takes a feature from a hook, in one of two ways."""

    def __init__(self, method):
        super().__init__()
        self.fc, self.head, self.found = nn.Linear(4, 4), nn.Linear(4, 2), None
        self.fc.register_forward_hook(self.keep if method else lambda _module, _args, y: setattr(self, "found", y))

    def keep(self, _module, _args, y):
        self.found = y

    def forward(self, x):
        self.fc(x)
        return self.head(self.found)


def test_functions_that_would_go_on_using_the_original_are_refused():
    model = Feature(method=False)
    model(torch.zeros(2, 4))  # from now on a copy would run, on what the original found
    before = model.found
    said = refused(model, torch.randn(2, 4))
    assert "_forward_hooks of fc" in said
    assert "a copy would go on using the original's" in said
    assert model.found is before

    model = Calling(None)
    model.how = lambda _model, x: model.fc(x)
    assert "how of Calling" in refused(model, torch.randn(2, 4))
    model.how = functools.partial(lambda fc, _model, x: fc(x), model.fc)  # a copy of it has a copy of the layer
    assert applied(model, "bf16", torch.randn(2, 4)).fidelity.ok


def test_hooks_that_are_methods_come_along():
    model, x = Feature(method=True), torch.randn(2, 4)
    model(torch.zeros(2, 4))
    result = applied(model, "bf16", x).model
    with torch.no_grad():
        torch.testing.assert_close(result(x), model(x), rtol=0, atol=0.05)


@pytest.mark.parametrize(
    "how",
    [
        lambda model, x: model.fc(x.mul_(2)),
        lambda model, x: model.fc(torch.relu_(x)),
    ],
)
def test_models_that_write_to_their_inputs_are_refused_and_the_callers_are_not_written_to(how):
    x = torch.randn(3, 4)
    before = x.clone()
    assert "writes to its inputs at each call" in refused(Calling(how), x)
    assert torch.equal(x, before)


def test_models_that_empty_or_fill_their_inputs_are_refused():
    batch = {"x": torch.randn(3, 4)}
    assert "does not run on them again" in refused(Calling(lambda model, batch: model.fc(batch.pop("x"))), batch)
    assert batch.keys() == {"x"}

    class Cache:
        def __init__(self):
            self.seen = torch.zeros(0, 4)

    def growing(model, inputs):
        x, cache = inputs
        cache.seen = torch.cat([cache.seen, model.fc(x)])
        return cache.seen

    cache = Cache()
    assert "leave the cache out of the example inputs" in refused(Calling(growing), [torch.randn(3, 4), cache])
    assert len(cache.seen) == 0


def test_an_input_that_is_filled_once_is_no_harm():
    class Graph:
        def __init__(self, x):
            self.x, self.degree = x, None

    def filling(model, graph):
        if graph.degree is None:
            graph.degree = graph.x.sum()
        return model.fc(graph.x) + graph.degree

    graph = Graph(torch.randn(3, 4))
    assert applied(Calling(filling), "bf16", graph).fidelity.ok
    assert graph.degree is None


@dataclasses.dataclass(frozen=True, slots=True)
class Slots:
    x: torch.Tensor


class Named(collections.OrderedDict):
    """Takes its items by name, and remembers which."""

    def __init__(self, y, hidden=None):
        super().__init__(y=y)
        self.hidden = hidden


@dataclasses.dataclass
class Own:
    x: torch.Tensor
    rows: int

    def __init__(self, x):
        self.x, self.rows = x, len(x)


@pytest.mark.parametrize(
    ("how", "example"),
    [
        (lambda model, d: model.fc(d["x"][0]), collections.defaultdict(list, x=[torch.ones(3, 4)])),
        (lambda model, d: collections.defaultdict(list, y=[model.fc(d)]), torch.ones(3, 4)),
        (lambda model, s: Slots(model.fc(s.x)), Slots(torch.ones(3, 4))),
        (lambda model, o: Own(model.fc(o.x)), Own(torch.ones(3, 4))),
        (lambda model, x: model.fc(x).max(-1), torch.ones(3, 4)),
        (lambda model, x: model.fc(x.to_dense()), torch.eye(4).to_sparse()),
        (lambda model, x: model.fc(x), torch.ones(1, 4).requires_grad_() * 2),
        (lambda model, x: model.fc(x), torch.ones(1, 4).expand(3, 4)),
    ],
)
def test_inputs_and_outputs_of_many_kinds(how, example):
    assert applied(Calling(how), "half", example).fidelity.ok


def test_a_mapping_that_takes_its_items_by_name():
    model = Calling(lambda model, d: Named(model.fc(d["y"]), "seen"))
    example = Named(torch.ones(3, 4), "given")
    result = perfkit.optimize(model, "half", example_inputs=(example,))
    found = result.model(example)
    assert (type(found), list(found), found.hidden) == (Named, ["y"], "seen")
    torch.testing.assert_close(found["y"], model(example)["y"], rtol=3e-2, atol=3e-2)  # bfloat16
    assert found["y"].dtype == example["y"].dtype == torch.float32


def test_keywords_of_an_overridden_call():
    class Scaled(nn.Linear):
        def __call__(self, x, scale=1):
            return super().__call__(x) * scale

    model = Scaled(4, 2)
    assert as_inputs(model, {"x": 1, "scale": 2}).kwargs == {"x": 1, "scale": 2}
    assert as_inputs(nn.Linear(4, 2), {"x": 1, "scale": 2}).args == ({"x": 1, "scale": 2},)


def test_what_has_no_values_to_compare_is_refused():
    class Opaque:
        def __init__(self, y):
            self.y = y

    said = refused(Calling(lambda model, x: Opaque(model.fc(x))), torch.ones(3, 4))
    assert "Opaque without any tensor" in said
    assert "tuples, lists, dicts, dataclasses" in said
    said = refused(nn.Linear(4, 4), torch.full((3, 4), float("nan")))
    assert "hold 12 NaN or infinite" in said
    rows = torch.ones(2, 4), torch.ones(3, 4)
    joined = torch.nested.nested_tensor(list(rows), layout=torch.jagged)
    assert "hold a nested tensor" in refused(nn.Linear(4, 4), joined)
    nests = Calling(lambda model, x: torch.nested.as_nested_tensor([model.fc(x)], layout=torch.jagged))
    assert "returned a nested tensor" in refused(nests, rows[0])


def test_lazy_and_compiled_parts_are_refused():
    said = refused(nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(2)), torch.ones(3, 4))
    assert "'1.weight', '1.bias'" in said
    assert "call the model once" in said
    assert "0 is compiled already" in refused(nn.Sequential(torch.compile(nn.Linear(4, 4))), torch.ones(3, 4))


def test_under_inference_mode():
    """A model made there, and a call from there: the result is trainable as any other."""
    with torch.inference_mode():
        model, x = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), torch.randn(3, 4)
        result = applied(model, "half", x)
    assert result.fidelity.ok
    assert not any(tensor.is_inference() for tensor in result.model.state_dict().values())


def test_training_under_no_grad():
    given = {"loss": nn.functional.mse_loss, "targets": torch.zeros(3, 2)}
    with torch.no_grad():
        optimizer = functools.partial(torch.optim.SGD, lr=0.1)
        assert applied(nn.Linear(4, 2), "bf16", torch.ones(3, 4), optimizer=optimizer, **given).fidelity.ok


def test_a_state_that_hinders_the_next_step_is_told():
    def remembering(model, x):
        model.state = model.fc(x + getattr(model, "state", 0))
        return model.state

    given = {"loss": nn.functional.mse_loss, "targets": torch.zeros(3, 4)}
    given["optimizer"] = functools.partial(torch.optim.SGD, lr=0.1)
    with pytest.raises(UnsupportedError, match=r"took one training step, and then one raised RuntimeError.*detached"):
        applied(Calling(remembering), "channels_last", torch.ones(3, 4), **given)


def test_within_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        said = refused(nn.Linear(4, 4), torch.ones(3, 4))
    assert "within torch.autocast" in said


def test_tensors_with_a_history_are_copied_wherever_they_are_kept():
    model, x = nn.Linear(4, 4), torch.randn(3, 4)
    model.register_buffer("state", model(x))
    model.kept = [model(x), {"more": (model(x),)}]
    twin = applied(model, "half", x).model
    assert torch.equal(twin.kept[0], model.kept[0].detach())
    assert model.kept[0].grad_fn is not None


@pytest.mark.filterwarnings("default::perfkit.PerfkitWarning")
def test_outputs_in_objects_are_told():
    def held(model, x):
        return {"y": model.fc(x), "more": [types.SimpleNamespace(y=model.fc(x), rows=len(x))]}

    with pytest.warns(PerfkitWarning, match=r"hold tensors in objects \(SimpleNamespace\), where .* neither compared"):
        perfkit.plan(Calling(held), "bf16", example_inputs=(torch.ones(3, 4),))


def test_modules_that_torch_does_not_find_are_told():
    model = Calling(lambda model, x: model.more[0](model.fc(x)))
    model.more, model.again = [nn.Linear(4, 4)], [model.fc]
    with pytest.warns(PerfkitWarning, match=r"more of Calling holds 1 module\(s\) in a plain list.*nn.ModuleList"):
        perfkit.plan(model, "bf16", example_inputs=(torch.ones(3, 4),))


def test_random_outputs_are_not_compared_with_other_random_numbers():
    """Its float64 run draws others: twice that distance would let anything pass."""

    def noisy(model, x):
        noise = torch.randn(3, 4) if x.dtype == torch.float32 else torch.randn(4, 3).T
        return model.fc(x), noise + model.fc(x) * 0

    class Negated(perfkit.Recipe):
        stage = perfkit.Stage.KERNELS

        def torch(self, work):
            from perfkit.backends.torch_surgery import around_forward

            around_forward(
                work.model, lambda forward: lambda module, x: (forward(module, x)[0], -forward(module, x)[1])
            )
            return work, perfkit.Effect(("all of it",))

    wrong = applied(Calling(noisy), Negated(), torch.ones(3, 4)).fidelity
    assert "output 2 of 2" in wrong.reason
    assert "the model draws random numbers" in wrong.reason
    right = applied(Calling(noisy), "channels_last", torch.ones(3, 4)).fidelity
    assert right.ok
    assert "the original itself, since a float64 run of it differs" in right.reference


def test_complex_numbers_are_compared_with_wider_ones():
    """A run of complex64 weights is no float64 run: against itself everything unchanged is exact."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, dtype=torch.cfloat), nn.Linear(8, 3, dtype=torch.cfloat))
    model[1].scale = torch.ones(3, dtype=torch.cfloat)  # used like a buffer
    model[1].register_forward_hook(lambda layer, inputs, outputs: outputs @ torch.diag(layer.scale))
    found = applied(model, "channels_last", torch.randn(5, 8, dtype=torch.cfloat)).fidelity
    assert found.reference == "a float64 run of the original"
    assert 0 < found.original_error < 1e-6


def test_what_the_caller_has_is_left_as_it_is():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    before = copy.deepcopy(model.state_dict()), [vars(module).keys() for module in model.modules()]
    applied(model, "half", torch.randn(3, 4))
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in model.state_dict().items())
    assert [vars(module).keys() for module in model.modules()] == before[1]


def test_an_exported_module_is_refused():
    x = torch.randn(2, 4)
    assert "exported" in refused(torch.export.export(nn.Linear(4, 4), (x,)).module(), x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_model_that_torchao_has_quantized_is_left_as_it_is_with_the_reason():
    quantization = pytest.importorskip("torchao.quantization")
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval(), torch.randn(2, 64)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    for recipe in ("int8", "int8_weight_only", "int4_weight_only", "prune", "low_rank"):
        found = applied(model, recipe, x)
        assert not found.effect.touched
        assert {item.name for item in found.effect.skipped} == {"0", "2"}
        torch.testing.assert_close(found.model(x), model(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("recipe", ["bf16", "accumulate(2)", "checkpoint(0.5)", "checkpoint(1)"])
@pytest.mark.usefixtures("hasty")
def test_a_model_that_torchao_has_quantized_is_trained_around_its_weights(recipe):
    quantization = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    layers = (nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 8))
    model, x, y = nn.Sequential(*layers), torch.randn(16, 64), torch.zeros(16, 8)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    quantized = sum(part.numel() for layer in model if isinstance(layer, nn.Linear) for part in (layer.weight,))
    about = {"mode": "training", "targets": y, "loss": nn.functional.mse_loss, "on_slower": "warn"}
    optimizer = functools.partial(torch.optim.SGD, lr=0.1)
    result = perfkit.optimize(model, recipe, example_inputs=(x,), optimizer=optimizer, **about)
    assert result.report.fidelity.ok
    held = result.report.before.model_bytes
    assert quantized < held < 2 * quantized, "integers of a byte each, their scales and the biases"


def test_nothing_to_work_on_is_said():
    for recipe in ("int8", "prune", "low_rank"):
        found = applied(nn.Tanh(), recipe, torch.randn(2, 4))
        assert found.effect.notes == ("it found nothing in this model that it works on",)
