"""The recipe `fused_kernels` on torch linear layers with the ReLU behind them."""

import pytest

pytest.importorskip("torch")

import torch
import torch.nn.functional as F
from fused_torch import assert_same, kernels_in, reasons, swapped, workload
from torch import nn

from perfkit._chain import chain_of
from perfkit._variant import apply
from perfkit.kernels import trace


class Head(nn.Module):
    """Linear layers with and without a ReLU behind them."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(160, 130), nn.Linear(130, 140), nn.Linear(140, 150, bias=False)
        self.relu = nn.ReLU()

    def forward(self, x):
        x = self.relu(self.first(x))
        x = F.relu(self.second(x))
        return self.third(x)


def linear_kernels_everywhere(monkeypatch):
    """The kernel of linear layers takes whatever it can, on any CPU."""
    from perfkit.kernels import _op
    from perfkit.kernels.linear import cpu_shape, torch_call

    monkeypatch.setattr(cpu_shape, "slower", lambda _problem: None)
    monkeypatch.setattr(torch_call, "_known", {})
    _op._choose.cache_clear()


def kernels_in_training(model, *inputs):
    with trace() as choices:
        model(*inputs)
    return [choice.implementation for choice in choices]


@pytest.mark.parametrize("of_sequential", [False, True])
def test_linear_layers_with_relu(monkeypatch, of_sequential):
    """What changes after the swap is seen: written and replaced weights, hooks, gradients, another dtype."""
    linear_kernels_everywhere(monkeypatch)
    torch.manual_seed(0)
    model, x = Head().eval(), torch.randn(3, 160)
    names = ["first", "second", "third"]
    if of_sequential:
        model = nn.Sequential(model.first, nn.ReLU(), model.second, nn.ReLU(), model.third).eval()
        names = ["0", "2", "4"]
    result, effect = swapped(model, x)
    assert effect.touched == tuple(names)
    assert kernels_in(result, x) == ["cpu"] * 3
    first, second, third = (result.get_submodule(name) for name in names)
    with torch.no_grad():
        assert_same(result(x), model(x))
        for part in (result, model):
            part.get_submodule(names[0]).weight.mul_(0.5)
            part.get_submodule(names[1]).bias = nn.Parameter(torch.ones(140))
            part.get_submodule(names[2]).weight.data = torch.ones(150, 140)
        assert_same(result(x), model(x))
    seen = []
    hook = first.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.no_grad():
        assert_same(result(x), model(x))
    assert float(seen[0].min()) < 0, "it is shown what the layer makes, before ReLU"
    hook.remove()
    result(x).sum().backward()
    model(x).sum().backward()
    for new, old in zip(result.parameters(), model.parameters(), strict=True):
        assert_same(new.grad, old.grad)
    assert not [each for each in kernels_in_training(result, x) if each == "cpu"]
    with torch.no_grad():
        half, expected = result.bfloat16()(x.bfloat16()), model.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    # each layer's output is rounded, and so may differ by a place of bfloat16
    assert float((half - expected).norm() / expected.norm()) < 3 * torch.finfo(torch.bfloat16).eps
    assert all(isinstance(layer, nn.Linear) for layer in (first, second, third))


def test_linear_layers_that_are_not_touched(monkeypatch):
    _, effect = swapped(nn.Linear(2, 2), torch.randn(1, 2))
    assert "too little work" in reasons(effect)["Linear"]
    linear_kernels_everywhere(monkeypatch)
    _, effect = swapped(Head(), torch.randn(3, 160), trains=True)
    assert effect.status == "NO_EFFECT"

    class Own(nn.Linear):
        def forward(self, input):
            return super().forward(input) + 1

    model, x = nn.Sequential(Own(160, 130), nn.ReLU()), torch.randn(3, 160)
    result, effect = swapped(model, x)
    assert "a forward of its own" in reasons(effect)["0"]
    assert_same(result(x), model(x))


def swapped_after_bf16(model, x):
    done = apply(chain_of("bf16+fused_kernels"), workload(model, (x,)))
    return done.works[-1].model, done.steps[-1].effect


def test_linear_layers_under_autocast_and_compiled(monkeypatch):
    """There torch computes: its casts, and the compiler's own product."""
    linear_kernels_everywhere(monkeypatch)
    model, x = Head().eval(), torch.randn(3, 160)
    _, effect = swapped_after_bf16(model, x)
    assert not effect.touched
    result, _ = swapped(model, x)
    compiled = torch.compile(result, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert_same(compiled(x), model(x))
