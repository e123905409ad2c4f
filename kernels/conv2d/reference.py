"""`conv2d` in plain operations that torch and JAX have alike: what the other implementations are tested against.

Gradients are those of its own operations, and so follow the contract as well: of equal numbers in a window the first
one wins, a NaN beats every number, and ReLU has no gradient where its output is zero.
"""

from __future__ import annotations

import importlib
from typing import Any

from perfkit.kernels.conv2d.problem import Problem


def conv2d(problem: Problem, x: Any, weight: Any, bias: Any) -> Any:
    """y of `problem`, in the dtype of x; sums in float32, or in float64 where x is that.

    Args:
        x: (N, H, W, C), of torch or JAX.
        weight: (height, width, I / groups, O).
        bias: (O,) or None.

    Returns:
        (N, H', W', O).
    """
    xp = importlib.import_module("torch" if problem.framework == "torch" else "jax.numpy")
    wide = xp.float64 if problem.dtype == "float64" else xp.float32
    x_wide, weight, bias = (None if each is None else _cast(each, wide) for each in (x, weight, bias))
    y = _summed(problem, xp, _padded(problem, xp, x_wide), weight)
    if bias is not None:
        y = y + bias
    if problem.pool > 1:
        y = _pooled(problem, xp, y)
    if problem.activation == "relu":
        y = xp.where(y <= 0, xp.zeros_like(y), y)
    return _cast(y, x.dtype)


def _summed(problem: Problem, xp: Any, x_NHWC: Any, weight: Any) -> Any:
    """The products, summed over taps and input channels."""
    (height, width), groups = problem.conv_size, problem.groups
    exact = {} if problem.framework == "torch" else {"precision": "highest"}
    x = x_NHWC.reshape(*x_NHWC.shape[:3], groups, problem.inputs // groups)
    weight = weight.reshape(*weight.shape[:3], groups, problem.outputs // groups)
    total = 0.0
    for row in range(problem.kernel_height):
        for column in range(problem.kernel_width):
            rows = _places(row * problem.dilation[0], height, problem.stride[0])
            columns = _places(column * problem.dilation[1], width, problem.stride[1])
            total = total + xp.einsum("nhwgi,igo->nhwgo", x[:, rows, columns], weight[row, column], **exact)
    return total.reshape(problem.batch, height, width, problem.outputs)


def _pooled(problem: Problem, xp: Any, y: Any) -> Any:
    """The first of the largest numbers of each window, which gets its whole gradient; NaN where there is one."""
    (height, width), pool = problem.out_size, problem.pool
    best = None
    for row in range(pool):
        for column in range(pool):
            here = y[:, _places(row, height, pool), _places(column, width, pool)]
            best = here if best is None else xp.where((here > best) | (here != here), here, best)
    return best


def _places(first: int, count: int, step: int) -> slice:
    return slice(first, first + (count - 1) * step + 1, step)


def _padded(problem: Problem, xp: Any, x: Any) -> Any:
    top, bottom, left, right = problem.padding
    if problem.framework == "torch":
        return xp.nn.functional.pad(x, (0, 0, left, right, top, bottom))
    return xp.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))


def _cast(x: Any, dtype: Any) -> Any:
    return x.to(dtype) if hasattr(x, "data_ptr") else x.astype(dtype)
