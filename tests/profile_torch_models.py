"""Torch models for profiles, each with one thing to find, and their workloads."""

from __future__ import annotations

import torch
from torch import nn

from perfkit import backends

THREADS = 1
"""Small models on several threads measure the scheduler."""


def work_of(model, example_inputs, mode="inference", **training):
    """A workload on a copy of the model; training by plain SGD on the sum of the outputs, unless told otherwise."""
    settings = {"loss": None, "targets": None, "optimizer": None}
    if mode == "training":
        optimizer = torch.optim.Adam(model.parameters())
        settings = {"loss": summed, "targets": torch.zeros(1), "optimizer": optimizer} | training
    return backends.of(model).bind(model, None, example_inputs, mode=mode, seed=0, **settings)


def summed(outputs, _targets):
    return (outputs[0] if isinstance(outputs, tuple) else outputs).sum()


class Net(nn.Module):
    """Two linear layers, the second one in a block."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 128)
        self.block = nn.Sequential(nn.ReLU(), nn.Linear(128, 32))

    def forward(self, x):
        return self.block(self.first(x))


class Copying(Net):
    """Copies what it need not copy."""

    def forward(self, x):
        return self.block(self.first(x).t().contiguous().t())


class Double(Net):
    """Has a layer in float64."""

    def __init__(self):
        super().__init__()
        self.second = nn.Linear(32, 32).double()

    def forward(self, x):
        return self.second(super().forward(x).double()).float()


class Waiting(Net):
    """Asks for a number in each call."""

    def forward(self, x):
        y = super().forward(x)
        return y / max(y.abs().max().item(), 1.0)


class Leaking(Net):
    """Keeps every output."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        y = super().forward(x)
        self.seen.append(y.detach().clone())
        return y


class Recurrent(nn.Module):
    """An LSTM and a linear layer."""

    def __init__(self, layers=1, bidirectional=False):
        super().__init__()
        self.lstm = nn.LSTM(6, 8, layers, bidirectional=bidirectional)
        self.fc = nn.Linear(16 if bidirectional else 8, 1)

    def forward(self, x):
        return self.fc(self.lstm(x)[0][-1])
