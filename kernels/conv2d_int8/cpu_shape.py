"""Which calls the CPU kernel takes, where it pays, and what it is told; imports no framework."""

from __future__ import annotations

import ctypes
from pathlib import Path

from perfkit.kernels import _int8
from perfkit.kernels._op import Implementation, Op
from perfkit.kernels.conv2d_int8.problem import Problem
from perfkit.measure.environment import has

SOURCE = Path(__file__).with_name("cpu_kernel.cpp")
FEW_CHANNELS = 4
"""Input channels up to which lanes are places, and above which oneDNN fills AMX's tiles; `FEW` in C++."""


def refusal(problem: Problem) -> str | None:
    """Why the kernel cannot take `problem`; None where it can."""
    if problem.sizes.groups > 1:
        return f"it takes one group, and this has {problem.sizes.groups}"
    return _int8.refusal(problem.grid, problem.sizes.taps)


def slower(problem: Problem) -> str | None:
    """Why the library is expected to be faster; None where it is not."""
    if problem.framework == "jax":
        return _int8.slower()
    if has("amx_int8") and problem.sizes.inputs > FEW_CHANNELS:
        return "oneDNN multiplies on AMX's tiles"
    return _int8.slower()


OP = Op(
    "conv2d_int8",
    (
        Implementation("cpu", "torch", refusal, ("cpu",), slower),
        Implementation("library", "torch", lambda _problem: None),
        Implementation("cpu", "jax", refusal, ("cpu",), slower),
        Implementation("library", "jax", lambda _problem: None),
    ),
)
"""The library is oneDNN, called by `perfkit.quantization.torch_onednn`, and in JAX XLA's integer convolution."""


def told(problem: Problem) -> ctypes.Array:
    """`PerfkitConv2dInt8`."""
    sizes = problem.sizes
    return _int8.numbers(
        *(sizes.batch, sizes.inputs, sizes.height, sizes.width, sizes.outputs),
        *(sizes.kernel_height, sizes.kernel_width, *sizes.stride, sizes.padding[0], sizes.padding[2]),
        *(*sizes.dilation, sizes.pool, *sizes.out_size, sizes.activation == "relu"),
        *(_int8.KINDS[problem.x], _int8.KINDS[problem.y], problem.x_last, problem.y_last),
        problem.framework == "jax",
        *_int8.grid_fields(problem.grid),
        *_int8.grid_fields(problem.y_grid),
    )
