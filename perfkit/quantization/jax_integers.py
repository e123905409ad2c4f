"""Products of quantized weights with activations on a known grid, as they stand in programs: found, and run in kernels.

Each is a function of its own, of XLA's operations, that whoever reads the program finds by its name
(`jax_integer_layers.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from perfkit.backends.jax_fused_conv import layout_refusal
from perfkit.kernels import _int8_jax as shared
from perfkit.kernels._op import Choice
from perfkit.kernels.conv2d.problem import options
from perfkit.kernels.conv2d_int8 import jax_op as convolution
from perfkit.kernels.linear_int8_static import jax_op as linear

NAME = "perfkit_int8_product_"
"""How the names of the functions begin, whose arguments are x, the weight's integers, its scales and that of x."""

SUMS = "perfkit_int8_sums_"
"""The same where x has a scale for each row, which is multiplied with behind them: of x's integers and the weight's."""

_RESULTS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Product:
    """An equation that multiplies x with a weight, which is its second operand.

    Args:
        primitive: `dot_general` or `conv_general_dilated`.
        params: of the equation, as it was written.
        rank, dtype: of its result.
    """

    primitive: Any
    params: tuple[tuple[str, Any], ...]
    rank: int
    dtype: Any

    @classmethod
    def of(cls, eqn: Any) -> Product:
        result = eqn.outvars[0].aval
        return cls(eqn.primitive, tuple(sorted(eqn.params.items())), result.ndim, result.dtype)

    def bind(self, *operands: Any, **changes: Any) -> Any:
        """The equation on new operands, with some of its parameters changed."""
        return self.primitive.bind(*operands, **self.primitive.get_bind_params({**dict(self.params), **changes}))

    @property
    def convolves(self) -> bool:
        return self.primitive.name == "conv_general_dilated"

    def __getitem__(self, name: str) -> Any:
        return dict(self.params)[name]

    def refusal(self, x: Any, weight: Any) -> str | None:
        """Why no kernel takes the product of arrays like these, by its form; None where one may."""
        if self.convolves:
            return layout_refusal(dict(self.params), x.ndim)
        batched = self["dimension_numbers"][1]
        return "its weights are several matrices, of which each has its rows" if any(batched) else None

    def problem(
        self,
        device: str,
        x: Any,
        weight: Any,
        activation: str | None = None,
        pool: int | None = None,
        x_dtype: str = "float32",
        y: str = "",
    ) -> Any:
        """The kernel's problem, of arrays like these; `x_dtype` and `y` as it has them, y the equation's by default.

        Raises:
            InvalidInputError: nothing is left of such an image.
        """
        y = y or (str(self.dtype) if str(self.dtype) in _RESULTS else "float32")
        if self.convolves:
            given = options(
                *(self["window_strides"], self["padding"], self["rhs_dilation"], self["feature_group_count"]),
                *(activation, pool),
            )
            return convolution.problem(device, x.shape, x_dtype, weight.shape, given, y)
        (x_dims, w_dims), _ = self["dimension_numbers"]
        inputs = prod(x.shape[dim] for dim in x_dims)
        outputs = prod(size for dim, size in enumerate(weight.shape) if dim not in w_dims)
        rows = prod(size for dim, size in enumerate(x.shape) if dim not in x_dims)
        return linear.problem(device, (rows, inputs), x_dtype, (inputs, outputs), activation, y)

    def choice(self, problem: Any, *, recorded: bool = True) -> Choice:
        """Who computes it."""
        return (convolution.OP if self.convolves else linear.OP).choose(problem, recorded=recorded)

    def run(
        self, problem: Any, x: Any, values: Any, scale: Any, x_scale: Any, bias: Any = None, y_scale: Any = None
    ) -> Any:
        """y by the kernel, in the form that the equation gives it, but for its dtype."""
        x = x if x.dtype == jnp.uint8 else x.astype(jnp.float32)
        if self.convolves:
            scales = jnp.broadcast_to(scale.reshape(-1), values.shape[-1:])
            return convolution.by_choice(problem, True, x, values, scales, x_scale, bias, y_scale)
        (x_dims, w_dims), _ = self["dimension_numbers"]
        x_free, w_free = (
            [dim for dim in range(a.ndim) if dim not in dims] for a, dims in ((x, x_dims), (values, w_dims))
        )
        rows, outputs = [x.shape[dim] for dim in x_free], [values.shape[dim] for dim in w_free]
        matrix = values.transpose(*w_dims, *w_free).reshape(problem.inputs, problem.outputs)
        sizes = [values.shape[dim] if dim in w_free else 1 for dim in range(values.ndim)]
        scales = jnp.broadcast_to(scale, sizes).transpose(*w_dims, *w_free).reshape(problem.outputs)
        flat = x.transpose(*x_free, *x_dims).reshape(problem.rows, problem.inputs)
        y = linear.by_choice(problem, True, flat, matrix, scales, x_scale, bias, y_scale)
        return y.reshape(*rows, *outputs)


@functools.lru_cache(maxsize=1024)
def by_library(kind: str, product: Product, names: tuple[str, ...], run: Callable[..., Any]) -> Callable[..., Any]:
    """`run(product, *arguments)`, XLA's operations, as a function that is found by its name.

    Args:
        kind: `NAME` or `SUMS`.
        names: of the weights.
    """
    once = shared.inference_only(functools.partial(run, product))

    def marked(*arguments: Any) -> Any:
        return once(*arguments)

    marked.__name__ = kind + ",".join(names)
    return jax.jit(marked)


def weights_of(eqn: Any, kinds: tuple[str, ...] = (NAME,)) -> str | None:
    """The names of the weights that an equation multiplies with, where it is such a function; None where it is not."""
    name = eqn.params["name"] if eqn.primitive.name in ("jit", "pjit") else ""
    return next((name.removeprefix(kind) for kind in kinds if name.startswith(kind)), None)


def product_in(eqn: Any) -> Product:
    """The product that such a function is of, with the dtype of its result."""
    return replace(Product.of(_product(eqn.params["jaxpr"].jaxpr)), dtype=eqn.outvars[0].aval.dtype)


def _product(jaxpr: Any) -> Any:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            return eqn
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", None)
            if inner is not None and (found := _product(inner)) is not None:
                return found
    return None
