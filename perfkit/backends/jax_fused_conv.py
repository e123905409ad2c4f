"""Convolutions in a jaxpr with the bias, fixed norm, ReLU and max-pool that follow them, as calls of `conv2d`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from perfkit.backends.jax_autocast_casting import bind
from perfkit.backends.jax_autocast_rules import precision_reason
from perfkit.kernels.conv2d import conv2d

DTYPES = ("float32", "bfloat16", "float16")
_INSIDE = {"jit": "jaxpr", "pjit": "jaxpr", "custom_jvp_call": "call_jaxpr", "closed_call": "call_jaxpr"}
_AFFINE = ("add", "sub", "mul", "div")


@dataclass(frozen=True)
class Group:
    """Equations that one call of `conv2d` computes.

    Args:
        equations: their places in the jaxpr, the convolution first.
        affine: of those between the convolution and what is not linear, the operation and the other operand's place.
        activation, pool: as `conv2d` takes them.
    """

    equations: tuple[int, ...]
    affine: tuple[tuple[str, Any], ...]
    activation: str | None
    pool: int | None

    def __str__(self) -> str:
        parts = ["bias or norm"] * bool(self.affine) + ["ReLU"] * (self.activation is not None)
        return " + ".join(["conv", *parts, *([f"{self.pool}×{self.pool} max-pool"] if self.pool else [])])

    def __call__(self, eqns: Sequence[Any], read: Callable[[Any], Any]) -> Any:
        """The value of the last equation's output; `read` gives those of variables and literals."""
        eqn, last = eqns[self.equations[0]], eqns[self.equations[-1]]
        x, weight = map(read, eqn.invars)
        dtype, channels = x.dtype, weight.shape[-1]
        scale, shift = None, jnp.zeros(channels, jnp.float32)
        for name, atom in self.affine:
            value = jnp.broadcast_to(jnp.ravel(jnp.asarray(read(atom), jnp.float32)), (channels,))
            if name in ("add", "sub"):
                shift = shift + value if name == "add" else shift - value
            else:
                value = value if name == "mul" else 1 / value
                scale = value if scale is None else scale * value
                shift = shift * value
        params = eqn.params
        y = conv2d(
            x,
            weight if scale is None else (weight * scale).astype(dtype),
            shift.astype(dtype) if self.affine else None,
            stride=params["window_strides"],
            padding=params["padding"],
            dilation=params["rhs_dilation"],
            groups=params["feature_group_count"],
            activation=self.activation,
            pool=self.pool,
        )
        return y.astype(last.outvars[0].aval.dtype)


def reading(jaxpr: Any) -> tuple[dict[Any, list[int]], dict[Any, Any]]:
    """By each variable of an open jaxpr where it is read, the places of equations or -1 for an output; what made it."""
    uses: dict[Any, list[int]] = {}
    for at, eqn in enumerate(jaxpr.eqns):
        for atom in eqn.invars:
            if not isinstance(atom, Literal):
                uses.setdefault(atom, []).append(at)
    for atom in jaxpr.outvars:
        if not isinstance(atom, Literal):
            uses.setdefault(atom, []).append(-1)
    return uses, {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}


def groups(
    eqns: Sequence[Any], uses: Mapping, made_by: Mapping, trains: bool
) -> tuple[dict[int, Group], dict[int, str]]:
    """The groups among equations by the place of their last one, and why other convolutions are in none, by place.

    Args:
        uses, made_by: what `reading` tells of them.
        trains: it will be differentiated: only a ReLU whose derivative at 0 is 0, as the kernel's is, counts as one.
    """
    found, reasons = {}, {}
    for at, eqn in enumerate(eqns):
        if eqn.primitive.name == "conv_general_dilated":
            if reason := refusal(eqn):
                reasons[at] = reason
            elif group := _group(eqns, at, uses, made_by, trains):
                found[group.equations[-1]] = group
            else:
                reasons[at] = "no ReLU or max-pool directly follows it, or its own output is used as well"
    return found, reasons


def refusal(eqn: Any) -> str | None:
    """Why a convolution cannot run in the kernel, whatever follows it; None where it can."""
    x, weight = (atom.aval for atom in eqn.invars)
    if reason := layout_refusal(eqn.params, x.ndim):
        return reason
    if x.dtype != weight.dtype or str(x.dtype) not in DTYPES:
        return f"it is of {x.dtype} and {weight.dtype}"
    if eqn.outvars[0].aval.dtype != x.dtype:
        return f"a {eqn.outvars[0].aval.dtype} result of {x.dtype} was asked for"
    return precision_reason(eqn.params["precision"])


def layout_refusal(params: Mapping[str, Any], dimensions: int) -> str | None:
    """Why a convolution of images of so many dimensions cannot, whatever its dtypes are; None where it can."""
    numbers = params["dimension_numbers"]
    if dimensions != 4:
        return f"it is over {dimensions - 2} dimension(s), and the kernel over 2"
    if (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec) != ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2)):
        return "its layout is not NHWC and HWIO"
    if set(params["lhs_dilation"]) != {1} or params["batch_group_count"] != 1:
        return "it is a transposed convolution, or the gradient of one"
    if any(low < 0 or high < 0 for low, high in params["padding"]):
        return "its padding is negative"
    return None


def _group(eqns: Sequence[Any], start: int, uses: Mapping, made_by: Mapping, trains: bool) -> Group | None:
    """The longest group that begins with the convolution at `start`; None where nothing that pays follows it."""
    places, affine, best = [start], [], None
    activation = pool = None
    while True:
        value = eqns[places[-1]].outvars[0]
        at = only_reader(value, uses)
        if at is None:
            return best
        eqn = eqns[at]
        name = eqn.primitive.name
        places.append(at)
        if name == "convert_element_type" and jnp.issubdtype(eqn.params["new_dtype"], jnp.floating):
            continue
        if name in _AFFINE and activation is pool is None:
            other = eqn.invars[1 - eqn.invars.index(value)]
            channel = channel_of(other, value.aval.shape, made_by)
            if channel is None or (name in ("sub", "div") and eqn.invars[0] is not value):
                return best
            affine.append((name, channel))
        elif activation is None and is_relu(eqn, made_by) and not (trains and not _has_relus_derivative(eqn)):
            activation = "relu"
            best = Group(tuple(places), tuple(affine), activation, pool)
        elif pool is None and name == "reduce_window_max" and (size := pool_size(eqn)):
            pool = size
            best = Group(tuple(places), tuple(affine), activation, pool)
        else:
            return best


def only_reader(value: Any, uses: Mapping) -> int | None:
    """The place of the one operation that reads a value; None where others do too, or it is a result."""
    places = uses.get(value, ())
    return places[0] if len(places) == 1 and places[0] >= 0 else None


def channel_of(atom: Any, shape: tuple[int, ...], made_by: Mapping) -> Any:
    """The operand where it is one number, or one for each channel; if it was repeated, what was; else None."""
    while True:
        given = atom.aval.shape
        if given == () or (given[-1] == shape[-1] and set(given[:-1]) <= {1} and len(given) in (1, len(shape))):
            return atom
        eqn = None if isinstance(atom, Literal) else made_by.get(atom)
        if eqn is None or eqn.primitive.name != "broadcast_in_dim":
            return None
        operand, dims = eqn.invars[0], eqn.params["broadcast_dimensions"]
        if operand.aval.shape and dims[-1] != len(shape) - 1:
            return None
        atom = operand


def is_relu(eqn: Any, made_by: Mapping) -> bool:
    """Whether an equation is max(x, 0), as it stands or as a function of its own."""
    if eqn.primitive.name == "max":
        return any(_is_zero(atom, made_by) for atom in eqn.invars)
    if eqn.primitive.name not in _INSIDE or len(eqn.outvars) != 1 or len(eqn.invars) != 1:
        return False
    inner = eqn.params[_INSIDE[eqn.primitive.name]].jaxpr
    last = inner.eqns[-1] if inner.eqns else None
    if last is None or inner.outvars[0] is not last.outvars[0]:
        return False
    inside = {var: each for each in inner.eqns for var in each.outvars}
    constants = all(each is last or each.primitive.name == "broadcast_in_dim" for each in inner.eqns)
    return constants and inner.invars[0] in last.invars and is_relu(last, inside)


def _has_relus_derivative(eqn: Any) -> bool:
    """Whether the derivative is 0 up to x = 0 and 1 above. A bare maximum has 1/2 at 0, and a rule may say anything."""
    if eqn.primitive.name not in _INSIDE:
        return False
    shape, dtype = eqn.invars[0].aval.shape, eqn.invars[0].aval.dtype
    with jax.ensure_compile_time_eval():
        points = jnp.asarray(np.resize([-2.0, -0.5, 0.0, 0.5, 2.0], shape), dtype)
        _, slopes = jax.jvp(lambda x: bind(eqn, [x])[0], (points,), (jnp.ones(shape, dtype),))
        return bool(jnp.array_equal(slopes, points > 0))


def _is_zero(atom: Any, made_by: Mapping) -> bool:
    while not isinstance(atom, Literal):
        eqn = made_by.get(atom)
        if eqn is None or eqn.primitive.name not in ("broadcast_in_dim", "convert_element_type"):
            return False
        atom = eqn.invars[0]
    return bool(np.all(np.asarray(atom.val, np.float64) == 0))


def pool_size(eqn: Any) -> int | None:
    """The side of an image's square windows, side by side, of which an equation takes the largest; else None."""
    params = eqn.params
    plain = set(params["base_dilation"]) == set(params["window_dilation"]) == {1}
    window, strides = params["window_dimensions"], params["window_strides"]
    if not plain or tuple(window) != tuple(strides) or any(map(any, params["padding"])) or len(window) != 4:
        return None
    batch, height, width, channels = window
    return height if (batch, channels) == (1, 1) and height == width > 1 else None
