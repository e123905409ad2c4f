"""Fake quantization: floating-point arithmetic on rounded weights and activations, with straight-through gradients.

Both roundings are functions of their own with names that begin with `MARK`, so that whoever quantizes the trained
model finds them in its jaxpr, and puts real integers in their place.

Source: https://arxiv.org/abs/1712.05877, section 3; straight-through: https://arxiv.org/abs/1308.3432
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from perfkit.backends.jax_autocast import trace, untraced
from perfkit.backends.jax_autocast_casting import bind
from perfkit.backends.jax_model import Function
from perfkit.backends.jax_quantized import dequantize, quantize, weight_scale
from perfkit.backends.jax_trees import array_names
from perfkit.quantization.jax_products import product_reason
from perfkit.quantization.jax_rewrite import MARK, Follower, contracted
from perfkit.quantization.jax_views import PackedView, View, plain, view


def fake_quantized(function: Function, axes: Mapping[str, tuple[int, ...]], bits: int) -> Function:
    """`function` as if it were quantized: the numbers of `int8_dynamic`, in floating point.

    Args:
        function: a pure function of floating-point parameters.
        axes: the parameters to round, each with the dimensions along which entries share a scale.
        bits: of the weights; activations have 8.
    """
    follower = Follower(_Faking())

    def run(params: Any, rest: Any, *args: Any, **kwargs: Any) -> Any:
        jaxpr, values, outputs = trace(function, (params, rest, *args), kwargs)
        named = array_names(params)
        rounded = [
            view(name, fake("weight", bits, axes[name])(value)) if name in axes else value
            for name, value in zip(named, values, strict=False)
        ]
        results = follower.evaluate(jaxpr, [*rounded, *values[len(named) :]])
        return untraced(jaxpr, map(plain, results), outputs)

    return run


@functools.cache
def fake(kind: str, bits: int, axes: tuple[int, ...]) -> Callable[[Any], Any]:
    """A function that rounds to `bits`, with one scale for what differs along `axes`; its gradient is that of x → x.

    Args:
        kind: "weight" or "rows".
    """

    @jax.custom_jvp
    def rounded(x: Any) -> Any:
        scale = weight_scale(x, axes, bits)
        return dequantize(quantize(x, scale, bits), scale, x.dtype)

    rounded.defjvp(lambda primals, tangents: (rounded(*primals), *tangents))

    def marked(x: Any) -> Any:
        return rounded(x)

    marked.__name__ = f"{MARK}{kind}_{bits}" if kind == "weight" else f"{MARK}{kind}"
    return jax.jit(marked)


class _Faking:
    """The rule that rounds what the rounded weights meet."""

    keeps_derivatives = True

    def product(self, eqn: Any, x: Any, weight: View | PackedView, at: int) -> Any:
        x = plain(x)
        if product_reason(eqn, at) is None:
            x = fake("rows", 8, contracted(eqn, 1 - at))(x)
        operands = [x, plain(weight)]
        return bind(eqn, operands if at == 1 else operands[::-1])[0]

    def used(self, eqn: Any, weight: View | PackedView, at: int) -> None:
        """Rounded already."""

    def marked(self, eqn: Any, operands: list[Any]) -> None:
        """As it is."""
