"""A linear layer on 8-bit integers: exact int32 sums; scales, bias and activation in the same pass; for inference.

    y = act(s_x s_w (q_x · q_wᵀ) + bias)

q_w, the weight, is int8 with one scale for each output. q_x is int8 with one scale, or one for each row; or is made
here of a float x, row by row, in float32: s_x = max|x| / 127, q_x = x · (127 / max|x|) rounded to nearest, then even.
A row that holds an infinite or NaN number gives NaN everywhere, and a row below 1e-30 gives act(bias). Of an x whose
grid is known before the call: `linear_int8_static`.

- `problem.py`: one call without its numbers, checked once.
- `reference.py`: exact integers in plain operations.
- `cpu_kernel.py`: what computes such sums fast and without saturation on this CPU.
- `triton_kernel.py`, `triton_product.py`: for GPU.
- `torch_op.py`: `torch.ops.perfkit.linear_int8`. `jax_op.py`: JAX.
- `cases.py`: the sizes of all tests and benchmarks.

Source: https://arxiv.org/abs/1712.05877, section 2.2
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from perfkit._errors import InvalidInputError
from perfkit.kernels._op import Implementation, Op
from perfkit.kernels.linear_int8.problem import Problem

__all__ = ["OP", "Problem", "linear_int8"]


def linear_int8(
    x: Any,
    weight: Any,
    weight_scale: Any,
    bias: Any = None,
    *,
    x_scale: Any = None,
    activation: str | None = None,
    out_dtype: Any = None,
    implementation: str | None = None,
) -> Any:
    """act((x · weightᵀ) x_scale weight_scale + bias), the product summed in int32.

    Args:
        x: (..., K), int8; or float32, bfloat16 or float16, which is quantized row by row. A torch tensor or JAX array.
        weight: (N, K), int8, K at most 131071: longer sums might not fit into int32.
        weight_scale: (N,), float32.
        bias: (N,), a float dtype, or None.
        x_scale: of an int8 x: a number, or an array of one, of x's shape without K, or with 1 for K; float32. None of
            a float x.
        activation: None or "relu".
        out_dtype: of y: float32 (None), bfloat16 or float16, of the framework.
        implementation: "triton", "cpu", "library" (torch._int_mm on a GPU, XLA's integer dot in JAX) or "reference";
            None to have it picked.

    Returns:
        y: (..., N), in out_dtype. Sums are exact; what follows them is float32.

    There are no gradients, and asking for one is an error.

    Raises:
        InvalidInputError: shapes, dtypes or options that do not go together.
        UnsupportedError: `implementation` cannot take the call, or a gradient is asked for.

    Example:
        >>> scale = w.abs().amax(1) / 127
        >>> y = linear_int8(x, (w / scale[:, None]).round().to(torch.int8), scale, bias, activation="relu")

    Source: https://arxiv.org/abs/1712.05877, section 2.2
    """
    if (torch := sys.modules.get("torch")) and isinstance(x, torch.Tensor):
        from perfkit.kernels.linear_int8 import torch_op as framework
    elif (jax := sys.modules.get("jax")) and isinstance(x, jax.Array):
        from perfkit.kernels.linear_int8 import jax_op as framework
    else:
        raise InvalidInputError(f"x is a {type(x).__name__}: expected a torch tensor or a JAX array")
    return framework.run(x, weight, weight_scale, bias, x_scale, activation, out_dtype, implementation)


def _asked(module: str) -> Callable[[Problem], str | None]:
    """A refusal that is looked up in a module of this folder when it is first asked for."""

    def refusal(problem: Problem) -> str | None:
        return import_module(f"{__name__}.{module}").refusal(problem)

    return refusal


def _int_mm(problem: Problem) -> str | None:
    """What torch._int_mm asks for on a GPU."""
    if problem.rows <= 16 or problem.inputs % 8 or problem.outputs % 8:
        return (
            f"torch._int_mm takes more than 16 rows and multiples of 8, and this is {problem.rows} rows, "
            f"{problem.inputs} inputs, {problem.outputs} outputs"
        )
    return None


def _never(_problem: Problem) -> None:
    """The refusal of an implementation that takes every problem."""


OP = Op(
    "linear_int8",
    (
        Implementation("triton", "torch", _asked("triton_kernel"), ("cuda",)),
        Implementation("cpu", "torch", _never, ("cpu",)),
        Implementation("library", "torch", _int_mm, ("cuda",)),
        Implementation("reference", "torch", _never),
        Implementation("library", "jax", _never),
        Implementation("reference", "jax", _never),
    ),
)
