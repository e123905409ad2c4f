"""What ops on 8-bit activations share: grids, numbers as C++ is told them, weights kept as kernels read them."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from perfkit._errors import InvalidInputError
from perfkit.kernels import _native
from perfkit.measure.environment import has

VNNI = ("avx512_vnni", "avx_vnni")
KINDS = {"float32": 0, "uint8": 1, "bfloat16": 2}
"""Dtypes as C++ is told them."""

MOST_INPUTS = (2**31 - 1) // (255 * 128) // 2
"""So many products of bytes, and what the zero of x adds to them, are sure to fit into int32."""


class OnCpu:
    """What all problems of these ops say alike, to `perfkit.kernels._op`."""

    framework, device, dtype, needs_grad = "torch", "cpu", "int8", False


class Grid(NamedTuple):
    """Unsigned integers 0...top: x is near scale (q - zero), q = round(x / scale) + zero to the nearest, then even."""

    scale: float
    zero: int
    top: int

    @classmethod
    def of(cls, given: Any) -> Grid:
        """What has these three.

        Raises:
            InvalidInputError: they are no grid of bytes.
        """
        grid = cls(float(given.scale), int(given.zero), int(given.top))
        if not (0 < grid.scale < float("inf") and 0 <= grid.zero <= grid.top <= 255 and grid.top):
            raise InvalidInputError(
                f"the grid is {tuple(grid)}: expected a positive scale, top within 1...255, zero within 0...top"
            )
        return grid


def refusal(grid: Grid, inputs: int) -> str | None:
    """Why the kernels cannot take x on such a grid, with so many products for each output; None where they can."""
    if inputs > MOST_INPUTS:
        return f"sums of {inputs} products could overflow int32: at most {MOST_INPUTS}"
    if grid.top > 127 and has("avx2") and not any(map(has, VNNI)):
        return "this CPU has no VNNI, and 16-bit sums of 8-bit activations could overflow: it takes a top of 127"
    return _native.missing()


def slower() -> str | None:
    """Why oneDNN is expected to be faster, on a CPU without AMX's tiles for bytes; None where it is not.

    On a Zen 4, with AVX512-VNNI and built for AVX2 alone, the kernels took less time than oneDNN's, each rounding
    included, on linear layers of 64 to 4096 inputs and outputs at 1 to 512 rows and on the convolutions of a ResNet and
    a VGG at 1 and 16 images, NCHW and NHWC: half to all of it where products are most of the work, and a tenth where
    calls are.
    """
    return None if has("avx2") else "it was measured on x86 CPUs with AVX2 or VNNI only"


def check(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dimensions: int) -> None:
    """What kernels rely on.

    Raises:
        InvalidInputError: tensors of other dtypes, sizes or devices.
    """
    outputs = weight.shape[:1]
    if weight.dtype != torch.int8 or weight.dim() != dimensions or not weight.numel():
        raise InvalidInputError(
            f"weight is {weight.dtype} {list(weight.shape)}: expected torch.int8 of {dimensions} dimensions"
        )
    if x.dtype not in (torch.float32, torch.uint8):
        raise InvalidInputError(f"x is {x.dtype}: expected torch.float32, or torch.uint8 on the grid")
    for name, tensor in (("weight_scale", weight_scale), ("bias", bias)):
        if tensor is not None and (tensor.dtype != torch.float32 or tensor.shape != outputs):
            raise InvalidInputError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}: expected torch.float32 {list(outputs)}"
            )
    given = [tensor for tensor in (x, weight, weight_scale, bias) if tensor is not None]
    if any(tensor.device.type != "cpu" for tensor in given):
        raise InvalidInputError(f"tensors are on {', '.join(str(each.device) for each in given)}: expected cpu")


def numbers(*fields: int | float) -> ctypes.Array:
    """A struct of 64-bit integers, and of doubles where floats are given."""
    whole = [struct.unpack("q", struct.pack("d", each))[0] if isinstance(each, float) else int(each) for each in fields]
    return (ctypes.c_int64 * len(whole))(*whole)


def grid_fields(grid: Grid | None) -> tuple[int, int, float]:
    """A grid as a struct's fields."""
    return (0, 1, 1.0) if grid is None else (grid.zero, grid.top, grid.scale)


_packed = WeakTensorKeyDictionary()
"""By integer weight: for each way to pack it, the versions that it was packed from, and that."""


def packed(weight: Tensor, scale: Tensor, way: Any, pack: Callable[[Tensor, Tensor], Tensor | None]) -> Tensor | None:
    """The weight as kernels read it, packed anew where it or its scales were written to; None where `pack` gives that.

    What was made in inference mode keeps no count of writes, and is packed at each call.
    """
    if weight.is_inference() or scale.is_inference():
        return pack(weight, scale)
    key = weight._version, scale._version, weight.data_ptr(), scale.data_ptr()
    ways = _packed.get(weight)
    if ways is None:
        ways = _packed[weight] = {}
    found = ways.get(way)
    if found is None or found[0] != key:
        found = ways[way] = key, pack(weight, scale)
    return found[1]


def pack_with(run: Any, told: Sequence[Any], size: int, weight: Tensor, scale: Tensor) -> Tensor | None:
    """What `run(*told, weight, scale, to)` writes into `size` bytes; None where a scale is not positive and finite."""
    with torch.inference_mode(False), torch.no_grad():  # kept for calls in other modes
        to = torch.empty(size, dtype=torch.uint8, device="cpu")
    fine = run(*told, weight.contiguous().data_ptr(), scale.contiguous().data_ptr(), to.data_ptr())
    return to if fine else None
