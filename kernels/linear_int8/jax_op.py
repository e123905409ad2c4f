"""The op in JAX: XLA's integer dot with the rest of the layer behind it, for inference.

Plain operations, so jit, vmap, scan and sharding see through them; there is one integer dot in the HLO. A derivative
would come out as a wrong number, as rounding has none: asking for one is an error.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from perfkit._errors import InvalidInputError, UnsupportedError
from perfkit.kernels import linear_int8 as op
from perfkit.kernels._jax import device_of
from perfkit.kernels.linear_int8 import reference
from perfkit.kernels.linear_int8.problem import Problem, problem


def run(x, weight, weight_scale, bias, x_scale, activation, out_dtype, implementation) -> jax.Array:
    """See `perfkit.kernels.linear_int8.linear_int8`."""
    if isinstance(x_scale, (int, float)) and not isinstance(x_scale, bool):
        x_scale = jnp.float32(x_scale)
    arrays = {"x": x, "weight": weight, "weight_scale": weight_scale, "bias": bias, "x_scale": x_scale}
    there = {name: array for name, array in arrays.items() if array is not None}
    for name, array in there.items():
        if not hasattr(array, "dtype") or not hasattr(array, "shape"):
            raise InvalidInputError(f"{name} is a {type(array).__name__}: expected a JAX array, as x is")
    made = problem(
        "jax",
        device_of(x),
        shapes={name: array.shape for name, array in there.items()},
        dtypes={name: str(array.dtype) for name, array in there.items()},
        activation=activation,
        out_dtype=str(jnp.dtype(out_dtype or jnp.float32)),
    )
    choice = op.OP.choose(made, implementation)
    rows = x.reshape(made.rows, made.inputs)
    bias = None if bias is None else bias.astype(jnp.float32)
    x_scale = None if x_scale is None else x_scale.reshape(-1, 1)
    y = _linear(made, choice.implementation, rows, weight, weight_scale, bias, x_scale)
    return y.astype(made.out_dtype).reshape(*x.shape[:-1], made.outputs)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _linear(made: Problem, implementation: str, x, weight, weight_scale, bias, x_scale) -> jax.Array:
    if implementation == "reference":
        return reference.linear_int8(made, x, weight, weight_scale, bias, x_scale)
    if x_scale is None:
        q, x_scale = reference.quantize(jnp, x.astype(jnp.float32))
        x = q.astype(jnp.int8)
    sums = jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    return reference.finish(made, jnp, sums.astype(jnp.float32), x_scale, weight_scale, bias)


@_linear.defjvp
def _no_gradient(_made: Problem, _implementation: str, _primals: Any, _tangents: Any) -> Any:
    raise UnsupportedError(
        "linear_int8 is for inference: rounding has no gradient. Wrap its inputs in jax.lax.stop_gradient, or train "
        "with the qat recipe"
    )
