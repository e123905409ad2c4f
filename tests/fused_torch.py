"""The recipe `fused_kernels` applied to torch models without optimizing: for tests of all kinds of layers."""

import torch
from torch import nn

from perfkit import reference
from perfkit._recipe_files import recipe_class
from perfkit._workload import Inputs, Training, Workload
from perfkit.backends.torch_backend import BACKEND
from perfkit.kernels import trace

SUMS = 1024
"""Above the number of terms in any sum here."""

TOLERANCE = {"rtol": SUMS**0.5 * 2**-23, "atol": SUMS**0.5 * 2**-23}
"""Sums in another order: each of n roundings moves a result by 2^-24 of it, sqrt(n) of them together; twice that."""


def swapped(model, inputs, *, trains=False, recipe="fused_kernels", **options):
    """The recipe applied to a copy, and its effect."""
    inputs = inputs if inputs is None or isinstance(inputs, tuple) else (inputs,)
    training = Training(None, None, torch.optim.SGD(model.parameters(), 0.1)) if trains else None
    mode = "training" if trains else "inference"
    work = Workload(BACKEND, model, inputs and Inputs(inputs), mode, "cpu", training)
    work = BACKEND.copy(work)
    work.model.train(trains)
    result, effect = recipe_class(recipe)(**options).torch(work)
    return result.model, effect


def reasons(effect):
    return {item.name: item.reason for item in effect.skipped}


def kernels_in(model, *inputs):
    """Which implementations a call of the model runs in."""
    with trace() as choices, torch.no_grad():
        model(*inputs)
    return [choice.implementation for choice in choices]


def assert_same(one, other):
    torch.testing.assert_close(one, other, **TOLERANCE)


def small(name):
    """A reference model's task, and eight rows of its examples."""
    task = reference.task(name)
    inputs = task.example_inputs if isinstance(task.example_inputs, tuple) else (task.example_inputs,)
    rows = 1 if name in ("lstm", "rnn") else 0  # where they are
    return task, tuple(each.narrow(rows, 0, 8) for each in inputs), task.targets[:8]


def workload(model, inputs, training=None):
    mode = "training" if training else "inference"
    return BACKEND.copy(Workload(BACKEND, model.train(bool(training)), Inputs(inputs), mode, "cpu", training))


class Net(nn.Module):
    """A convolution with ReLU and pool, and two linear layers."""

    def __init__(self):
        super().__init__()
        self.conv, self.relu, self.pool = nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2)
        self.first, self.second = nn.Linear(8 * 5 * 5, 160), nn.Linear(160, 10)

    def forward(self, x):
        x = self.pool(self.relu(self.conv(x)))
        x = x.view(x.size(0), -1)
        x = self.relu(self.first(x))
        return self.second(x)


def batch(rows=2):
    torch.manual_seed(1)
    return torch.randn(rows, 1, 12, 12)
