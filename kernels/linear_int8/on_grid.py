"""The linear layer of 8-bit activations on a grid that is known before the call, for inference on x86 CPUs.

    q = clamp(round(x / scale) + zero, 0, top),    y = act(float(Σ (q - zero) w) scale w_scale + bias)

Sums are exact int32; what follows is float32, each operation rounded once, in that order: results are equal to
`reference` bit for bit on every processor. Divisions by the scale are products with its inverse, as in torch. NaN in x
becomes the q of 0, an infinity one of the grid's ends.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from perfkit._errors import InvalidInputError, UnsupportedError
from perfkit.kernels import _int8_torch, _native
from perfkit.kernels._int8 import Grid
from perfkit.kernels._torch import Threads
from perfkit.kernels.linear_int8.grid_shape import SOURCE, Problem, refusal, told

Call = Callable[[Tensor, Tensor, "Tensor | None"], "Tensor | None"]


def linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    grid: Any,
    activation: str | None = None,
    out_grid: Any = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """act(x wᵀ + bias), x rounded to the grid and w int8, by the C++ kernel.

    Args:
        x: (..., K), float32; or uint8, on the grid.
        weight: (N, K), int8.
        weight_scale: (N,), float32, positive.
        bias: (N,), float32, or None.
        grid: of x: something with `scale`, `zero` and `top`.
        activation: None or "relu".
        out_grid: of y, uint8; None for floats.
        out_dtype: of y without a grid: float32 or bfloat16.

    Returns:
        y: (..., N).

    Raises:
        InvalidInputError: sizes, dtypes or options that do not go together.
        UnsupportedError: the kernel cannot be built here, or its sums could overflow.
    """
    _int8_torch.check(x, weight, weight_scale, bias, 2)
    if activation not in (None, "relu"):
        raise InvalidInputError(f"activation is {activation!r}: expected None or 'relu'")
    if x.dim() < 1 or x.size(-1) != weight.size(1):
        raise InvalidInputError(
            f"x has shape {list(x.shape)} and weight {list(weight.shape)}: expected (..., K), (N, K)"
        )
    y_grid = None if out_grid is None else Grid.of(out_grid)
    if out_dtype not in (torch.float32, torch.bfloat16):
        raise InvalidInputError(f"out_dtype is {out_dtype}: expected torch.float32 or torch.bfloat16")
    kinds = [str(dtype).removeprefix("torch.") for dtype in (x.dtype, torch.uint8 if y_grid else out_dtype)]
    made = Problem(prod(x.shape[:-1]), weight.size(1), weight.size(0), Grid.of(grid), activation, *kinds, y_grid)
    if why := refusal(made):
        raise UnsupportedError(f"the int8 linear kernel does not take this call: {why}")
    if (kept := packed(weight, weight_scale)) is None:
        raise InvalidInputError("weight_scale is not positive and finite throughout")
    return caller(made, tuple(x.shape[:-1]))(x.contiguous(), kept, None if bias is None else bias.contiguous())


def reference(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    grid: Any,
    activation: str | None = None,
    out_grid: Any = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The same in plain torch operations, with exact sums in float64."""
    q = x if x.dtype == torch.uint8 else rounded(x, grid)
    sums = (q.double() - grid.zero) @ weight.double().t()
    return finished(sums, grid, weight_scale, bias, activation, out_grid, out_dtype)


def rounded(x: Tensor, grid: Any) -> Tensor:
    """The q of x, uint8, in the order of torch's `quantize_per_tensor`."""
    return x.float().mul(1.0 / grid.scale).round_().add_(grid.zero).clamp_(0, grid.top).nan_to_num_(0).to(torch.uint8)


def finished(sums, grid, weight_scale, bias, activation, out_grid, out_dtype) -> Tensor:
    """What is done with sums whose last dimension is the outputs'."""
    y = sums.float() * torch.tensor(grid.scale, dtype=torch.float32) * weight_scale
    y = y if bias is None else y + bias
    y = y.relu() if activation == "relu" else y
    return y.to(out_dtype) if out_grid is None else rounded(y, out_grid)


@functools.cache
def library() -> ctypes.CDLL:
    """The kernel, built at the first use.

    Raises:
        UnsupportedError: there is no C++ compiler, or it fails.
    """
    found = _native.load(SOURCE)
    found.perfkit_linear_int8.argtypes = (*(ctypes.c_void_p,) * 5, Threads)
    found.perfkit_linear_int8_pack.argtypes = (ctypes.c_int64, ctypes.c_int64, *(ctypes.c_void_p,) * 3)
    found.perfkit_linear_int8_packed_bytes.argtypes = (ctypes.c_int64, ctypes.c_int64)
    found.perfkit_linear_int8_packed_bytes.restype = ctypes.c_int64
    found.perfkit_linear_int8_instructions.restype = ctypes.c_char_p
    return found


def packed(weight: Tensor, weight_scale: Tensor) -> Tensor | None:
    """The weight as the kernel reads it, kept; None where a scale is not positive and finite."""
    return _int8_torch.packed(weight, weight_scale, "linear", _pack)


def _pack(weight: Tensor, scale: Tensor) -> Tensor | None:
    sizes = tuple(weight.shape)
    size = library().perfkit_linear_int8_packed_bytes(*sizes)
    return _int8_torch.pack_with(library().perfkit_linear_int8_pack, sizes, size, weight, scale)


@functools.lru_cache(maxsize=4096)
def caller(problem: Problem, leading: tuple[int, ...]) -> Call:
    """y of (*leading, N) from x of (*leading, K), all dense, and the packed weight; None where x has no range."""
    numbers, run, threads = told(problem), library().perfkit_linear_int8, Threads.of_torch
    size, dtype, empty = (*leading, problem.outputs), getattr(torch, problem.y), torch.empty
    device = torch.device("cpu")  # whatever the default device is

    def call(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = empty(size, dtype=dtype, device=device)
        at = None if bias is None else bias.data_ptr()
        failed = problem.rows and run(numbers, x.data_ptr(), weight.data_ptr(), at, y.data_ptr(), threads())
        if failed == 1:
            raise MemoryError("the int8 linear kernel found no memory for its working space")
        return None if failed else y

    return call
