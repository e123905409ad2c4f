"""How the CPU kernel is built, which calls it takes, where it pays, and what it is told; imports no framework."""

from __future__ import annotations

from pathlib import Path

from perfkit.kernels import _native
from perfkit.kernels.linear.problem import Problem
from perfkit.measure._hardware import cpu
from perfkit.measure.environment import has

SOURCE = Path(__file__).with_name("cpu_kernel.cpp")
FLAGS = ("-ffp-contract=fast",)
"""Products and sums may round once: there is no reference in other operations to be equal to bit for bit."""

DTYPES = ("float32", "bfloat16")
LEAST_WORK = 1 << 14
"""Multiply-adds below which a call of the kernel takes no less time than torch's own: measured on a Zen 5."""

LEAST_INPUTS = 128
"""Products summed for one output from which adding up a sum's lanes is a small part of the work."""

LEAST_INPUTS_IN_JAX = 32
"""The same against XLA, measured there too. From few rows to 2048 of 1024 inputs to as many outputs the kernel took no
more time than XLA's product, mostly a half to three quarters of it, and of one row in bfloat16 a sixth."""

MOST_WEIGHTS = 1 << 22
"""Weights up to which that is so: it was of 2048 x 2048, and not of 4096 x 4096, but for few rows in bfloat16."""

FEW_ROWS = 4

MOST_ROWS = 16
"""Rows of x up to which reading the weights takes longer than multiplying with them, whatever multiplies."""

MOST_ROWS_MEASURED = {"float32": 4096, "bfloat16": 128}
"""The same where torch's own product was measured to be slower for more: on a Zen 5, whose AVX-512 MKL does not use;
oneDNN's bfloat16 product, which has no AMX there, is faster from a few hundred rows on."""

TILE_ROWS = 16
MOST_PACKED = 3 << 19
"""Bytes of the smaller operand, which is packed, that leave room in the second-level cache: with more of them oneDNN's
product on AMX, which packs as well and cuts what it reads, is faster."""


def refusal(problem: Problem) -> str | None:
    """Why the kernel cannot take `problem`; None where it can."""
    if problem.dtype not in DTYPES:
        return f"it takes {' and '.join(DTYPES)}, and the tensors are {problem.dtype}"
    if not problem.rows * problem.inputs * problem.outputs:
        return "something is empty"
    if problem.framework == "jax":
        return _refusal_in_jax(problem)
    return _native.missing()


def _refusal_in_jax(problem: Problem) -> str | None:
    wanted = "avx512_bf16" if problem.dtype == "bfloat16" else "avx512f"
    if not has(wanted):
        return f"of {problem.dtype} it wants {wanted}, which this CPU lacks"
    if missing := _native.missing():
        return missing
    from perfkit.kernels.linear.jax_op import library

    able = library().perfkit_linear_has_across(problem.dtype == "bfloat16")
    return None if able else f"the C++ compiler builds without {wanted}"


def slower(problem: Problem) -> str | None:
    """Why the framework's own product is expected to be as fast; None where it is not."""
    if problem.framework == "jax":
        return _slower_in_jax(problem)
    if problem.work < LEAST_WORK or problem.inputs < LEAST_INPUTS:
        return f"{problem.rows} rows of {problem.inputs} inputs to {problem.outputs} are too little work to gain by it"
    if not has("avx512f"):
        return "it was measured with AVX-512 only"
    if problem.dtype == "bfloat16" and not has("avx512_bf16"):
        return "this CPU has no bfloat16 instructions"
    if problem.dtype == "bfloat16" and has("amx_bf16") and problem.rows >= TILE_ROWS:
        return _too_large(problem)
    others = "Intel" in cpu()[0] or has("amx_bf16")
    most = MOST_ROWS if others else MOST_ROWS_MEASURED[problem.dtype]
    return f"above {most} rows torch's own product is as fast" if problem.rows > most else None


def _slower_in_jax(problem: Problem) -> str | None:
    if problem.inputs < LEAST_INPUTS_IN_JAX:
        return f"{problem.inputs} inputs are too little work to gain by it"
    half = problem.dtype == "bfloat16"
    if half and has("amx_bf16") and problem.rows >= TILE_ROWS:
        return _too_large(problem)
    if problem.inputs * problem.outputs > MOST_WEIGHTS and not (half and problem.rows <= FEW_ROWS):
        return f"above {MOST_WEIGHTS} weights, which no cache holds, XLA's product is as fast"
    if half:
        return None
    if ("Intel" in cpu()[0] or has("amx_bf16")) and problem.rows > MOST_ROWS:
        return f"above {MOST_ROWS} rows XLA's product is as fast"
    return None


def _too_large(problem: Problem) -> str | None:
    """Why oneDNN is faster on tiles; None where it is not."""
    packed = 2 * min(problem.rows, problem.outputs) * problem.inputs
    return f"{packed} bytes to pack are more than the cache holds" if packed > MOST_PACKED else None


def shape(problem: Problem) -> tuple[int, ...]:
    """The fields of `PerfkitLinear`, in order."""
    jax, half = problem.framework == "jax", problem.dtype == "bfloat16"
    wide = jax and problem.weight_dtype == "float32", jax and problem.out_dtype == "float32"
    return problem.rows, problem.outputs, problem.inputs, problem.activation == "relu", half, jax, *wide
