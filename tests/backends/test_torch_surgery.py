"""Copies of torch models and optimizers."""

import pytest

pytest.importorskip("torch")

import torch

from perfkit.backends.torch_surgery import copied


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
