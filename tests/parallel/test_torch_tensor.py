"""tensor_parallel in torch, in four processes: numbers as the whole model's, and nothing paired that is no pair."""

import pytest

pytest.importorskip("torch")

import torch
from sample_models import torch_models
from shared_runs import once
from torch import nn
from torch_workers import together

from perfkit._chain import chain_of
from perfkit.backends.torch_backend import BACKEND
from perfkit.parallel.torch_flow import Flow
from perfkit.parallel.torch_mesh import follow

MODELS = ("mlp", "cnn2", "text_lstm", "transformer", "tangled")
TOLERANCE = 3136 * 2**-52 * 8
"""In float64: the longest sum of a model here has 3136 terms, and rounding goes through less than 8 layers."""

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


@pytest.fixture(scope="module")
def told():
    """What every process found, by rank: one launch for all tests of this file."""
    return once("tensor_worker", lambda: together("tensor_worker.py", 4))


@pytest.mark.parametrize("model", MODELS)
def test_outputs_are_those_of_the_whole_model(told, model):
    for rank in told:
        assert rank[model]["inference"]["off"] <= TOLERANCE
        assert rank[model]["inference"]["same"], "a subclass of the model's own class at most"


def test_pairs_of_processes_are_averaged_part_by_part(told):
    for rank in told:
        result = rank["mlp"]["averaged"]
        assert result["off"] < 1e-12 < 1e-3 < result["moved"]
        assert result["parts"][1] == "data: the batch in 2 parts, parameters averaged every step"


@pytest.mark.parametrize("chain", ["training", "both"])
@pytest.mark.parametrize("model", MODELS)
def test_training_is_that_of_the_whole_model(told, model, chain):
    """Gradients, and the losses of three steps; with tensor_parallel alone under the same dropout."""
    for rank in told:
        found = rank[model][chain]
        assert found["gradients"] <= TOLERANCE
        assert found["losses"] <= TOLERANCE
        assert abs(found["fell"] - 1) > 1e-2, "the steps do something"
        assert found["restored"] == 0
        assert found["held"] == found["parameters"], "the optimizer holds the new parameters"


def test_what_is_split_how(told):
    parts = {model: told[0][model]["inference"]["parts"] for model in MODELS}
    assert parts["mlp"] == ["tensor: 2 layers in 4 parts (fc1 by columns; fc2 by rows), 1 all-reduce a call"]
    assert parts["cnn2"] == [
        "tensor: 4 layers in 4 parts (conv1, conv2 by channels; fc1 by columns; fc2 by rows), "
        "1 all-reduce and 2 all-gathers a call"
    ]
    assert parts["text_lstm"] == ["tensor: 1 layer in 4 parts (embedding by features), 1 all-gather a call"]
    assert parts["transformer"] == [
        "tensor: 2 layers in 4 parts (linear1 by columns; linear2 by rows), 1 all-reduce a call"
    ]
    assert told[0]["mlp"]["both"]["parts"][1].startswith("data: the batch in 2 parts")


def test_what_is_left_whole_is_told_with_the_reason(told):
    skipped = {model: told[0][model]["inference"]["skipped"] for model in MODELS}
    assert skipped["mlp"] == {"fc3": "3 output(s) cannot be shared by 4 devices evenly"}
    why = skipped["text_lstm"]["lstm"]
    assert (
        why
        == "every step needs the whole hidden state: split, it would be gathered at each, 12 times in the example call"
    )
    assert skipped["transformer"] == {"self_attn": "2 head(s) cannot be shared by 4 devices evenly"}
    assert skipped["tangled"] == {
        "tied1": "shares a weight with tied2",
        "tied2": "shares a weight with tied1",
        "direct": "its weight is read by .T outside of its own call",
    }


@pytest.mark.parametrize("model", MODELS)
def test_size_counts_what_a_process_holds(told, model):
    found = told[0][model]["inference"]
    (held, whole), (parameters, original) = found["bytes"], found["parameters"]
    assert whole / 4 <= held < whole
    assert parameters == original


class Chain(nn.Module):
    """Linear layers `first`, `second` and what is between them."""

    def __init__(self, between):
        super().__init__()
        self.first, self.second, self.drop = nn.Linear(4, 4), nn.Linear(4, 4), nn.Dropout(0.5)
        self.between = between

    def forward(self, x):
        return self.second(self.between(self, self.first(x)))


def pairs(model, *inputs):
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    drops = {name: module for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
    flow = Flow(layers, drops)
    flow.call(model, inputs, {})
    return flow.pairs()


PAIRED = {
    "nothing": lambda self, h: h,
    "relu": lambda self, h: torch.relu(h),
    "in place": lambda self, h: h.relu_(),
    "dropout": lambda self, h: self.drop(nn.functional.silu(h)),
    "its form is read": lambda self, h: torch.tanh(h) if h.shape[-1] == h.size(1) and h.is_floating_point() else h,
}
UNPAIRED = {
    "softmax": lambda self, h: h.softmax(-1),
    "read twice": lambda self, h: torch.relu(h) + h.mean(),
    "detached": lambda self, h: torch.relu(h) if h.detach().sum() > 1e9 else torch.tanh(h),
    "value read": lambda self, h: torch.relu(h) if h[0, 0].item() > 1e9 else torch.tanh(h),
    "another tensor": lambda self, h: h * torch.ones(4),
    "as numpy": lambda self, h: h * float(h.numpy().max()),
    "dropout as a function": lambda self, h: nn.functional.dropout(h, 0.5),
    "reshaped": lambda self, h: h.reshape(-1, 2).reshape(-1, 4),
    "listed": lambda self, h: torch.cat([h, h])[:3],
    "the third": lambda self, h: self.second(h) + h,
}


@pytest.mark.parametrize("name", PAIRED)
def test_pairs_are_followed(name):
    assert pairs(Chain(PAIRED[name]).train(), torch.randn(3, 4)) == {"first": "second"}


@pytest.mark.parametrize("name", UNPAIRED)
def test_what_is_no_pair_is_none(name):
    assert "first" not in pairs(Chain(UNPAIRED[name]).train(), torch.randn(3, 4))


def test_an_output_that_is_returned_as_well_is_whole():
    class Both(Chain):
        def forward(self, x):
            hidden = self.first(x)
            return self.second(hidden), {"hidden": hidden}

    assert pairs(Both(None), torch.randn(3, 4)) == {}


def test_one_process_is_refused():
    model, inputs = torch_models()["cnn"]
    work = BACKEND.bind(model, None, inputs, mode="inference", loss=None, targets=None, optimizer=None, seed=0)
    (recipe,) = chain_of("tensor_parallel(2, exclude='conv')")
    assert (recipe.size, recipe.exclude) == (2, ("conv",))
    assert "one process with one device" in recipe.refusal(work)
    assert "example_inputs" in recipe.refusal(work.replace(inputs=None))


def test_compile_leaves_weights_unfrozen_that_are_to_be_split():
    from perfkit.backends.torch_compile import compiled
    from perfkit.backends.torch_surgery import COMPILED_WITH
    from perfkit.parallel.layout import Layout

    model, inputs = torch_models()["cnn"]
    for axis, frozen in (("tensor", False), ("data", True)):
        work = BACKEND.bind(model, None, inputs, mode="inference", loss=None, targets=None, optimizer=None, seed=0)
        work, effect = compiled(work.replace(layout=Layout((axis,), (2,))), "default", freezing=True)
        assert getattr(type(work.model), COMPILED_WITH)["options"].get("freezing", False) == frozen
        assert any("not frozen" in note for note in effect.notes) != frozen


def test_splitting_loops_is_refused():
    model, inputs = torch_models()["cnn"]
    work = BACKEND.bind(model, None, inputs, mode="inference", loss=None, targets=None, optimizer=None, seed=0)
    (recipe,) = chain_of("tensor_parallel(2, recurrent=True)")
    assert "recurrent=True is for JAX" in recipe.refusal(work)


def test_an_optimizer_with_state_is_refused():
    from perfkit import UnsupportedError

    layer = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    with pytest.raises(UnsupportedError, match="taken steps already"):
        follow(optimizer, dict(layer.named_parameters()), dict(layer.named_parameters()))
