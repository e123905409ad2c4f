"""Channels innermost: what is stored so, what is not, and that numbers stay."""

import pytest

pytest.importorskip("torch")

import torch
from torch import nn

import perfkit

pytestmark = pytest.mark.usefixtures("hasty")


class Biased(nn.Module):
    """A convolution beside a parameter of four dimensions that is none of its weights."""

    def __init__(self):
        super().__init__()
        self.conv, self.bias = nn.Conv2d(3, 4, 3), nn.Parameter(torch.randn(1, 2, 3, 3))

    def forward(self, frames):
        return self.conv(frames.flatten(0, 1)).mean((2, 3)) + self.bias.view(-1).sum()


def test_images():
    model, frames = Biased(), torch.randn(2, 3, 3, 6, 6)
    with torch.no_grad():
        before = model(frames)
    result = perfkit.optimize(model, "channels_last", example_inputs=(frames,))
    seen = []
    result.model.conv.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        torch.testing.assert_close(result.model(frames), before)
    assert result.model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert result.model.bias.is_contiguous()
    assert seen[0].is_contiguous(), "five dimensions are no image"
    assert model.conv.weight.is_contiguous(), "the caller's is as it was"
    assert result.report.steps[0].effect.touched == ("conv",)


def test_volumes():
    model = nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU(), nn.ConvTranspose3d(4, 2, 3))
    x = torch.randn(2, 3, 5, 6, 7)
    result = perfkit.optimize(model, "channels_last", example_inputs=(x,))
    with torch.no_grad():
        y = result.model(x)
        torch.testing.assert_close(y, model(x))
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    assert result.report.steps[0].effect.touched == ("0", "2")
    for at in (0, 2):
        assert result.model[at].weight.is_contiguous(memory_format=torch.channels_last_3d)
