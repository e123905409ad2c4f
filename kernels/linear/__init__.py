"""A linear layer with its activation in one pass, for inference on CPU in torch.

    y = act(x weightᵀ + bias)

- `problem.py`: one call without its numbers.
- `reference.py`: the same in the framework's own operations, and what runs where gradients are wanted or anything looks
  on: torch.compile, autocast, torch.func, dispatch modes, profilers, tensor subclasses.
- `cpu_kernel.cpp`, `cpu_kernel.py`: the kernel, where it pays, and how it is called. It reads weights as they lie: none
  are packed, so none can be stale.
- `torch_call.py`: the way of a call. A small layer takes a microsecond or two: what a kind of call is found to be is
  remembered.

Why: one row of x reads every weight once, which oneDNN's bfloat16 product does at a third of the memory's speed, as it
repacks them at each call; and what torch multiplies float32 with leaves half of AVX-512 unused on some processors.
"""

from __future__ import annotations

from perfkit.kernels._op import Implementation, Op
from perfkit.kernels.linear.problem import Problem

__all__ = ["OP", "Problem"]


def _refusal(problem: Problem) -> str | None:
    from perfkit.kernels.linear import cpu_kernel

    return cpu_kernel.refusal(problem)


def _slower(problem: Problem) -> str | None:
    from perfkit.kernels.linear import cpu_kernel

    return cpu_kernel.slower(problem)


OP = Op(
    "linear",
    (
        Implementation("cpu", "torch", _refusal, ("cpu",), _slower),
        Implementation("library", "torch", lambda _problem: None),
    ),
)
