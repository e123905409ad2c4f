"""Linear layers in a jaxpr, with the bias and ReLU that follow them, as calls of `kernels.linear`: for inference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from perfkit.backends.jax_autocast_rules import precision_reason
from perfkit.backends.jax_fused_conv import channel_of, is_relu, only_reader
from perfkit.kernels.linear.jax_op import linear

_RESULTS = {"float32": ("float32",), "bfloat16": ("bfloat16", "float32")}
"""What the kernel multiplies, and the dtypes in which it gives the result."""


@dataclass(frozen=True)
class LinearGroup:
    """Equations that one call of `linear` computes.

    Args:
        equations: their places in the jaxpr, the product first.
        bias: what holds the bias; None where there is none.
        activation: as `linear` takes it.
    """

    equations: tuple[int, ...]
    bias: Any
    activation: str | None

    def __str__(self) -> str:
        parts = ["bias"] * (self.bias is not None) + ["ReLU"] * (self.activation is not None)
        return " + ".join(["linear", *parts])

    def __call__(self, eqns: Sequence[Any], read: Callable[[Any], Any]) -> Any:
        """The value of the last equation's output; `read` gives those of variables and literals."""
        (x, weight), out = map(read, eqns[self.equations[0]].invars), eqns[self.equations[-1]].outvars[0]
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
    """Whether it is a product of rows with a matrix, (inputs, outputs), in what the kernel multiplies."""
    product = _product(eqn)
    if product is None:
        return False
    (lhs, rhs), batched = product.params["dimension_numbers"]
    x, weight = (atom.aval for atom in eqn.invars)
    if any(batched) or weight.ndim != 2 or tuple(lhs) != (x.ndim - 1,) or tuple(rhs) != (0,):
        return False
    alike = x.dtype == weight.dtype and eqn.outvars[0].aval.dtype.name in _RESULTS.get(x.dtype.name, ())
    return alike and not precision_reason(product.params["precision"])


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
    bias = activation = None
    results = _RESULTS[eqns[start].invars[0].aval.dtype.name]
    places, best = [start], LinearGroup((start,), None, None)
    while True:
        value = eqns[places[-1]].outvars[0]
        at = only_reader(value, uses)
        if at is None:
            return best
        eqn = eqns[at]
        name = eqn.primitive.name
        places.append(at)
        if name == "add" and bias is activation is None:
            bias = channel_of(eqn.invars[1 - eqn.invars.index(value)], value.aval.shape, made_by)
            if bias is None:
                return best
        elif activation is None and is_relu(eqn, made_by):
            activation = "relu"
        elif name != "convert_element_type":
            return best
        if eqn.outvars[0].aval.dtype.name not in results:
            return best
        best = LinearGroup(tuple(places), bias, activation)
    return best
