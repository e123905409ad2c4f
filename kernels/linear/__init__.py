"""A linear layer with its activation in one pass, for inference on CPU.

    y = act(x weightᵀ + bias)

- `problem.py`: one call without its numbers.
- `reference.py`: the same in the framework's own operations, and what runs where gradients are wanted or anything looks
  on: torch.compile, autocast, torch.func, dispatch modes, profilers, tensor subclasses.
- `cpu_kernel.cpp`, `cpu_across.hpp`, `cpu_tiles.hpp`: the kernel, on vectors for weights as torch has them and as JAX
  has them, and on AMX's tiles. It reads weights as they lie at each call: none are kept, so none can be stale.
  `cpu_kernel.py` and `cpu_ffi.cpp` bind it to torch and JAX.
- `cpu_shape.py`: which calls it takes, where it pays, and what it is told.
- `jax_op.py`: the layer in JAX, with gradients.
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
    from perfkit.kernels.linear import cpu_shape

    return cpu_shape.refusal(problem)


def _slower(problem: Problem) -> str | None:
    from perfkit.kernels.linear import cpu_shape

    return cpu_shape.slower(problem)


OP = Op(
    "linear",
    (
        Implementation("cpu", "torch", _refusal, ("cpu",), _slower),
        Implementation("library", "torch", lambda _problem: None),
        Implementation("cpu", "jax", _refusal, ("cpu",), _slower),
        Implementation("library", "jax", lambda _problem: None),
    ),
)
