"""Copies of torch models and optimizers."""

import pytest

pytest.importorskip("torch")

import torch
from torch import nn

from perfkit.backends.torch_copies import copied


def test_an_optimizers_hooks_come_along():
    """Gradient clipping is such a hook, and deepcopy leaves it behind."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    called = []
    optimizer.register_step_pre_hook(lambda given, *_: called.append(given))
    other, optimizer_of_other = copied(model, optimizer)
    assert optimizer_of_other.param_groups[0]["params"][0] is other.weight
    optimizer_of_other.step()
    assert called == [optimizer_of_other]
    optimizer_of_other.register_step_post_hook(lambda *_: called.append("copy"))
    optimizer.step()
    assert called == [optimizer_of_other, optimizer], "what is hooked to the copy stays there"


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_scripted_parts_are_trained_and_the_original_is_not():
    """deepcopy makes them weights with a history, which is the original's."""
    model = nn.Sequential(nn.Linear(2, 3), torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))))
    model[1][0].bias.requires_grad_(False)
    twin, optimizer = copied(model, torch.optim.SGD(model.parameters(), 0.1))
    assert [each.requires_grad for each in twin.parameters()] == [each.requires_grad for each in model.parameters()]
    before = {name: value.clone() for name, value in twin.state_dict().items()}
    twin(torch.randn(4, 2)).square().sum().backward()
    optimizer.step()
    trained = {name for name, value in twin.state_dict().items() if not torch.equal(value, before[name])}
    assert trained == before.keys() - {"1.0.bias"}
    assert all(each.grad is None for each in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta state")
def test_sparse_buffers_are_copied_whatever_their_layout():
    model = nn.Linear(2, 2)
    model.register_buffer("rows", torch.eye(2).to_sparse_csr())
    model.register_buffer("places", torch.eye(2).to_sparse())
    twin = copied(model)
    for name in ("rows", "places"):
        assert twin.get_buffer(name).layout == model.get_buffer(name).layout
        twin.get_buffer(name).values().zero_() if name == "rows" else twin.get_buffer(name)._values().zero_()
        assert model.get_buffer(name).to_dense().equal(torch.eye(2))
