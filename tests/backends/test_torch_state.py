"""What a torch model holds beside its parameters is as before after it was measured."""

import copy

import pytest

pytest.importorskip("torch")

import torch
from applied_recipes import applied

from perfkit.backends.torch_state import keeping_state


class Remembering(torch.nn.Module):
    """Assigns a hidden state, a rebound buffer, a counter, a history and a cache at each call."""

    def __init__(self):
        super().__init__()
        self.cell = torch.nn.GRUCell(4, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("written", torch.zeros(4))
        self.hidden, self.calls, self.history, self.cache = None, 0, [], {"seen": set()}

    def forward(self, x):
        self.calls += 1
        self.history.append(self.calls)
        self.cache["seen"].add(self.calls)
        self.late = self.calls
        self.hidden = self.cell(x, self.hidden)
        self.mean = 0.9 * self.mean + 0.1 * self.hidden.mean(0)
        self.written.add_(1)
        return self.hidden + self.mean


def test_all_that_a_forward_assigns_is_taken_back():
    model, x = Remembering(), torch.randn(3, 4)
    history, mean = model.history, model.mean
    with keeping_state(model), torch.no_grad():
        first = model(x)
        assert not torch.equal(model(x), first)
    assert (model.hidden, model.calls, model.history, model.cache) == (None, 0, [], {"seen": set()})
    assert not hasattr(model, "late")
    assert model.history is history
    assert model.mean is mean
    assert not mean.any()
    assert not model.written.any()
    with torch.no_grad():
        torch.testing.assert_close(model(x), first)


def test_buffers_that_cannot_be_written_to_are_left_alone():
    model = torch.nn.Linear(2, 2)
    model.register_buffer("positions", torch.arange(3).expand(4, 3))
    model.register_buffer("adjacency", torch.eye(3).to_sparse())
    with keeping_state(model):
        model(torch.ones(1, 2))
    assert model.positions.shape == (4, 3)
    torch.testing.assert_close(model.adjacency.to_dense(), torch.eye(3))


@pytest.mark.parametrize("recipe", ["half", "bf16", "int8", "fused_kernels"])
def test_a_result_starts_where_the_model_was(recipe):
    """Measuring and calibrating call it often; the first call afterwards is the model's first."""
    torch.manual_seed(0)
    model, x = Remembering().eval(), torch.randn(3, 4)
    with torch.no_grad():
        expected = copy.deepcopy(model)(x)
    result = applied(model, recipe, x)
    assert result.fidelity.ok
    with torch.no_grad():
        # 0.05, the largest tolerance of these recipes, of values within ±2
        torch.testing.assert_close(result.model(x), expected, rtol=0, atol=0.1)
    assert (model.calls, model.hidden) == (0, None)
