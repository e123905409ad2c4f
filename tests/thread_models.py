"""Torch models that tell with how many threads they compute, and that are quicker with two than with others."""

import math
import time

import torch
from torch import nn

X = torch.randn(3, 4)


class Telling(nn.Module):
    """Notes with how many threads it computes, forwards and backwards."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)
        self.seen = []
        self.fails = False

    def forward(self, x):
        self.note()
        if self.fails:
            raise KeyError("of the model's own")
        y = self.fc(x)
        if y.requires_grad:
            y.register_hook(lambda _: self.note())
        return y

    def note(self):
        self.seen.append(torch.get_num_threads())


class Waiting(nn.Module):
    """Takes 20 ms, and as much again for each halving or doubling from two threads: more than any noise hides."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        time.sleep(0.02 + 0.02 * abs(math.log2(torch.get_num_threads()) - 1))
        return self.fc(x)
