"""A call of the linear layer on a grid without its numbers, who takes it, what C++ is told; imports no framework."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

from perfkit.kernels import _int8
from perfkit.kernels._int8 import Grid, OfBytes
from perfkit.kernels._op import Implementation, Op
from perfkit.measure.environment import has

SOURCE = Path(__file__).with_name("cpu_kernel.cpp")
MOST_ROWS_BESIDE_TILES = 16


@dataclass(frozen=True)
class Problem(OfBytes):
    """One call, without its numbers.

    Args:
        rows, inputs, outputs: M, K and N.
        grid: of x; with a scale of 0, of which `top` alone is read, each call reads it from x, as torch's
            `choose_qparams` does.
        activation: None or "relu".
        x: "float32", or "uint8" where it is on the grid already.
        y: "float32", "bfloat16", or "uint8" on `y_grid`.
        framework: "torch", or "jax": there grids are `_int8.IN_JAX`.
        device: "cpu", or another, which the kernel does not run on.
    """

    rows: int
    inputs: int
    outputs: int
    grid: Grid
    activation: str | None = None
    x: str = "float32"
    y: str = "float32"
    y_grid: Grid | None = None
    framework: str = "torch"
    device: str = "cpu"

    @property
    def work(self) -> int:
        """Multiply-adds."""
        return self.rows * self.inputs * self.outputs

    @property
    def bucket(self) -> str:
        """The rows rounded up to a power of two, and the rest as it is."""
        rows = 1 << max(0, self.rows - 1).bit_length()
        return f"M{rows}-K{self.inputs}-N{self.outputs}-{self.activation or 'linear'}-{self.x}-{self.y}"


def refusal(problem: Problem) -> str | None:
    """Why the kernel cannot take `problem`; None where it can."""
    if not problem.work and problem.framework == "jax":
        return "something is empty"
    return _int8.refusal(problem.grid, problem.inputs)


def slower(problem: Problem) -> str | None:
    """Why the library is expected to be faster; None where it is not: of few rows reading the weights takes longest."""
    if problem.framework == "jax":
        return _int8.slower()
    if has("amx_int8") and problem.rows > MOST_ROWS_BESIDE_TILES:
        return f"above {MOST_ROWS_BESIDE_TILES} rows oneDNN multiplies on AMX's tiles"
    return _int8.slower()


OP = Op(
    "linear_on_grid",
    (
        Implementation("cpu", "torch", refusal, ("cpu",), slower),
        Implementation("library", "torch", lambda _problem: None),
        Implementation("cpu", "jax", refusal, ("cpu",), slower),
        Implementation("library", "jax", lambda _problem: None),
    ),
)
"""The library is oneDNN, called by `perfkit.quantization.torch_onednn`, and in JAX what XLA makes of an integer dot."""


def told(problem: Problem) -> ctypes.Array:
    """`PerfkitLinearInt8`."""
    return _int8.numbers(
        *(problem.rows, problem.outputs, problem.inputs, problem.activation == "relu"),
        *(_int8.KINDS[problem.x], _int8.KINDS[problem.y], problem.framework == "jax"),
        *_int8.grid_fields(problem.grid),
        *_int8.grid_fields(problem.y_grid),
    )
