"""`optimize` and `plan` on models of every kind: what comes back works, and the caller's things are as they were."""

import copy
import random
import time

import numpy as np
import pytest
from sample_models import arguments, torch_models, training

import perfkit
from perfkit import FidelityError, NoEffectError, PerfkitWarning, SlowerError, UnsupportedError
from perfkit.measure import timing

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("hasty")
NAMES = {
    "torch": ("cnn", "resnet", "transformer", "packed_lstm", "tied", "nested"),
    "jax": ("nnx_cnn", "nnx_lstm", "linen", "function", "plain"),
}
MODELS = [(framework, name) for framework, names in NAMES.items() for name in names]


def flat(outputs):
    """The numbers in nested outputs, as one list of arrays."""
    from perfkit.backends.torch_surgery import tensors_in

    found = [tensor.detach().numpy() for tensor in tensors_in(outputs)]
    if not found:
        import jax

        found = [np.asarray(leaf) for leaf in jax.tree.leaves(outputs)]
    return found


def called(model, example_inputs, params=None):
    leading = () if params is None else (params,)
    if isinstance(example_inputs, dict) and "more" not in example_inputs and "x" not in example_inputs:
        return flat(model(*leading, **example_inputs))
    if isinstance(example_inputs, tuple) and not hasattr(example_inputs, "_fields"):
        return flat(model(*leading, *example_inputs))
    return flat(model(*leading, example_inputs))


@pytest.mark.parametrize(("framework", "name"), MODELS)
@pytest.mark.parametrize("recipe", ["bf16+compile"])
def test_a_chain_on_every_kind_of_model(framework, name, recipe):
    """Works or refuses with a reason; the original's outputs are bit-equal before and after."""
    pytest.importorskip(framework)
    given = arguments(framework, name)
    model, example_inputs, params = given["model"], given["example_inputs"], given.get("params")
    original = model.apply if hasattr(model, "init") and params is not None else model
    if framework == "torch" or hasattr(model, "eval"):
        model.eval()
    before = called(original, example_inputs, params)
    result = perfkit.optimize(**given, recipe=recipe)
    after = called(original, example_inputs, params)
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)
    assert result.report.fidelity.ok
    close = called(result.model, example_inputs, result.params)
    for old, new in zip(before, close, strict=True):
        np.testing.assert_allclose(new, old, rtol=0.1, atol=0.1)
        assert new.dtype == old.dtype


def test_the_result_is_a_module_of_the_same_class_with_the_same_keys():
    model, example_inputs = torch_models()["cnn"]
    result = perfkit.optimize(model, "channels_last+half+compile", example_inputs=example_inputs)
    chain = perfkit.optimize(model, "channels_last+half", example_inputs=example_inputs)
    for found in (result.model, chain.model):
        assert isinstance(found, type(model))
        assert found.state_dict().keys() == model.state_dict().keys()
    assert next(chain.model.parameters()).dtype == torch.bfloat16
    again = copy.deepcopy(chain.model)
    torch.testing.assert_close(again(*example_inputs), chain.model(*example_inputs))


def test_everything_of_the_callers_is_as_it_was():
    """Weights, mode, hooks, random state, threads and settings, also when a step raises."""
    model, example_inputs = torch_models()["cnn"]
    model.train()
    model.fc.eval()
    calls = []
    model.conv.register_forward_hook(lambda *_: calls.append(1))
    weights = copy.deepcopy(model.state_dict())

    def state():
        modules = list(model.modules())
        return (
            torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist(),
            torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
            torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark, torch.is_autocast_enabled("cpu"),
            [m.training for m in modules], [len(m._forward_hooks) for m in modules], [type(m) for m in modules],
            [p.requires_grad for p in model.parameters()], [p.grad for p in model.parameters()],
        )  # fmt: skip

    before = state()
    perfkit.optimize(model, "bf16", example_inputs=example_inputs)
    assert state() == before
    with pytest.raises(FidelityError):
        perfkit.optimize(model, "bf16", example_inputs=example_inputs, tolerance=0.0)
    assert state() == before

    def evaluate(found):
        torch.manual_seed(7)
        torch.set_default_dtype(torch.float64)
        raise KeyError("of the caller's")

    with pytest.raises(KeyError):
        perfkit.optimize(model, "bf16", example_inputs=example_inputs, evaluate=evaluate)
    assert state() == before
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name])


def test_the_result_keeps_its_state_through_the_measuring():
    """A model with a counter in a buffer is not run thousands of calls ahead."""

    class Counting(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.fc = torch.nn.Linear(2, 2)

        def forward(self, x):
            self.calls += 1
            return self.fc(x)

    model = Counting()
    result = perfkit.optimize(model, "half", example_inputs=(torch.ones(1, 2),), tolerance=0.1)
    assert model.calls == 0
    assert result.finished.model.calls == 0


def test_a_report_tells_where_something_else_computed_meanwhile(monkeypatch):
    told = []
    for share in (0.1, 0.7):
        monkeypatch.setattr(timing, "waited_s", lambda share=share: share * time.perf_counter())
        report = perfkit.optimize(torch.nn.Linear(4, 4), "half", example_inputs=(torch.ones(2, 4),)).report
        told.append([note for note in report.notes if "something else computed" in note])
    assert [len(notes) for notes in told] == [0, 1]
    assert "waited 0.7 s for a processor" in told[1][0]


def test_frozen_weights_do_not_go_stale():
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)), torch.randn(4, 8)
    result = perfkit.optimize(model, "compile", example_inputs=(x,))
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.5)
    result.model.load_state_dict(other.state_dict())
    torch.testing.assert_close(result.model(x), other(x))
    with torch.no_grad():
        for parameter in (*other.parameters(), *result.model.parameters()):
            parameter.mul_(-1.5)
    torch.testing.assert_close(result.model(x), other(x))


def test_many_models_of_one_class_are_all_compiled():
    """torch.compile gives up on a code object after so many programs: perfkit's results must not share one."""
    x = torch.randn(4, 8)
    with torch._dynamo.config.patch(recompile_limit=1):
        for seed in range(3):
            torch.manual_seed(seed)
            model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())
            result = perfkit.optimize(model, "bf16+compile", example_inputs=(x,))
            assert "1 graph(s) compiled" in " ".join(result.report.steps[1].effect.notes)


def test_torch_compile_leaves_an_lstm_alone_and_that_is_said():
    model = torch.nn.LSTM(4, 8)
    result = perfkit.optimize(model, "compile", example_inputs=(torch.randn(5, 2, 4),))
    effect = result.report.steps[0].effect
    assert effect.status == "NO_EFFECT"
    assert any("does not trace nn.LSTM" in item.reason for item in effect.skipped)
    with pytest.raises(NoEffectError, match=r"compile.*nothing"):
        perfkit.optimize(model, "compile", example_inputs=(torch.randn(5, 2, 4),), strict=True)


def test_channels_last_without_a_convolution_is_no_effect(framework):
    name = {"torch": "transformer", "jax": "nnx_cnn"}[framework]
    result = perfkit.optimize(**arguments(framework, name), recipe="channels_last")
    assert result.report.steps[0].effect.status == "NO_EFFECT"
    assert result.report.steps[0].effect.notes
    with pytest.raises(NoEffectError):
        perfkit.optimize(**arguments(framework, name), recipe="channels_last", strict=True)


def test_tf32_is_refused_where_there_is_none(framework):
    name = {"torch": "cnn", "jax": "nnx_cnn"}[framework]
    given = arguments(framework, name)
    with pytest.raises(UnsupportedError, match=r"tf32.*NVIDIA"):
        perfkit.optimize(**given, recipe="tf32+compile")
    plan = perfkit.plan(**given, recipe="tf32+compile")
    assert not plan.ok
    assert [bool(step.refusal) for step in plan.steps] == [True, False]
    assert "refused" in str(plan)


def test_a_plan_changes_nothing_and_tells_order_and_parts():
    model, example_inputs = torch_models()["cnn"]
    weights = copy.deepcopy(model.state_dict())
    plan = perfkit.plan(model, "compile+bf16+channels_last", example_inputs=example_inputs)
    assert [step.recipe for step in plan.steps] == ["channels_last", "bf16", "compile"]
    assert plan.steps[0].effect.touched == ("conv",)
    assert plan.steps[1].effect.touched == ("conv", "fc")
    assert plan.ok
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    auto = perfkit.plan(model, example_inputs=example_inputs)
    assert "compile" in {candidate.recipe for candidate in auto.candidates}


def test_without_inputs_the_recipe_is_applied_and_nothing_is_claimed(framework):
    name = {"torch": "cnn", "jax": "nnx_cnn"}[framework]
    given = arguments(framework, name)
    del given["example_inputs"]
    report = perfkit.optimize(**given, recipe="half").report
    assert report.speedup is None
    assert "example_inputs" in report.not_measured
    assert report.after.model_bytes < report.before.model_bytes
    assert report.after.latency is None
    assert "not measured" in str(report)


class Slow(perfkit.Recipe):
    """Waits in every call, so long that no noise of the machine can hide it."""

    stage = perfkit.Stage.KERNELS

    def torch(self, work):
        from perfkit.backends.torch_surgery import around_forward

        def wrap(forward):
            def waiting(module, x):
                time.sleep(0.02)
                return forward(module, x)

            return waiting

        around_forward(work.model, wrap)
        return work, perfkit.Effect(("all of it",))


def test_slower_is_said_reverted_or_raised():
    model, x = torch.nn.Linear(4, 4), torch.randn(2, 4)
    given = {"example_inputs": (x,)}
    with pytest.warns(PerfkitWarning, match="slower"):
        result = perfkit.optimize(model, Slow(), **given)
    assert result.report.speedup.verdict == "slower"
    with pytest.raises(SlowerError) as raised:
        perfkit.optimize(model, Slow(), on_slower="raise", **given)
    assert raised.value.report.speedup.high < 1
    result = perfkit.optimize(model, Slow(), on_slower="revert", **given)
    assert result.report.outcome == "original returned"
    assert result.model is model


def test_wrong_numbers_are_never_handed_out():
    class Wrong(Slow):
        def torch(self, work):
            from perfkit.backends.torch_surgery import around_forward

            around_forward(work.model, lambda forward: lambda module, x: forward(module, x) * 1.01)
            return work, perfkit.Effect(("all of it",))

    class Nan(Slow):
        def torch(self, work):
            from perfkit.backends.torch_surgery import around_forward

            around_forward(work.model, lambda forward: lambda module, x: forward(module, x) / 0)
            return work, perfkit.Effect(("all of it",))

    for recipe in (Wrong(), Nan()):
        with pytest.raises(FidelityError) as raised:
            perfkit.optimize(torch.nn.Linear(4, 4), recipe, example_inputs=(torch.randn(3, 4),))
        assert not raised.value.report.fidelity.ok
    with pytest.raises(FidelityError):
        perfkit.optimize(torch.nn.Linear(4, 4), Nan(), example_inputs=(torch.randn(3, 4),), tolerance=1e9)


def test_the_callers_metric_is_kept():
    model, example_inputs = torch_models()["cnn"]
    values = iter([0.9, 0.8, 0.9, 0.8])
    given = {"example_inputs": example_inputs, "evaluate": lambda _: next(values)}
    with pytest.raises(FidelityError, match=r"0\.9 to 0\.8"):
        perfkit.optimize(model, "bf16", max_drop=0.05, **given)
    metric = perfkit.optimize(model, "bf16", max_drop=0.2, **given).report.metric
    assert (metric.before, metric.after, metric.ok) == (0.9, 0.8, True)


def test_float16_training_scales_its_loss_and_skips_overflows(framework):
    """A loss of 1e-9 would have no float16 gradient; one that overflows halves the scale and changes no weight."""
    given = training(framework)
    plain = given["loss"]
    given["loss"] = lambda outputs, targets: plain(outputs, targets) * 1e-6
    result = perfkit.optimize(**given, recipe="fp16", mode="training")
    assert result.report.fidelity.ok
    batch = given["example_inputs"], given["targets"]
    losses = [float(result.train_step(batch)) for _ in range(20)]
    assert losses[-1] < losses[0] * 0.7


def test_training_continues_on_other_batches(framework):
    given = training(framework)
    result = perfkit.optimize(**given, recipe="compile", mode="training")
    inputs, targets = given["example_inputs"][0], given["targets"]
    for size in (16, 8, 16):
        assert np.isfinite(float(result.train_step((inputs[:size], targets[:size]))))


def test_nnx_results_follow_their_variables():
    """New weights and another mode are seen by the compiled module; it never runs on stale ones."""
    pytest.importorskip("jax")
    from flax import nnx

    given = arguments("jax", "nnx_cnn")
    result = perfkit.optimize(**given, recipe="compile")
    model, (x,) = result.model, given["example_inputs"]
    before = np.asarray(model(x))
    model.layers[0].bias.set_value(model.layers[0].bias.get_value() + 1)
    np.testing.assert_allclose(np.asarray(model(x)), before + 1, rtol=1e-5, atol=1e-5)
    model.train()
    assert not np.allclose(np.asarray(model(x)), before + 1), "batch statistics and dropout are live in train mode"
    statistics = np.asarray(model.norm.mean.get_value())
    model(x)
    assert not np.array_equal(statistics, np.asarray(model.norm.mean.get_value()))
    clone = nnx.clone(result.model)
    clone.layers[0].bias.set_value(clone.layers[0].bias.get_value() * 0)
    model.eval(), clone.eval()
    assert not np.allclose(np.asarray(clone(x)), np.asarray(model(x)))


def test_jax_results_can_be_differentiated_and_take_other_shapes():
    jax = pytest.importorskip("jax")
    given = arguments("jax", "function")
    result = perfkit.optimize(**given, recipe="bf16+compile")
    x, scale = given["example_inputs"]
    gradient = jax.grad(lambda params: result.model(params, x, scale).sum())(result.params)
    exact = jax.grad(lambda params: given["model"](params, x, scale).sum())(given["params"])
    np.testing.assert_allclose(gradient["w"], exact["w"], rtol=0.1, atol=0.1)
    assert result.model(result.params, x[:2], scale).shape == (2, 3)
    assert jax.vmap(result.model, (None, 0, None))(result.params, x[None], scale).shape == (1, 4, 3)
