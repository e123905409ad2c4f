"""A stack of recurrent layers on torch tensors, forward and backward, by the implementation that was chosen.

The arguments are those of `torch.ops.perfkit.rnn`, see `torch_op`; weights in tuples, one for each layer and direction.
What a kernel keeps for the backward pass, `Saved`, is of R rows: T * B of them time-major, or P packed. A kernel is a
module, NAME_kernel.py, of two functions beside its `refusal`:

    forward(problem, x, rows, h0, c0, weights, batch_first, gates, cells, inner[, configuration]) -> y, hn, cn
    backward(problem, x, rows, h0, c0, weights, batch_first, y, gates, cells, inner, d_y, d_hn, d_cn[, configuration])
        -> d_x, d_h0, d_c0, [(w_ih, w_hh, b_ih, b_hh), ...]

x, the states, the weights and the gradients lie in memory in any way; rows on the CPU, as int64. `forward` fills gates,
cells and inner where they are not None; `backward` only reads them, as it may be called again. `configuration` is what
was measured to be best, by name. What they return may be of a wider dtype; cn and d_c0 are None but for LSTM. The
library and the reference have a `forward` without the buffers, and torch differentiates it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from perfkit.kernels import rnn as op
from perfkit.kernels._op import Choice
from perfkit.kernels._torch import autocasts
from perfkit.kernels.rnn.problem import SAVED, Problem

KERNELS = ("triton", "cpu")
Weights = Sequence[Sequence[Tensor]]


class Saved(NamedTuple):
    """What a kernel keeps for the backward pass: contiguous, of x's dtype but for cells, and float16 not on a CPU.

    Args:
        gates: (layers * directions, R, S, H), S of `problem.SAVED`.
        cells: (layers * directions, R, H), float32; empty but for LSTM.
        inner: (layers - 1, R, H * directions), the outputs between layers.
    """

    gates: Tensor
    cells: Tensor
    inner: Tensor


def empty_saved(problem: Problem, x: Tensor) -> Saved:
    """Room for what a kernel keeps."""
    rows = x.size(0) if problem.ragged == "packed" else problem.steps * problem.batch
    stack, hidden = problem.layers * problem.directions, problem.hidden
    dtype = torch.float32 if problem.device == "cpu" and x.dtype == torch.float16 else x.dtype
    return Saved(
        x.new_empty((stack, rows, SAVED[problem.mode], hidden), dtype=dtype),
        x.new_empty((stack, rows, hidden) if problem.mode == "LSTM" else (0,), dtype=torch.float32),
        x.new_empty((problem.layers - 1, rows, hidden * problem.directions), dtype=dtype),
    )


def grouped(weights: Sequence[Tensor], bias: bool) -> list[tuple[Tensor, ...]]:
    """The weights of each layer and direction."""
    each = 4 if bias else 2
    return [tuple(weights[i : i + each]) for i in range(0, len(weights), each)]


def first_able(problem: Problem) -> str:
    """The first implementation that takes `problem`, whatever was measured."""
    mine = (known for known in op.OP.implementations if known.framework == "torch")
    return next(known.name for known in mine if known.why_not(problem) is None)


@functools.cache
def module(implementation: str) -> ModuleType:
    """Where an implementation's functions are."""
    return import_module(f"{op.__name__}.{implementation}{'_kernel' if implementation in KERNELS else ''}")


def forward(
    problem: Problem,
    choice: Choice,
    x: Tensor,
    rows: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    weights: Weights,
    batch_first: bool,
    saved: Saved | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, hn and cn, which may be of a wider dtype than x."""
    run = module(choice.implementation).forward
    if choice.implementation not in KERNELS:
        return run(problem, x, rows, h0, c0, weights, batch_first)
    return run(problem, x, rows, h0, c0, weights, batch_first, *(saved or (None, None, None)), **_options(choice))


def backward(
    problem: Problem,
    choice: Choice,
    x: Tensor,
    rows: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    weights: Weights,
    batch_first: bool,
    y: Tensor | None,
    saved: Saved | None,
    d_y: Tensor,
    d_hn: Tensor,
    d_cn: Tensor | None,
) -> list[Tensor]:
    """The gradients of x, h0, c0 (LSTM only) and each weight, in their dtypes; without `saved`, forward runs again."""
    if autocasts(problem.device):  # the products of a backward pass are in the forward pass's precision
        with torch.autocast(problem.device, enabled=False):
            return backward(problem, choice, x, rows, h0, c0, weights, batch_first, y, saved, d_y, d_hn, d_cn)
    inputs = [x, h0, *([] if c0 is None else [c0]), *(weight for direction in weights for weight in direction)]
    if choice.implementation not in KERNELS:
        return _by_torch(problem, choice, inputs, rows, len(weights[0]) == 4, batch_first, d_y, d_hn, d_cn)
    if problem.ragged == "lengths":  # zero times a NaN in the padding would be in the weights' gradients
        there = torch.arange(problem.steps)[:, None] < rows
        x = x.masked_fill(~(there.T if batch_first else there)[..., None].to(x.device), 0)
    if saved is None:
        saved = empty_saved(problem, x)
        y, _, _ = forward(problem, choice, x, rows, h0, c0, weights, batch_first, saved)
    run = module(choice.implementation).backward
    d_x, d_h0, d_c0, of_weights = run(
        problem, x, rows, h0, c0, weights, batch_first, y, *saved, d_y, d_hn, d_cn, **_options(choice)
    )
    parts = zip(weights, of_weights, strict=True)
    found = [gradient for direction, all_four in parts for gradient in all_four[: len(direction)]]
    found = [d_x, d_h0, *([] if c0 is None else [d_c0]), *found]
    return [gradient.to(given.dtype) for gradient, given in zip(found, inputs, strict=True)]


def _by_torch(problem, choice, inputs, rows, bias, batch_first, d_y, d_hn, d_cn) -> list[Tensor]:
    """torch differentiates the library or the reference, also below autograd, where operators run."""
    states = 2 if d_cn is None else 3

    def run(*inputs):
        x, h0, c0 = (*inputs[:states], None)[:3]
        found = forward(problem, choice, x, rows, h0, c0, grouped(inputs[states:], bias), batch_first)
        return found[:states]

    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)  # torch.func cannot differentiate oneDNN's LSTM
    try:
        _, pull = torch.func.vjp(run, *inputs)
        return list(pull((d_y, d_hn, d_cn)[:states]))
    finally:
        torch._C._set_mkldnn_enabled(enabled)


def _options(choice: Choice) -> dict[str, Any]:
    return {"configuration": dict(choice.configuration)} if choice.configuration else {}


class Stack(torch.autograd.Function):
    """A kernel as a step of autograd, where nothing but autograd looks on: the operator does more, and costs more."""

    @staticmethod
    def forward(ctx, problem, choice, rows, batch_first, bias, recompute, x, h0, c0, *weights):
        saved = None if recompute else empty_saved(problem, x)
        found = forward(problem, choice, x, rows, h0, c0, grouped(weights, bias), batch_first, saved)
        y, hn, cn = (None if state is None else state.to(x.dtype) for state in found)
        ctx.about = problem, choice, batch_first, bias
        ctx.save_for_backward(x, rows, h0, c0, *([None] * 4 if saved is None else [y, *saved]), *weights)
        return y, hn, cn

    @staticmethod
    def backward(ctx, d_y, d_hn, d_cn):
        problem, choice, batch_first, bias = ctx.about
        x, rows, h0, c0, y, *rest = ctx.saved_tensors
        saved, weights = rest[:3], rest[3:]
        d_cn = None if c0 is None else d_cn
        kept = None if y is None else Saved(*saved)
        if torch.is_grad_enabled():  # with create_graph=True: the operator refuses a second derivative by name
            options = problem.mode, bias, problem.directions == 2, batch_first, choice.implementation
            found = torch.ops.perfkit.rnn_backward(x, rows, h0, c0, weights, y, *saved, d_y, d_hn, d_cn, *options)
        else:
            weights = grouped(weights, bias)
            found = backward(problem, choice, x, rows, h0, c0, weights, batch_first, y, kept, d_y, d_hn, d_cn)
        d_x, d_h0, *rest = found
        d_c0, *of_weights = rest if c0 is not None else (None, *rest)
        return None, None, None, None, None, None, d_x, d_h0, d_c0, *of_weights
