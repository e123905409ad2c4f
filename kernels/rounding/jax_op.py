"""The cast in JAX: with gradients, under vmap and in sharded programs."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from perfkit.kernels import _native
from perfkit.kernels._jax import by_rows, device_of, processors

HANDLER = "perfkit_rounding_xla"


def takes(x: Array) -> bool:
    """Whether `rounded` can run: on a CPU, where there is a C++ compiler."""
    return x.dtype == jnp.float32 and x.ndim > 0 and device_of(x) == "cpu" and _native.missing() is None


@jax.custom_jvp
def rounded(x: Array) -> Array:
    """x in bfloat16, as `x.astype` has it.

    Args:
        x: float32, of one dimension at least, the first being the rows.
    """
    return _by_rows(x)[0]


@rounded.defjvp
def _derivative(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return rounded(*primals), tangents[0].astype(jnp.bfloat16)


def _run(x: Array) -> tuple[Array]:
    from perfkit.kernels import _ffi

    _ffi.register(Path(__file__).with_name("cpu_ffi.cpp"), (HANDLER,))
    call = jax.ffi.ffi_call(HANDLER, jax.ShapeDtypeStruct(x.shape, jnp.bfloat16))
    return (call(x, threads=np.int64(processors())),)


_by_rows = by_rows(_run, (0,), (0,))
