"""Which calls the CPU kernel takes, where it pays, and what it is told; imports no framework."""

from __future__ import annotations

import ctypes
from pathlib import Path

from perfkit.kernels import _int8
from perfkit.kernels._op import Implementation, Op
from perfkit.kernels.linear_int8_static.problem import Problem
from perfkit.measure.environment import has

SOURCE = Path(__file__).with_name("cpu_kernel.cpp")
MOST_ROWS_BESIDE_TILES = 16


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
    "linear_int8_static",
    (
        Implementation("cpu", "torch", refusal, ("cpu",), slower),
        Implementation("library", "torch", lambda _problem: None),
        Implementation("cpu", "jax", refusal, ("cpu",), slower),
        Implementation("library", "jax", lambda _problem: None),
    ),
)
"""The library is oneDNN, called by `perfkit.quantization.torch_onednn`, and in JAX what XLA makes of an integer dot."""


def told(problem: Problem) -> ctypes.Array:
    """`PerfkitLinearInt8Static`."""
    return _int8.numbers(
        *(problem.rows, problem.outputs, problem.inputs, problem.activation == "relu"),
        *(_int8.KINDS[problem.x], _int8.KINDS[problem.y], problem.framework == "jax"),
        *_int8.grid_fields(problem.grid),
        *_int8.grid_fields(problem.y_grid),
    )
