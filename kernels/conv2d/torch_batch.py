"""vmap of the op in torch: calls with weights of their own become groups of one call, with the same weights a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def batched(
    info: Any, in_dims: Any, x, weight, bias, stride, padding, dilation, groups: int, *rest, run: Callable[..., Any]
):
    """`run`, the operator, for all calls at once: its results, and where in them the calls are."""
    calls, (x_dim, *weight_dims) = info.batch_size, in_dims[:3]
    own_weights = x_dim is None or any(dim is not None for dim in weight_dims)
    if own_weights:
        x, weight, bias = _grouped(calls, in_dims, x, weight, bias)
        found = run(x, weight, bias, stride, padding, dilation, groups * calls, *rest)
    else:
        found = run(_folded(x, x_dim), weight, bias, stride, padding, dilation, groups, *rest)
    return _split(calls, found, (int(own_weights),) * 2)


def batched_backward(
    info: Any,
    in_dims: Any,
    x,
    weight,
    bias,
    argmax,
    d_y,
    stride,
    padding,
    dilation,
    groups: int,
    *rest,
    run: Callable[..., Any],
):
    """The same of its gradient. Weights' gradients are asked for call by call, so weights are always of their own."""
    calls = info.batch_size
    x, weight, bias = _grouped(calls, in_dims, x, weight, bias)
    argmax, d_y = (_channels(calls, each, dim) for each, dim in zip((argmax, d_y), in_dims[3:5], strict=True))
    found = run(x, weight, bias, argmax, d_y, stride, padding, dilation, groups * calls, *rest)
    return _split(calls, found, (1, 0, 0))


def _split(calls: int, found: tuple[Tensor, ...], dims: tuple[int, ...]):
    """Results with the calls as a dimension of their own; what is empty has none."""
    pairs = [(each, None if each.numel() == 0 else dim) for each, dim in zip(found, dims, strict=True)]
    split = tuple(each if dim is None else each.unflatten(dim, (calls, -1)) for each, dim in pairs)
    return split, tuple(dim for _, dim in pairs)


def _grouped(calls: int, in_dims: Any, x: Tensor, weight: Tensor, bias: Tensor | None):
    own = [
        None if each is None else _expanded(calls, each, dim).flatten(0, 1)
        for each, dim in zip((weight, bias), in_dims[1:3], strict=True)
    ]
    return _channels(calls, x, in_dims[0]), *own


def _expanded(calls: int, tensor: Tensor, dim: int | None) -> Tensor:
    return tensor.expand(calls, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _folded(tensor: Tensor, dim: int) -> Tensor:
    """The calls and the first dimension as one."""
    return tensor.movedim(dim, 0).flatten(0, 1)


def _channels(calls: int, tensor: Tensor, dim: int | None) -> Tensor:
    """The calls and the channels as one; what is empty stays so."""
    if tensor.dim() - (dim is not None) < 4:
        return tensor.new_empty(0)
    return _expanded(calls, tensor, dim).movedim(0, 1).flatten(1, 2)
