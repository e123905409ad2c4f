"""Copies of torch models and optimizers."""

import copy

import pytest

pytest.importorskip("torch")

import torch

from perfkit.backends.torch_surgery import around_forward, compile_in_place, copied


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


def doubled(forward):
    return lambda module, x: 2 * forward(module, x)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, copied])
def test_copies_keep_the_class_that_was_made_for_them(copy_of):
    """Also where the model's own __deepcopy__ makes one of the class that it knows, as torch.fx's does."""
    plain, x = torch.nn.Sequential(torch.nn.Linear(2, 2)), torch.ones(1, 2)
    for model in (torch.fx.symbolic_trace(plain), copy.deepcopy(plain)):
        kind = type(model)
        around_forward(model, doubled)
        compile_in_place(model, backend="eager")
        twin = copy_of(model)
        assert isinstance(twin, kind)
        assert twin._compiled_call_impl is not None
        assert torch.equal(twin(x), 2 * plain(x))
        with torch.no_grad():
            twin.get_parameter("0.weight").zero_()
        assert not torch.equal(twin(x), model(x)), "it has weights of its own"
