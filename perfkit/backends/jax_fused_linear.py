"""Linear layers in bfloat16 in a jaxpr, with the bias and ReLU that follow them, as calls of `kernels.linear`.

For inference. Weights that are cast to bfloat16 on the way are handed over as they were: the kernel rounds them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.extend.core import Literal

from perfkit.backends.jax_autocast_rules import precision_reason
from perfkit.backends.jax_fused_conv import channel_of, is_relu, only_reader
from perfkit.kernels.linear.jax_op import linear

DTYPE = "bfloat16"


@dataclass(frozen=True)
class LinearGroup:
    """Equations that one call of `linear` computes.

    Args:
        equations: their places in the jaxpr, the product first.
        weight: what holds the weights, before they are cast.
        bias: what holds the bias; None where there is none.
        activation: as `linear` takes it.
    """

    equations: tuple[int, ...]
    weight: Any
    bias: Any
    activation: str | None

    def __str__(self) -> str:
        parts = ["bias"] * (self.bias is not None) + ["ReLU"] * (self.activation is not None)
        return " + ".join(["linear", *parts])

    def __call__(self, eqns: Sequence[Any], read: Callable[[Any], Any]) -> Any:
        """The value of the last equation's output; `read` gives those of variables and literals."""
        x, weight, out = read(eqns[self.equations[0]].invars[0]), read(self.weight), eqns[self.equations[-1]].outvars[0]
        bias = None if self.bias is None else jnp.broadcast_to(jnp.ravel(read(self.bias)), weight.shape[1:])
        return linear(x, weight, bias, self.activation, out.aval.dtype)


def linear_groups(eqns: Sequence[Any], uses: Mapping, made_by: Mapping) -> dict[int, LinearGroup]:
    """The linear layers among equations by the place of their last one.

    Args:
        uses, made_by: what `reading` tells of them.
    """
    found = {}
    for at, eqn in enumerate(eqns):
        if _is_layer(eqn):
            group = _group(eqns, at, uses, made_by)
            found[group.equations[-1]] = group
    return found


def _is_layer(eqn: Any) -> bool:
    """Whether it is a product of bfloat16 rows with a matrix, (inputs, outputs)."""
    product = _product(eqn)
    if product is None:
        return False
    (lhs, rhs), batched = product.params["dimension_numbers"]
    x, weight = (atom.aval for atom in eqn.invars)
    if any(batched) or weight.ndim != 2 or tuple(lhs) != (x.ndim - 1,) or tuple(rhs) != (0,):
        return False
    low = x.dtype.name == weight.dtype.name == DTYPE and eqn.outvars[0].aval.dtype.name in (DTYPE, "float32")
    return low and not precision_reason(product.params["precision"])


def _product(eqn: Any) -> Any:
    """The dot_general that an equation is, or a function of its own of, with a cast of its result; else None.

    Such functions are what the recipes for low precision make of products.
    """
    if eqn.primitive.name == "dot_general":
        return eqn
    inner = eqn.params["call_jaxpr"].jaxpr if eqn.primitive.name == "custom_jvp_call" else None
    if inner is None or not inner.eqns or len(inner.invars) != 2:
        return None
    product, *casts = inner.eqns
    alone = product.primitive.name == "dot_general" and list(product.invars) == list(inner.invars)
    value = product.outvars[0]
    for cast in casts:
        alone &= cast.primitive.name == "convert_element_type" and cast.invars[0] is value
        value = cast.outvars[0]
    return product if alone and inner.outvars[0] is value else None


def _group(eqns: Sequence[Any], start: int, uses: Mapping, made_by: Mapping) -> LinearGroup:
    weight, bias, activation = eqns[start].invars[1], None, None
    cast = None if isinstance(weight, Literal) else made_by.get(weight)
    if cast is not None and cast.primitive.name == "convert_element_type" and _wide(cast.invars[0]):
        weight = cast.invars[0]
    places, best = [start], LinearGroup((start,), weight, None, None)
    while activation is None:
        value = eqns[places[-1]].outvars[0]
        at = only_reader(value, uses)
        if at is None:
            return best
        eqn = eqns[at]
        name = eqn.primitive.name
        places.append(at)
        if name == "add" and bias is None:
            bias = channel_of(eqn.invars[1 - eqn.invars.index(value)], value.aval.shape, made_by)
            if bias is None:
                return best
        elif is_relu(eqn, made_by):
            activation = "relu"
        elif name != "convert_element_type":
            return best
        if eqn.outvars[0].aval.dtype.name not in (DTYPE, "float32"):
            return best
        best = LinearGroup(tuple(places), weight, bias, activation)
    return best


def _wide(atom: Any) -> bool:
    return not isinstance(atom, Literal) and atom.aval.dtype == jnp.float32
