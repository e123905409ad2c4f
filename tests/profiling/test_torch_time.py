"""Where the time of torch models goes: what was planted is found, at its place, and nothing of the model changes."""

import dataclasses

import pytest

pytest.importorskip("torch")

import torch
from profile_torch_models import Copying, Double, Net, Recurrent, Waiting, work_of
from torch import nn
from torch.nn.modules import module as registry
from torch.utils.checkpoint import checkpoint

from perfkit._quantity import Latency, Quantity
from perfkit.backends.torch_surgery import compile_in_place
from perfkit.profiling import flops
from perfkit.profiling._basics import Basics
from perfkit.profiling._time_data import PHASES
from perfkit.profiling.torch_time import collected

MISSING = Quantity.missing("ms", "not timed here")
BASICS = Basics(Latency((1.0,), 1.0, MISSING, MISSING, MISSING), Quantity(0.0, "s"), Quantity(0.0, "s"), 0)
X = torch.randn(16, 64)


def time_of(model, inputs=(X,), mode="inference", **training):
    work = work_of(model, inputs, mode, **training)
    return collected(work, work.backend.finish(work), BASICS)


def places(time, name):
    return {(op.module, op.phase) for op in time.ops if op.name == name}


@pytest.fixture(scope="module")
def trained():
    return time_of(Net(), mode="training")


def test_operations_are_in_their_module_and_phase(trained):
    products = {("first", "forward"), ("block.1", "forward")}
    assert places(trained, "aten::addmm") == products
    assert places(trained, "aten::mm") == {("first", "backward"), ("block.1", "backward")}
    assert places(trained, "aten::relu") == {("block.0", "forward")}
    assert places(trained, "aten::threshold_backward") == {("block.0", "backward")}
    assert {phase for _, phase in places(trained, "aten::addcdiv_") | places(trained, "aten::_foreach_addcdiv_")} == {
        "optimizer"
    }


def test_each_operation_has_its_own_calls_shapes_and_work(trained):
    (product,) = [op for op in trained.ops if op.name == "aten::addmm" and op.module == "first"]
    assert (product.calls, product.flops) == (1, flops.linear(16, 64, 128))
    assert product.shapes == "float32[128], float32[16, 64], float32[64, 128]"
    assert sum(op.flops for op in trained.ops) == trained.flops.value


def test_times_add_up(trained):
    """What operations take is within the step, and modules hold what is within them."""
    step_ms = sum(trained.phases_ms.values())
    inside = sum(op.self_ms for op in trained.ops)
    assert 0 < inside <= step_ms
    assert trained.attributed.value == pytest.approx(inside / step_ms, rel=0.01)
    assert set(trained.phases_ms) <= set(PHASES)
    assert all(trained.phases_ms[phase] > 0 for phase in ("forward", "loss", "backward", "optimizer"))
    by_path = {module.path: module for module in trained.modules}
    root, block = by_path[""], by_path["block"]
    assert block.forward_ms == pytest.approx(block.self_ms + sum(by_path[f"block.{i}"].forward_ms for i in (0, 1)))
    assert root.forward_ms == pytest.approx(by_path["first"].forward_ms + block.forward_ms)
    assert (root.parameters, root.flops) == (64 * 128 + 128 + 128 * 32 + 32, trained.flops.value)


def test_spans_are_one_step_nested(trained):
    spans = trained.spans
    assert {"phase", "module", "op"} == {span.kind for span in spans}
    (first,) = [span for span in spans if span.kind == "module" and span.name == "first"]
    (forward,) = [span for span in spans if span.kind == "phase" and span.name == "forward"]
    assert forward.start_ms <= first.start_ms
    assert first.start_ms + first.duration_ms <= forward.start_ms + forward.duration_ms
    assert first.depth > forward.depth
    assert [span.start_ms for span in spans] == sorted(span.start_ms for span in spans)


def test_a_needless_copy_a_layer_in_float64_and_a_wait_are_found():
    assert places(time_of(Copying()), "aten::clone") == {("", "forward")}
    double = time_of(Double())
    assert [op.module for op in double.ops if op.flops and op.shapes.startswith("float64")] == ["second"]
    assert places(time_of(Waiting()), "aten::_local_scalar_dense") == {("", "forward")}
    plain = {op.name for op in time_of(Net()).ops}
    assert not plain & {"aten::clone", "aten::_to_copy", "aten::_local_scalar_dense"}


def test_recurrent_layers_are_one_operation():
    found = time_of(Recurrent(), (torch.randn(5, 4, 6),), "training")
    assert places(found, "aten::mkldnn_rnn_layer") == {("lstm", "forward")}
    assert places(found, "aten::mkldnn_rnn_layer_backward") == {("lstm", "backward")}


def test_perfkits_own_kernels_are_operations():
    """Without a profiler they are called past torch's dispatcher, which is quicker and which no profiler sees."""
    from perfkit.kernels.rnn import lstm

    class Own(Recurrent):
        def forward(self, x):
            weights = [[getattr(self.lstm, name) for name in self.lstm._all_weights[0]]]
            return self.fc(lstm(x, weights, implementation="reference")[0][-1])

    found = time_of(Own(), (torch.randn(5, 4, 6),))
    (layer,) = [op for op in found.ops if op.name == "perfkit::rnn"]
    assert (layer.phase, layer.flops) == ("forward", flops.recurrent("lstm", 5, 4, 6, 8))


def test_fast_paths_stay():
    """TransformerEncoderLayer leaves its own if any module in it has a hook."""
    block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    assert "aten::_transformer_encoder_layer_fwd" in {op.name for op in time_of(block, (torch.randn(2, 5, 16),)).ops}


def test_micro_batches_have_the_phases_of_one():
    training = {"loss": lambda outputs, targets: (outputs - targets).square().mean(), "targets": torch.randn(16, 32)}
    work = work_of(Net(), (X,), "training", **training)
    work = work.replace(training=dataclasses.replace(work.training, micro_batches=4))
    found = collected(work, work.backend.finish(work), BASICS)
    (product,) = [op for op in found.ops if op.name == "aten::addmm" and op.module == "first"]
    assert (product.calls, product.phase) == (4, "forward")
    phase_of = {op.name: op.phase for op in found.ops}
    assert (phase_of["aten::square"], phase_of["PowBackward0"], phase_of["aten::lerp_"]) == (
        "loss",
        "backward",
        "optimizer",
    )
    assert min(found.phases_ms.values()) > 0
    assert not any(op.flops or "Backward" in op.name for op in found.ops if op.phase == "other")


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_what_is_computed_again_is_in_its_module_and_in_the_backward_pass(reentrant):
    class Again(Net):
        def forward(self, x):
            return checkpoint(self.block, self.first(x), use_reentrant=reentrant)

    found = time_of(Again(), mode="training")
    assert ("block.0", "backward") in places(found, "aten::relu")
    assert ("block.0", "forward") in places(found, "aten::relu")
    (block,) = [module for module in found.modules if module.path == "block"]
    assert block.calls == 2
    assert sum(op.flops for op in found.ops) == found.flops.value


def test_a_compiled_model_is_seen_as_it_runs():
    work = work_of(Net(), (X,))
    compile_in_place(work.model, backend="aot_eager")
    finished = work.backend.finish(work)
    work.backend.caller(work, finished)()
    with work.backend.watching_compiles() as log:
        found = collected(work, finished, BASICS)
        work.backend.caller(work, finished)()
    assert log().graphs == 0
    assert "aten::addmm" in {op.name for op in found.ops}
    forward = flops.linear(16, 64, 128) + flops.linear(16, 128, 32)
    assert found.flops.value == forward
    assert [module.flops for module in found.modules if module.path == "first"] == [flops.linear(16, 64, 128)]


def test_what_cannot_be_counted_is_timed_all_the_same(monkeypatch):
    def refuse(*_):
        raise NotImplementedError("no rule for it")

    monkeypatch.setattr("perfkit.profiling.torch_flops.count", refuse)
    found = time_of(Net())
    assert found.flops.unavailable == "it cannot be counted: no rule for it"
    assert places(found, "aten::addmm") == {("first", "forward"), ("block.1", "forward")}


def test_nothing_of_the_model_or_of_torch_changes():
    work = work_of(Net(), (X,), "training")
    finished = work.backend.finish(work)
    state = {name: value.clone() for name, value in work.model.state_dict().items()}
    collected(work, finished, BASICS)
    assert all(torch.equal(value, state[name]) for name, value in work.model.state_dict().items())
    assert not work.training.optimizer.state
    assert not registry._global_forward_hooks
    assert not registry._global_forward_pre_hooks
    optimizer = work.training.optimizer
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert torch._C._len_torch_dispatch_stack() == 0
    assert not torch.autograd._profiler_enabled()
