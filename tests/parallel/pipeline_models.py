"""Models that a pipeline cuts: the reference ones, and what is harder to cut."""

import torch
from tensor_worker import cases
from torch import nn
from written_attention import LENGTH, WIDTH, Causal, Products

MODELS = ("cnn2", "text_lstm", "transformer", "skips")


class Skips(nn.Module):
    """Values that go past a stage, a weight of no layer's, a change in place, a submodule that looks at values."""

    def __init__(self):
        super().__init__()
        self.scale, self.spare = nn.Parameter(torch.randn(8)), nn.Linear(2, 2)
        self.first, self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 8), Looks()
        self.last = nn.Linear(8, 5)

    def forward(self, x, by=1.0):
        start = torch.tanh(self.first(x)) * self.scale
        hidden = self.second(start)
        hidden += start * by
        hidden = torch.tanh_(hidden)
        return self.last(self.third(hidden) + start), {"hidden": hidden.mean(1)}


class Looks(nn.Module):
    """Cannot be traced: it is one operation."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return self.inner(x) if x.shape[-1] == 8 and float(x.detach().sum()) < 1e9 else x


def models():
    """name -> (model, inputs), without dropout: each process draws its own."""
    found = cases()
    torch.manual_seed(1)
    found["skips"] = Skips().double(), (torch.randn(4, 8).double(),)
    written = nn.Sequential(Products(), Causal(), nn.Flatten(), nn.Linear(LENGTH * WIDTH, 3))
    found["attention"] = written.double(), (torch.randn(4, LENGTH, WIDTH).double(),)
    for model, _ in found.values():
        for module in model.modules():
            if isinstance(module, (nn.Dropout, nn.MultiheadAttention)):
                module.p = module.dropout = 0.0
    return {name: found[name] for name in (*MODELS, "attention")}
