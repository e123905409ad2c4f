"""Integer layers and what they are called with. Plain helpers, no tests."""

import torch
from torch import nn

from perfkit.quantization import torch_layers, torch_onednn
from perfkit.quantization.torch_ranges import Affine

GRID = Affine.spanning(-2.0, 3.0, torch_onednn.top())
ROUNDINGS = {
    "static": lambda layer: torch_layers.static(layer, GRID),
    "dynamic": lambda layer: torch_layers.dynamic(layer, torch_onednn.top()),
}
LAYERS = {
    "rows": (lambda: nn.Linear(40, 7), lambda: torch.randn(5, 40)),
    "one row": (lambda: nn.Linear(33, 129, bias=False), lambda: torch.randn(1, 33)),
    "one column": (lambda: nn.Linear(1, 3), lambda: torch.randn(4, 1)),
    "more dimensions, out of order": (lambda: nn.Linear(16, 8), lambda: torch.randn(3, 16, 5).transpose(1, 2)),
    "half of the columns": (lambda: nn.Linear(16, 8), lambda: torch.randn(6, 32)[:, ::2]),
    "bfloat16": (lambda: nn.Linear(16, 8), lambda: torch.randn(6, 16).bfloat16()),
    "images": (lambda: nn.Conv2d(5, 6, 3, padding=1), lambda: torch.randn(2, 5, 9, 8)),
    "channels last": (
        lambda: nn.Conv2d(8, 6, (3, 1), stride=(2, 1), bias=False),
        lambda: torch.randn(2, 8, 9, 8).contiguous(memory_format=torch.channels_last),
    ),
    "padded by name": (lambda: nn.Conv2d(3, 6, (3, 5), padding="same"), lambda: torch.randn(2, 3, 9, 8)),
    "groups": (lambda: nn.Conv2d(4, 8, 3, dilation=2, groups=4), lambda: torch.randn(1, 4, 12, 9)),
}


def in_floats(layer, x, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(torch_onednn, "product", lambda *_: None)
        patched.setattr(torch_onednn, "at_once", lambda *_: None)
        return layer(x)


class Own(torch.Tensor):
    """A tensor that is not torch's own."""
