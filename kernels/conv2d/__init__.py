"""A 2-D convolution with bias, ReLU and max-pool in one pass: the convolution's own output is never in memory.

    y = maxpool_P(act(conv(x, weight) + bias))

- `problem.py`: sizes and options, checked once.
- `reference.py`: the same in plain operations.
- `cpu_kernel.cpp`: the kernel for CPU, in headers; `cpu_kernel.py` and `cpu_ffi.cpp` bind it to torch and JAX.
- `cpu_shape.py`: which calls it takes, where it pays, and what it is told.
- `triton_kernel.py`, `pallas_kernel.py`: for GPU and TPU; `triton_launch.py`: how the former's kernels are launched.
- `torch_call.py`: the way of a call in torch; `torch_problem.py`, `torch_run.py`, `torch_op.py`, `torch_batch.py`: its
  checks, who computes it, gradients and what compilers need to know, vmap. `jax_op.py`: all that in JAX.

A kernel module has these functions; `problem` tells everything but the numbers:

    refusal(problem), slower(problem) -> str | None
    forward(problem, x, weight, bias, configuration=()) -> y, argmax
    backward(problem, x, weight, argmax, d_y, wanted, configuration=()) -> d_x, d_weight, d_bias

torch: x, y, their gradients and argmax are dense, contiguous or channels_last by `problem.channels_last`; weight is
contiguous OIHW. JAX: NHWC and HWIO. argmax is uint8 of y's shape: where in its window (row * P + column) the output
came from, `DEAD` where ReLU cut it; None unless `problem.saves_argmax`. `wanted`: three bools; what is not wanted, and
the gradient of a bias that is not there, is None. Sums are float32; results have the dtype of x.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from perfkit._errors import InvalidInputError
from perfkit.kernels._op import Implementation, Op
from perfkit.kernels.conv2d.problem import LARGEST_POOL, Problem

__all__ = ["OP", "conv2d"]


def conv2d(
    x: Any,
    weight: Any,
    bias: Any = None,
    *,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    activation: str | None = None,
    pool: int | None = None,
    implementation: str | None = None,
) -> Any:
    """maxpool(act(conv(x, weight) + bias)), with gradients for x, weight and bias.

    Args:
        x: torch: (N, C, H, W), contiguous or channels_last; JAX: (N, H, W, C). float32, bfloat16, float16, or float64
            (the library and the reference only).
        weight: torch: (O, C / groups, height, width); JAX: (height, width, C / groups, O). x's dtype, as is bias.
        bias: (O,) or None.
        stride, dilation: an integer or (vertical, horizontal).
        padding: zeros around x: an integer, (vertical, horizontal), ((top, bottom), (left, right)), "valid", or "same",
            which makes ceil(size / stride) outputs, the odd zero below and right.
        groups: of channels that see only each other.
        activation: None or "relu".
        pool: None, or k for a k x k max-pool with stride k after the activation, without padding; it cuts off what does
            not fill a window.
        implementation: "cpu", "triton", "pallas", "library" or "reference"; None for the fastest known.

    Returns:
        y: (N, O, H', W') in x's memory format (torch), or (N, H', W', O) (JAX); in x's dtype. Sums are float32.
        NaN in a window makes its output NaN; of equal numbers the first one gets the gradient.

    Raises:
        InvalidInputError: ranks, sizes, dtypes or options that do not go together, or an empty output.
        UnsupportedError: `implementation` cannot take the call, or it is differentiated twice and is a kernel of ours.

    Example:
        >>> y = conv2d(torch.randn(64, 1, 28, 28), torch.randn(32, 1, 3, 3), activation="relu", pool=2)
        >>> y.shape
        torch.Size([64, 32, 13, 13])

    Source: https://arxiv.org/abs/1410.0759 (convolution as a matrix product), computed over pooled outputs
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        from perfkit.kernels.conv2d import torch_call

        call = torch_call.conv2d
    elif "jax" in sys.modules and isinstance(x, sys.modules["jax"].Array):
        from perfkit.kernels.conv2d import jax_op

        call = jax_op.conv2d
    else:
        raise InvalidInputError(
            f"x is {type(x).__module__}.{type(x).__qualname__}: expected a torch tensor or JAX array"
        )
    return call(x, weight, bias, stride, padding, dilation, groups, activation, pool, implementation)


def _asked(module: str, question: str = "refusal") -> Callable[[Problem], str | None]:
    """A question to a kernel's module, which is imported when it is first asked."""

    def answer(problem: Problem) -> str | None:
        return _shared(problem) or getattr(import_module(f"{__name__}.{module}"), question)(problem)

    return answer


def _shared(problem: Problem) -> str | None:
    """What no kernel of ours takes."""
    if problem.dtype == "float64":
        return "it sums in float32, and the tensors are float64"
    if problem.pool > LARGEST_POOL:
        return f"the pool is {problem.pool}, and at most {LARGEST_POOL} fits into what it saves for the backward pass"
    return None


def _everything(_problem: Problem) -> str | None:
    return None


OP = Op(
    "conv2d",
    (
        Implementation("triton", "torch", _asked("triton_kernel"), ("cuda",), _asked("triton_kernel", "slower")),
        Implementation("cpu", "torch", _asked("cpu_shape"), ("cpu",), _asked("cpu_shape", "slower")),
        Implementation("library", "torch", _everything),
        Implementation("reference", "torch", _everything),
        Implementation("pallas", "jax", _asked("pallas_kernel"), ("tpu",)),
        Implementation("cpu", "jax", _asked("cpu_shape"), ("cpu",), _asked("cpu_shape", "slower")),
        Implementation("library", "jax", _everything),
        Implementation("reference", "jax", _everything),
    ),
)
