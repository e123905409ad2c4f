"""Calls of the recurrent op in torch on a case's numbers, with every gradient: for tests of all implementations."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from perfkit.kernels.rnn import gru, lstm, rnn
from perfkit.kernels.rnn.cases import Case, error, numbers, tolerance

FUNCTIONS = {
    "LSTM": lstm,
    "GRU": gru,
    "RNN_TANH": rnn,
    "RNN_RELU": functools.partial(rnn, nonlinearity="relu"),
}
STACK = Case("LSTM", 7, 3, 10, 16, layers=2, bidirectional=True)
SOME = (
    STACK,
    Case("GRU", 5, 4, 3, 17, batch_first=True, ragged="lengths"),
    Case("RNN_TANH", 5, 4, 3, 8, ragged="packed"),
)


@dataclasses.dataclass
class Inputs:
    """The tensors of a case, all of them leaves that want a gradient; see `cases.Numbers`."""

    x: Tensor
    rows: Tensor | None
    weights: list[tuple[Tensor, ...]]
    h0: Tensor | None
    c0: Tensor | None
    d_y: Tensor
    d_hn: Tensor
    d_cn: Tensor | None

    def states(self) -> list[Tensor]:
        return [state for state in (self.h0, self.c0) if state is not None]

    def leaves(self) -> dict[str, Tensor]:
        names = ("w_ih", "w_hh", "b_ih", "b_hh")
        found = {"x": self.x} | dict(zip(("h0", "c0"), self.states(), strict=False))
        for i, direction in enumerate(self.weights):
            found |= {f"{name} {i}": weight for name, weight in zip(names, direction, strict=False)}
        return found


def inputs(case: Case, dtype: torch.dtype | None = None, device: str = "cpu") -> Inputs:
    """A case's tensors: rounded to the case's dtype, then held in `dtype`, so that all see the same numbers."""
    given = numbers(case)

    def made(array: np.ndarray | None, grad: bool = True) -> Tensor | None:
        if array is None:
            return None
        rounded = torch.from_numpy(array).to(getattr(torch, case.dtype))
        return rounded.to(device, dtype or rounded.dtype).requires_grad_(grad)

    return Inputs(
        x=made(given.x),
        rows=None if given.rows is None else torch.from_numpy(given.rows),
        weights=[tuple(map(made, direction)) for direction in given.weights],
        h0=made(given.h0),
        c0=made(given.c0),
        d_y=made(given.d_y, False),
        d_hn=made(given.d_hn, False),
        d_cn=made(given.d_cn, False),
    )


def call(case: Case, given: Inputs, **options: Any) -> list[Tensor]:
    """y, hn, and of an LSTM cn, by the public function."""
    packed = case.ragged == "packed"
    x = PackedSequence(given.x, given.rows) if packed else given.x
    lengths = given.rows if case.ragged == "lengths" else None
    layout = {"batch_first": case.batch_first, "bidirectional": case.bidirectional}
    y, *states = FUNCTIONS[case.mode](x, given.weights, *given.states(), lengths=lengths, **layout, **options)
    return [y.data if packed else y, *states]


def results(case: Case, given: Inputs, outputs: list[Tensor]) -> dict[str, np.ndarray]:
    """The outputs and, under the name of the leaf, every gradient."""
    leaves = given.leaves()
    gradients = [gradient for gradient in (given.d_y, given.d_hn, given.d_cn) if gradient is not None]
    found = torch.autograd.grad(outputs, list(leaves.values()), gradients)
    named = dict(zip(("y", "hn", "cn"), outputs, strict=False)) | dict(zip(leaves, found, strict=True))
    return {name: tensor.detach().double().cpu().numpy() for name, tensor in named.items()}


@functools.cache
def expected(case: Case) -> dict[str, np.ndarray]:
    """What the reference makes of the same numbers in float64."""
    given = inputs(case, torch.float64)
    return results(case, given, call(case, given, implementation="reference"))


def errors(case: Case, actual: dict[str, np.ndarray]) -> dict[str, tuple[float, float]]:
    """Of each result that is further from the reference than it may be: its error, and its tolerance."""
    wrong = {}
    for name, value in expected(case).items():
        gradient = name not in ("y", "hn", "cn")
        found, most = error(case, actual[name], value, gradient=gradient), tolerance(case, gradient=gradient)
        if not found <= most:
            wrong[name] = (found, most)
    return wrong


class Layers(torch.nn.Module):
    """A two-layer bidirectional LSTM of 10 inputs and 16 units."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.weights = torch.nn.ParameterList(torch.nn.LSTM(10, 16, 2, bidirectional=True).parameters())
        self.options = options

    def forward(self, x, lengths=None):
        groups = [tuple(self.weights[i + j] for j in range(4)) for i in range(0, len(self.weights), 4)]
        y, hn, cn = lstm(x, groups, lengths=lengths, bidirectional=True, **self.options)
        return 2 * y, hn, cn


def gradients(model, *arguments):
    """Of every parameter."""
    model.zero_grad()
    y, hn, cn = model(*arguments)
    (y.square().sum() + hn.sum() + cn.sin().sum()).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def assert_close(actual, expected, case=STACK):
    """Equal but for the roundings of two different orders of summation."""
    for one, other in zip(actual, expected, strict=True):
        assert (one - other).abs().max() <= tolerance(case, gradient=True) * other.abs().max()
