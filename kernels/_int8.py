"""What ops on 8-bit activations share: grids, what the kernels take, numbers as C++ is told them."""

from __future__ import annotations

import ctypes
import struct
from typing import Any, NamedTuple

from perfkit._errors import InvalidInputError
from perfkit.kernels import _native
from perfkit.measure.environment import has

VNNI = ("avx512_vnni", "avx_vnni")
KINDS = {"float32": 0, "uint8": 1, "bfloat16": 2}
"""Dtypes as C++ is told them."""

MOST_INPUTS = (2**31 - 1) // (255 * 128) // 2
"""So many products of bytes, and what the zero of x adds to them, are sure to fit into int32."""


class OfBytes:
    """What all problems of these ops say alike, to `perfkit.kernels._op`."""

    dtype, needs_grad = "int8", False


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


IN_JAX = Grid(1.0, 127, 254)
"""Of JAX's symmetric grids, -127 to 127, what is known when a call is traced: scales are numbers of the program."""


def slower() -> str | None:
    """Why oneDNN is expected to be faster, on a CPU without AMX's tiles for bytes; None where it is not.

    On a Zen 4, with AVX512-VNNI and built for AVX2 alone, the kernels took less time than oneDNN's, each rounding
    included, on linear layers of 64 to 4096 inputs and outputs at 1 to 512 rows and on the convolutions of a ResNet and
    a VGG at 1 and 16 images, NCHW and NHWC: half to all of it where products are most of the work, and a tenth where
    calls are.
    """
    return None if has("avx2") else "it was measured on x86 CPUs with AVX2 or VNNI only"


def numbers(*fields: int | float) -> ctypes.Array:
    """A struct of 64-bit integers, and of doubles where floats are given."""
    whole = [struct.unpack("q", struct.pack("d", each))[0] if isinstance(each, float) else int(each) for each in fields]
    return (ctypes.c_int64 * len(whole))(*whole)


def grid_fields(grid: Grid | None) -> tuple[int, int, float]:
    """A grid as a struct's fields."""
    return (0, 1, 1.0) if grid is None else (grid.zero, grid.top, grid.scale)
