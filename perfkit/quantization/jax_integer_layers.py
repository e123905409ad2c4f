"""Layers on integers in a jaxpr: products on a known grid, with the bias, ReLU and max-pool that follow them.

What stands between two of them, where nothing else reads it, is bytes on the second one's grid: the numbers are those
that each by itself gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from jax.extend.core import Literal

from perfkit._errors import InvalidInputError
from perfkit.backends.jax_fused_conv import channel_of, is_relu, only_reader, pool_size
from perfkit.kernels._int8_jax import to_bytes
from perfkit.kernels._op import Choice
from perfkit.quantization.jax_integers import NAME, SUMS, Product, product_in, weights_of

_MOVES = ("reshape", "transpose", "squeeze", "copy", "copy_p")
KINDS = (NAME, SUMS)
_FLOATS = ("float32", "bfloat16", "float16")
"""Dtypes of x, which a kernel takes as float32."""


@dataclass(frozen=True)
class Layer:
    """Equations that one call of a kernel may compute.

    Args:
        equations: their places in the jaxpr, the product first.
        weights: the names of its weights.
        product: what is multiplied.
        choice: who computes it.
        problem: the kernel's; None where it has none.
        bias: what is added, +1 or -1 times; None where nothing is.
        activation, pool: as `conv2d_int8` takes them.
        x_bytes: x comes as bytes on its grid.
        y_scale: what holds the scale of the next layer's grid, on which y is handed on; None where it is in floats.
        rows: each row of x has a scale of its own: sums are wanted, of integers.
    """

    equations: tuple[int, ...]
    weights: str
    product: Product
    choice: Choice | None = None
    problem: Any = None
    bias: tuple[Any, int] | None = None
    activation: str | None = None
    pool: int | None = None
    x_bytes: bool = False
    y_scale: Any = None
    rows: bool = False

    def __str__(self) -> str:
        parts = ["conv" if self.product.convolves else "linear", *["bias"] * (self.bias is not None)]
        parts += ["ReLU"] * (self.activation is not None)
        parts += [f"{self.pool}×{self.pool} max-pool"] * (self.pool is not None)
        rows = " with a scale for each row" if self.rows else ""
        return (
            " + ".join(parts) + " on integers" + rows + (", which hands on bytes," if self.y_scale is not None else "")
        )

    @property
    def ours(self) -> bool:
        return self.choice is not None and self.choice.implementation == "cpu"

    def asked(self, device: str, eqns: Sequence[Any]) -> Layer:
        """The layer with its problem, and the choice who computes it."""
        first = eqns[self.equations[0]]
        x, values = (atom.aval for atom in first.invars[:2])
        why = self.product.refusal(x, values)
        if why is None and self.rows and self.product.convolves:
            why = "its images have scales of their own, so that its sums would be written one by one"
        if why is None and not self.rows and str(x.dtype) not in _FLOATS:
            why = f"x is {x.dtype}"
        if why is None:
            try:
                kinds = ("float32", "uint8")[self.x_bytes or self.rows], ("", "uint8")[self.y_scale is not None]
                problem = self.product.problem(device, x, values, self.activation, self.pool, *kinds)
                return replace(self, problem=problem, choice=self.choice or self.product.choice(problem))
            except InvalidInputError as reason:  # nothing is left of such an image
                why = str(reason)
        return replace(self, choice=Choice("", "library", "", (("cpu", why),)))

    def run(self, eqns: Sequence[Any], read: Callable[[Any], Any]) -> Any:
        """The value of the last equation's output, by the kernel."""
        x, values, *scales = map(read, eqns[self.equations[0]].invars)
        if self.rows:
            one = jnp.float32(1)
            return self.product.run(self.problem, to_bytes(x), values, one, one)
        scale, x_scale = scales
        bias = None
        if self.bias is not None:
            row = jnp.ravel(jnp.asarray(read(self.bias[0]), jnp.float32)) * self.bias[1]
            bias = jnp.broadcast_to(row, values.shape[-1:])
        y_scale = None if self.y_scale is None else read(self.y_scale)
        y = self.product.run(self.problem, x, values, scale, x_scale, bias, y_scale)
        return y if y_scale is not None else y.astype(eqns[self.equations[-1]].outvars[0].aval.dtype)


def layers(jaxpr: Any, uses: Mapping, made_by: Mapping, device: str) -> dict[int, Layer]:
    """The layers of an open jaxpr by the place of their last equation; of others than kernels' the product alone.

    Args:
        uses, made_by: what `perfkit.backends.jax_fused_conv.reading` tells of it.
    """
    eqns = jaxpr.eqns
    marked = [at for at, eqn in enumerate(eqns) if weights_of(eqn, KINDS) is not None]
    found = {at: _layer(eqns, at, uses, made_by).asked(device, eqns) for at in marked}
    found = {at: layer if layer.ours else replace(layer, equations=(at,)) for at, layer in found.items()}
    made_at = {var: at for at, eqn in enumerate(eqns) for var in eqn.outvars}
    for at, layer in list(found.items()):
        after = found.get(_next(eqns, layer, uses))
        if after is None or not (layer.ours and after.ours) or str(layer.product.dtype) != "float32":
            continue
        scale = eqns[after.equations[0]].invars[3]
        if isinstance(scale, Literal) or made_at.get(scale, -1) < layer.equations[-1]:
            found[at] = replace(found[at], y_scale=scale)
            found[after.equations[0]] = replace(after, x_bytes=True)
    asked = [layer.asked(device, eqns) if layer.ours else layer for layer in found.values()]
    return {layer.equations[-1]: layer for layer in asked}


def _next(eqns: Sequence[Any], layer: Layer, uses: Mapping) -> int | None:
    """The place of the product that alone reads what a layer makes, as its x; None where there is none."""
    at = layer.equations[-1]
    while True:
        value = eqns[at].outvars[0]
        at = only_reader(value, uses)
        if at is None or eqns[at].invars[0] is not value:
            return None
        if weights_of(eqns[at]) is not None:
            return at
        if eqns[at].primitive.name not in _MOVES:
            return None


def _layer(eqns: Sequence[Any], start: int, uses: Mapping, made_by: Mapping) -> Layer:
    """The longest layer that begins with the product at `start`."""
    product, rows = product_in(eqns[start]), weights_of(eqns[start]) is None
    layer = Layer((start,), weights_of(eqns[start], KINDS) or "", product, rows=rows)
    values = eqns[start].invars[1].aval
    outputs = product.convolves or values.ndim - 1 == len(product["dimension_numbers"][0][1])  # are one dimension
    while str(product.dtype) == "float32" and not rows:
        value = eqns[layer.equations[-1]].outvars[0]
        at = only_reader(value, uses)
        if at is None:
            break
        eqn, activation, pool, bias = eqns[at], layer.activation, layer.pool, layer.bias
        name = eqn.primitive.name
        if name in ("add", "sub") and outputs and bias is activation is pool is None:
            other = eqn.invars[1 - eqn.invars.index(value)]
            channel = channel_of(other, value.aval.shape, made_by)
            if channel is None or channel is value or (name == "sub" and eqn.invars[0] is not value):
                break
            bias = channel, 1 if name == "add" else -1
        elif activation is None and is_relu(eqn, made_by):
            activation = "relu"
        elif pool is None and product.convolves and name == "reduce_window_max" and (size := pool_size(eqn)):
            pool = size
        else:
            break
        if str(eqn.outvars[0].aval.dtype) != "float32":
            break
        layer = replace(layer, equations=(*layer.equations, at), bias=bias, activation=activation, pool=pool)
    return layer
