"""What a linear layer does with torch tensors: the kernel where it pays and nothing looks on, else torch does it."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from perfkit.kernels import _op
from perfkit.kernels import linear as op
from perfkit.kernels._torch import observer
from perfkit.kernels.linear.cpu_kernel import Call, caller
from perfkit.kernels.linear.problem import Problem
from perfkit.kernels.linear.reference import linear as by_library

_MOST_KNOWN = 4096
_known: dict[Any, Call | None] = {}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """act(x weightᵀ + bias), as F.linear and F.relu have it: gradients, transformations and errors are theirs.

    Args:
        x: (..., K), float32 or bfloat16 for the kernel, any for torch.
        weight: (N, K), of x's dtype, as is bias.
        bias: (N,) or None.
        activation: None or "relu".

    Returns:
        y: (..., N), in x's dtype. The kernel's sums are float32.
    """
    if torch.compiler.is_compiling():
        return by_library(x, weight, bias, activation)
    of_bias = None if bias is None else bias.dtype
    key = x.shape, x.dtype, weight.shape, weight.dtype, of_bias, activation
    run, traced = _known.get(key, _unknown), _op.tracing()
    if (run is None and not traced) or not _plain(x, weight, bias):
        return by_library(x, weight, bias, activation)
    if run is _unknown or traced:
        run = _learn(key, x, weight, bias, activation)
        if run is None:
            return by_library(x, weight, bias, activation)
    return run(x if x.is_contiguous() else x.contiguous(), weight, bias)


def _unknown(_x: Tensor, _weight: Tensor, _bias: Tensor | None) -> Tensor:
    raise AssertionError("it marks kinds of calls that were not seen yet")


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Numbers are wanted of plain tensors on CPU, and no more: no gradient, autocast, trace, mode or transformation."""
    tensors = (x, weight) if bias is None else (x, weight, bias)
    return (
        x.is_cpu
        and weight.is_cpu
        and weight.is_contiguous()
        and (bias is None or (bias.is_cpu and bias.is_contiguous()))
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        and not torch._C._is_any_autocast_enabled()
        and observer(tensors) is None
    )


def _learn(key: Any, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Call | None:
    """Who computes such calls; None for torch itself, which also tells of shapes that do not go together."""
    run = None
    fits = x.dim() > 0 and weight.dim() == 2 and x.size(-1) == weight.size(1)
    if fits and (bias is None or bias.shape == weight.shape[:1]):
        dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in (x, weight, bias) if tensor is not None}
        dtype = dtypes.pop() if len(dtypes) == 1 else "mixed"
        problem = Problem("cpu", dtype, prod(x.shape[:-1]), x.size(-1), weight.size(0), activation)
        if op.OP.choose(problem).implementation == "cpu":
            run = caller(problem, tuple(x.shape[:-1]))
    if len(_known) >= _MOST_KNOWN:
        _known.clear()
    _known[key] = run
    return run
