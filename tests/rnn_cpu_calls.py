"""The recurrent CPU kernel beside torch's layers in float64: for tests of its numbers, instruction paths and threads.

What a result may differ by: four times what torch's own layer in the same dtype differs from float64 on these numbers,
which covers how errors grow through steps and layers, and a few roundings of the largest number beside it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from perfkit.kernels.rnn import cpu_kernel
from perfkit.kernels.rnn.problem import SAVED, Problem

MODES = cpu_kernel.MODES
ROUNDINGS = {torch.float32: 16, torch.bfloat16: 4, torch.float16: 4}
"""Of the largest number. float32: the kernel's exponential is exact to 3e-7, and three of them are in a cell."""


class Case(NamedTuple):
    steps: int
    batch: int
    inputs: int
    hidden: int
    layers: int = 1
    directions: int = 1
    ragged: str = "no"
    threads: int = 2
    batch_first: bool = False
    bias: bool = True


CASES = [
    Case(1, 1, 1, 1, threads=1),
    Case(5, 3, 7, 17, 2, 2, "lengths", batch_first=True),
    Case(9, 33, 10, 50, 2, 1, "packed", bias=False),
    Case(7, 5, 4, 24, 3, 2, "packed", threads=3),
    Case(6, 37, 33, 40, 2, 1, "lengths", threads=3),
    Case(30, 1, 13, 34, 3, 1, threads=3),  # the layers side by side
    Case(4, 70, 3, 65, 1, 2, threads=1),  # more rows than one slice takes
]
SHARED = [Case(5, 1, 13, 330, threads=2), Case(4, 2, 5, 330, threads=3), Case(3, 1, 7, 330, 2, 2, "no", 5)]
"""Few rows of many units: several threads share the units of one line."""


class Layer(NamedTuple):
    """A case with numbers: what torch's layer is given, and what the kernel is."""

    module: nn.Module
    problem: Problem
    x: torch.Tensor
    h0: torch.Tensor
    c0: torch.Tensor
    lengths: torch.Tensor | None
    seeds: tuple[torch.Tensor, ...]


def make(mode: str, case: Case, dtype: torch.dtype) -> Layer:
    torch.manual_seed(0)
    kind = {"LSTM": nn.LSTM, "GRU": nn.GRU}.get(mode, nn.RNN)
    options = {"nonlinearity": mode[4:].lower()} if kind is nn.RNN else {}
    steps, batch, inputs, hidden, layers, directions, ragged, *_ = case
    module = kind(
        inputs, hidden, layers, bidirectional=directions == 2, bias=case.bias, batch_first=case.batch_first, **options
    )
    module = module.to(dtype)
    x = torch.randn(batch, steps, inputs) if case.batch_first else torch.randn(steps, batch, inputs)
    lengths = None
    if ragged != "no":
        lengths = torch.randint(1, steps + 1, (batch,))
        lengths[batch // 2] = steps
        lengths = lengths.sort(descending=True).values if ragged == "packed" else lengths
    states = torch.randn(2, layers * directions, batch, hidden).to(dtype)
    problem = Problem(
        "torch", "cpu", str(dtype)[6:], mode, steps, batch, inputs, hidden, layers, directions, ragged, True
    )
    width = hidden * directions
    seeds = torch.randn(*x.shape[:-1], width), torch.randn_like(states[0]), torch.randn_like(states[0])
    return Layer(module, problem, x.to(dtype), *states, lengths, tuple(seed.to(dtype) for seed in seeds))


def by_torch(layer: Layer, dtype: torch.dtype) -> list[torch.Tensor]:
    """Outputs, final states, and the gradients of x, the initial states and each weight."""
    module, problem = layer.module, layer.problem
    weights = [weight.detach().to(dtype).requires_grad_() for weight in module.parameters()]
    named = dict(zip(dict(module.named_parameters()), weights, strict=True))
    x, h0, c0 = (tensor.detach().to(dtype).requires_grad_() for tensor in (layer.x, layer.h0, layer.c0))
    lstm, first = problem.mode == "LSTM", module.batch_first
    given = x
    if layer.lengths is not None:
        given = nn.utils.rnn.pack_padded_sequence(x, layer.lengths, first, enforce_sorted=problem.ragged == "packed")
    y, states = torch.func.functional_call(module, named, (given, (h0, c0) if lstm else h0))
    seeds = layer.seeds
    if layer.lengths is not None:
        y, _ = nn.utils.rnn.pad_packed_sequence(y, first, total_length=problem.steps)
    outputs = [y, *(states if lstm else (states,))]
    found = torch.autograd.grad(
        outputs, [x, h0, *([c0] if lstm else []), *weights], [*map(dtype_of(dtype), seeds)][: len(outputs)]
    )
    return [*(output.detach() for output in outputs), *found]


def dtype_of(dtype):
    return lambda tensor: tensor.to(dtype)


def by_kernel(layer: Layer) -> list[torch.Tensor]:
    """The same."""
    problem, module = layer.problem, layer.module
    lstm = problem.mode == "LSTM"
    weights = [tuple(weight.detach() for weight in direction) for direction in module.all_weights]
    x, rows, d_y = layer.x, layer.lengths, layer.seeds[0]
    if problem.ragged == "packed":
        packed = nn.utils.rnn.pack_padded_sequence(x, rows, module.batch_first)
        x, rows = packed.data, packed.batch_sizes
        d_y = nn.utils.rnn.pack_padded_sequence(d_y, layer.lengths, module.batch_first).data
    if problem.ragged == "lengths":
        d_y = d_y.masked_fill(padding(layer), float("nan"))  # nobody asks for it
    call = (problem, x, rows, layer.h0, layer.c0 if lstm else None, weights, module.batch_first)
    saved = empty_saved(problem, x)
    plain = cpu_kernel.forward(*call, None, None, None)
    y, hn, cn = cpu_kernel.forward(*call, *saved)
    for one, other in zip(plain, (y, hn, cn), strict=True):  # what is saved changes roundings alone
        eps = 64 * torch.finfo(x.dtype).eps
        assert one is other is None or torch.allclose(one, other, rtol=eps, atol=eps, equal_nan=True)
    d_x, d_h0, d_c0, of_weights = cpu_kernel.backward(
        *call, y, *saved, d_y, layer.seeds[1], layer.seeds[2] if lstm else None
    )
    flat = [gradient for direction in of_weights for gradient in direction[: len(weights[0])]]
    if problem.ragged == "packed":
        y, d_x = (padded(layer, data) for data in (y, d_x))
    return [y, hn, *([cn] if lstm else []), d_x, d_h0, *([d_c0] if lstm else []), *flat]


def empty_saved(problem, x):
    """Room for what the backward pass needs; what is not filled would show."""
    rows = x.size(0) if problem.ragged == "packed" else problem.steps * problem.batch
    stack, hidden = problem.layers * problem.directions, problem.hidden
    shapes = (
        (stack, rows, SAVED[problem.mode], hidden),
        (stack, rows, hidden),
        (problem.layers - 1, rows, hidden * problem.directions),
    )
    return [
        torch.full(shape, float("nan"), dtype=dtype)
        for shape, dtype in zip(shapes, (x.dtype, torch.float32, x.dtype), strict=True)
    ]


def padding(layer: Layer):
    there = torch.arange(layer.problem.steps)[:, None] < layer.lengths
    return ~(there.T if layer.module.batch_first else there)[..., None]


def padded(layer: Layer, data):
    packed = nn.utils.rnn.pack_padded_sequence(layer.x, layer.lengths, layer.module.batch_first)
    whole = nn.utils.rnn.PackedSequence(data, packed.batch_sizes)
    return nn.utils.rnn.pad_packed_sequence(whole, layer.module.batch_first, total_length=layer.problem.steps)[0]


def assert_is_torch(mode: str, case: Case, dtype: torch.dtype = torch.float32):
    torch.set_num_threads(case.threads)
    layer = make(mode, case, dtype)
    exact, yardstick, found = by_torch(layer, torch.float64), by_torch(layer, dtype), by_kernel(layer)
    for number, (result, expected, torchs) in enumerate(zip(found, exact, yardstick, strict=True)):
        allowed = 4 * (torchs.double() - expected).abs().max()
        allowed += ROUNDINGS[dtype] * torch.finfo(dtype).eps * expected.abs().max()
        assert (result.double() - expected).abs().max() <= allowed, f"result {number}"
    if layer.problem.ragged == "lengths":
        assert not found[0].masked_select(padding(layer)).any()


def assert_rounds(mode: str) -> None:
    """float32 weights, and x, that the kernel rounds as it reads them: the bits that rounding them before gives."""
    case = Case(6, 5, 37, 34, 2, 2)
    layer = make(mode, case, torch.float32)
    weights = [weight.detach() for weight in layer.module.parameters()]
    low = [weight.bfloat16() for weight in weights]
    problem = replace(layer.problem, dtype="bfloat16", needs_grad=False)
    c0 = layer.c0 if mode == "LSTM" else None

    def call(rounded, x, weights, *states):
        return cpu_kernel.caller(problem, case.batch_first, case.bias, rounded)(x, *states, weights)

    rounded_before = [None if state is None else state.bfloat16() for state in (layer.h0, c0)]
    expected = call(0, layer.x.bfloat16(), low, *rounded_before)
    for found in (call(1, layer.x.bfloat16(), weights, layer.h0, c0), call(2, layer.x, weights, layer.h0, c0)):
        assert all(one is other is None or torch.equal(one, other) for one, other in zip(found, expected, strict=True))
