"""torch.compile as perfkit calls it: weights really frozen, and nothing of the caller's settings changed."""

import copy
import warnings

import pytest

pytest.importorskip("torch")

import torch
from applied_recipes import applied
from torch import nn
from torch._dynamo.utils import counters

import perfkit
from perfkit.backends import torch_compile_log, torch_surgery

pytestmark = pytest.mark.usefixtures("hasty")

PACKED = "mkldnn_linear_weight_pack_matcher_count"


@pytest.fixture
def model():
    torch.compiler.reset()
    counters.clear()
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()


def compiled(model, recipe):
    result = perfkit.optimize(model, recipe, example_inputs=(torch.randn(32, 64),))
    return result.model


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="oneDNN packs the frozen weights")
def test_frozen_weights_are_packed_for_the_hardware(model):
    compiled(model, "compile(freezing=False)")
    assert counters["inductor"][PACKED] == 0
    compiled(model, "compile")
    assert counters["inductor"][PACKED] == 2


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="oneDNN packs the frozen weights")
def test_they_are_frozen_again_after_a_reset_and_for_other_shapes(model):
    result = compiled(model, "compile(dynamic=False)")
    result(torch.randn(7, 64))
    assert counters["inductor"][PACKED] == 4
    torch.compiler.reset()
    result(torch.randn(7, 64))
    assert counters["inductor"][PACKED] == 6


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="oneDNN packs the frozen weights")
def test_they_are_frozen_again_with_new_weights(model):
    result, x = compiled(model, "compile"), torch.randn(32, 64)
    packed, weights = counters["inductor"][PACKED], {name: 2 * held for name, held in model.state_dict().items()}
    result.load_state_dict(weights)
    after = result(x)
    assert counters["inductor"][PACKED] == packed + 2
    model.load_state_dict(weights)
    torch.testing.assert_close(after, model(x))


def test_integer_weights_are_loaded(model):
    result, x = compiled(model, "int8+compile"), torch.randn(32, 64)
    before = result(x)
    result.load_state_dict(result.state_dict())
    assert torch.equal(result(x), before)


def test_a_copy_is_compiled_too(model):
    result = compiled(model, "compile")
    twin, x = copy.deepcopy(result), torch.randn(32, 64)
    before = counters["stats"]["unique_graphs"]
    torch.testing.assert_close(twin(x), result(x))
    assert counters["stats"]["unique_graphs"] > before


class Broken(nn.Module):
    """What follows the graph break is compiled apart, by the code that all its instances share."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        x = self.fc(x)
        torch._dynamo.graph_break()
        return doubled(x)


def doubled(x):
    return 2 * x


def compile_notes(number):
    """Of so many models of one class, in a process that compiles each function once and no more."""
    torch.compiler.reset()
    counters.clear()
    given = {"recipe": "compile(freezing=False)", "example_inputs": (torch.randn(4, 8),)}
    with torch._dynamo.config.patch(recompile_limit=1), warnings.catch_warnings():
        warnings.simplefilter("ignore", perfkit.PerfkitWarning)
        reports = [perfkit.apply(Broken(), **given).report for _ in range(number)]
    return [" ".join(report.steps[0].effect.notes) for report in reports]


@pytest.mark.skipif(not torch_surgery.APART, reason="this torch counts the programs of all models together")
def test_parts_behind_a_graph_break_are_compiled_for_each_model():
    assert all("2 graph(s) compiled" in note for note in compile_notes(2))


def test_it_is_said_where_dynamo_stopped_compiling(monkeypatch):
    """Without counts of their own the second model of a class reaches the limit, and the third is not even asked."""
    monkeypatch.setattr(torch_surgery, "APART", {})
    monkeypatch.setattr(torch_compile_log, "APART", {})
    notes = compile_notes(3)
    assert ["recompile_limit was reached" in note for note in notes] == [False, True, True]
    assert ["by models before" in note for note in notes] == [False, False, True]


def test_the_global_setting_and_other_compilations_are_left_alone(model):
    config = torch._inductor.config
    assert not config.freezing
    result = compiled(model, "compile")
    assert not config.freezing
    before = counters["inductor"][PACKED]
    with torch.no_grad():
        torch.compile(nn.Sequential(nn.Linear(64, 64)))(torch.randn(32, 64))
    assert counters["inductor"][PACKED] == before, "the caller's own compilation froze"
    with pytest.raises(RuntimeError):
        result(torch.randn(3, 5))
    assert not config.freezing
    assert torch.is_grad_enabled()


class EvalDropout(nn.Module):
    """Monte-Carlo dropout: drops in eval mode only."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 8)

    def forward(self, x):
        return self.fc(nn.functional.dropout(x, 0.5, training=not self.training))


def test_a_model_that_draws_random_numbers_draws_the_same_ones():
    """Inductor has a generator of its own: its numbers would not be the original's under any seed."""
    torch.manual_seed(0)
    model, x = EvalDropout().eval(), torch.randn(32, 64)
    result = applied(model, "compile", x)
    assert result.fidelity.ok
    assert "1 graph(s) compiled" in " ".join(result.effect.notes)
    with torch.no_grad():
        torch.manual_seed(3)
        y = result.model(x)
        torch.manual_seed(3)
        torch.testing.assert_close(y, model(x))
        assert not torch.equal(result.model(x), y)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_packed_sequences_come_out_whole():
    """torch.compile loses what is in one that `_replace` made: it came out empty, and nothing said so."""

    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.out = nn.GRU(4, 8), nn.Linear(8, 2)

        def forward(self, packed):
            y, _ = self.layer(packed)
            return nn.utils.rnn.PackedSequence(self.out(y.data), y.batch_sizes, y.sorted_indices, y.unsorted_indices)

    torch.manual_seed(0)
    torch.compiler.reset()
    model, packed = Tagger(), nn.utils.rnn.pack_sequence([torch.randn(length, 4) for length in (5, 3, 2)])
    fast = perfkit.apply(model, "bf16+compile", example_inputs=(packed,)).model
    with torch.no_grad():
        y, expected = fast(packed), model(packed)
    assert y.data.dtype == torch.float32
    torch.testing.assert_close(y.data, expected.data, rtol=0, atol=2**-6)
    assert torch.equal(y.batch_sizes, expected.batch_sizes)


def test_convolutions_in_float64_are_compiled_too():
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    original = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).double().eval()
    result = perfkit.apply(original, "compile", example_inputs=(x,))
    torch.testing.assert_close(result.model(x), original(x))
    assert any("oneDNN, which has no float64" in note for note in result.report.steps[0].effect.notes)
