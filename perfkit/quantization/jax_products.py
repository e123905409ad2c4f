"""Products of quantized weights: integers (or float8) in, exact sums, rescaled once.

Source: https://arxiv.org/abs/1712.05877, section 2.2
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from perfkit.backends.jax_autocast import trace, untraced
from perfkit.backends.jax_autocast_casting import bind
from perfkit.backends.jax_autocast_rules import precision_reason
from perfkit.backends.jax_model import Function
from perfkit.backends.jax_quantized import is_quantized, quantize, range_scale
from perfkit.backends.jax_trees import abstract, is_abstract, leaves_with_names, with_leaves
from perfkit.kernels._int8_jax import inference_only
from perfkit.quantization.jax_integers import NAME, SUMS, Product, by_library
from perfkit.quantization.jax_rewrite import Follower, contracted
from perfkit.quantization.jax_views import Faked, PackedView, View, plain, view


def quantized(function: Function, log: Callable[[str, str], None] | None = None) -> Function:
    """`function` for parameters of which some are `Quantized` or `Packed`.

    Args:
        function: a pure function of floating-point parameters.
        log: is told what became of each product while it is traced: `log(name, "")` where it ran on quantized numbers,
            `log(name, reason)` where not.
    """
    follower = Follower(Quantizing(log or _silent))

    def run(params: Any, rest: Any, *args: Any, **kwargs: Any) -> Any:
        leaves, structure = leaves_with_names(params)
        stored = {name: leaf for name, leaf in leaves if is_quantized(leaf)}
        stood_for = with_leaves(structure, [abstract(leaf) if is_quantized(leaf) else leaf for _, leaf in leaves])
        jaxpr, values, outputs = trace(function, (stood_for, rest, *args), kwargs)
        arriving = iter(stored.items())
        results = follower.evaluate(jaxpr, [view(*next(arriving)) if is_abstract(v) else v for v in values])
        return untraced(jaxpr, map(plain, results), outputs)

    return run


class Quantizing:
    """The rule that runs products in the numbers the weights are stored in."""

    keeps_derivatives = False

    def __init__(self, log: Callable[[str, str], None]):
        self.log = log

    def product(self, eqn: Any, x: Any, weight: View | PackedView, at: int) -> Any:
        if isinstance(weight, PackedView) or not weight.multiplies:
            return _in_float(eqn, plain(x), weight, at)
        reason = product_reason(eqn, at) or _scale_reason(eqn, weight, at)
        for name in weight.names:
            self.log(name, reason or "")
        if reason:
            return _in_float(eqn, plain(x), weight, at)
        x = x.value if isinstance(x, Faked) else x
        if at == 1 and weight.input_scale is not None and weight.values.dtype == jnp.int8:
            run = by_library(NAME, Product.of(eqn), weight.names, on_grid)
            return run(x, weight.values, weight.scale, weight.input_scale)
        return low_product(eqn, x, weight, at)

    def used(self, eqn: Any, weight: View | PackedView, at: int) -> None:
        """Dequantized: always right."""

    def marked(self, eqn: Any, operands: list[Any]) -> list[Any] | None:
        (x,) = operands
        if isinstance(x, View):
            return [x]  # stored as the function would have rounded it
        return [Faked(x, eqn)] if eqn.params["name"].endswith("rows") else None


def product_reason(eqn: Any, at: int) -> str | None:
    """Why a product with a weight as operand `at` cannot run in integers; None where it can."""
    dtype = eqn.invars[1 - at].aval.dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        return f"it multiplies {dtype} values"
    if eqn.primitive.name == "conv_general_dilated":
        if at == 0:
            return "it is what a convolution goes over, not its kernel"
        if eqn.params["batch_group_count"] != 1:
            return "its convolution is over groups of the batch"
    return precision_reason(eqn.params.get("precision"))


def on_grid(product: Product, x: Any, values: Any, scale: Any, x_scale: Any) -> Any:
    """A product of x, rounded to its grid, with a weight's integers."""
    summed = _summed(product, quantize(x, x_scale), values, 1)
    return _scaled(product, summed, spread(product, scale, 1) * x_scale)


def low_product(eqn: Any, x: Any, weight: View, at: int) -> Any:
    """A product in the dtype of the weight's values: int8 summed in int32, float8 in float32; result as written."""
    product, dtype = Product.of(eqn), weight.values.dtype
    rows = weight.input_scale is None
    scale = row_scale(eqn, x, 1 - at, dtype) if rows else weight.input_scale
    rounded = functools.partial(quantize, dtype=dtype)
    q = (inference_only(rounded) if dtype == jnp.int8 else rounded)(x, scale)
    factor = spread(product, weight.scale, at) * (spread(product, scale, 1 - at) if rows else scale)
    if rows and at == 1 and dtype == jnp.int8 and factor.dtype == jnp.float32:
        return _scaled(product, by_library(SUMS, product, weight.names, _float_sums)(q, weight.values), factor)
    return _scaled(product, _summed(product, q, weight.values, at), factor)


def _summed(product: Product, q: Any, values: Any, at: int) -> Any:
    wanted = jnp.int32 if values.dtype == jnp.int8 else jnp.float32
    return product.bind(*((q, values) if at == 1 else (values, q)), preferred_element_type=wanted)


def _float_sums(product: Product, q: Any, values: Any) -> Any:
    return _summed(product, q, values, 1).astype(jnp.float32)


def _scaled(product: Product, summed: Any, factor: Any) -> Any:
    return (summed.astype(factor.dtype) * factor).astype(product.dtype)


def row_scale(eqn: Any, x: Any, at: int, dtype: Any = jnp.int8) -> Any:
    """One scale for each row of the activations (each image of a convolution): 1 along all other dimensions."""
    return range_scale(jnp.max(jnp.abs(x), axis=contracted(eqn, at), keepdims=True), dtype=dtype)


def _in_float(eqn: Any, x: Any, weight: View | PackedView, at: int) -> Any:
    """A product with a dequantized weight; where it has one scale per output, the scale is applied to the outputs."""
    late = isinstance(weight, View) and weight.scale is not None and not _scale_reason(eqn, weight, at)
    late = late and product_reason(eqn, at) is None
    other = weight.values.astype(weight.dtype) if late else plain(weight)
    result = bind(eqn, [x, other] if at == 1 else [other, x])[0]
    return (result * spread(Product.of(eqn), weight.scale, at)).astype(result.dtype) if late else result


def _scale_reason(eqn: Any, weight: View, at: int) -> str | None:
    shared = all(weight.scale.shape[dim] == 1 for dim in contracted(eqn, at))
    return None if shared else "its scales differ along what the product sums over"


def spread(product: Product, scale: Any, at: int) -> Any:
    """The scales of operand `at`, 1 along what is summed over, as factors of the result."""
    numbers, rank = product["dimension_numbers"], product.rank
    if product.convolves:
        kept = (numbers.lhs_spec, numbers.rhs_spec)[at][0], numbers.out_spec[at]
        return scale.reshape([scale.shape[kept[0]] if dim == kept[1] else 1 for dim in range(rank)])
    (summed, batch) = numbers[0][at], numbers[1][at]
    free = [dim for dim in range(scale.ndim) if dim not in summed and dim not in batch]
    gap = rank - len(batch) - len(free)  # dimensions of the result that come from the other operand
    sizes = [[scale.shape[dim] for dim in dims] for dims in (batch, free)]
    middle = sizes[1] + [1] * gap if at == 0 else [1] * gap + sizes[1]
    return scale.transpose(*batch, *free, *summed).reshape(sizes[0] + middle)


def _silent(name: str, told: Any) -> None:
    """Nobody asks."""
