"""A quantized weight on its way: equations that only move or look up its numbers, done to the numbers and their scale.

A weight goes through reshapes, transposes, casts and slices to the product that wants it. It is moved as it is, and its
scale beside it, so that products still find integers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from perfkit.backends.jax_autocast_casting import bind
from perfkit.backends.jax_quantized import dequantize, unpacked
from perfkit.quantization.jax_views import Axes, Faked, PackedView, View, is_view

# Where an index is out of bounds a lookup fills in a number, NaN by default: the scale is filled with it, times one.
ONE, TWO_ONES = 1, 0x11


def moved(eqn: Any, operands: list[Any]) -> list[Any] | None:
    """The results of an equation that only moves or looks up numbers, still quantized; None where it does not."""
    rule = _RULES.get(eqn.primitive.name)
    first = operands[0]
    if rule is None or (rule is not _concatenate and any(map(is_view, operands[1:]))) or not is_view(first):
        return None
    if isinstance(first, Faked) or (isinstance(first, PackedView) and rule is not _gather):
        return None
    return rule(eqn, operands)


def _same(eqn: Any, operands: list[View]) -> list[View]:
    (x,) = operands
    return [dataclasses.replace(x, values=bind(eqn, [x.values])[0])]


def _convert(eqn: Any, operands: list[View]) -> list[View] | None:
    (x,) = operands
    dtype = jnp.dtype(eqn.params["new_dtype"])
    if not jnp.issubdtype(dtype, jnp.floating):
        return None
    values = x.values if x.scale is not None else bind(eqn, [x.values])[0]
    return [dataclasses.replace(x, values=values, dtype=dtype)]


def _rearranged(x: View, move: Callable[[Any], Any], axes: Callable[[Axes], Axes]) -> View:
    """A view with `move` done to its values and to its scale, and `axes` to the record of its dimensions."""
    scale = None if x.scale is None else move(x.scale)
    origins = tuple((name, axes(old)) for name, old in x.origins)
    return dataclasses.replace(x, values=move(x.values), scale=scale, origins=origins)


def _transpose(eqn: Any, operands: list[View]) -> list[View]:
    order = eqn.params["permutation"]
    return [_rearranged(operands[0], lambda a: lax.transpose(a, order), lambda axes: tuple(axes[dim] for dim in order))]


def _squeeze(eqn: Any, operands: list[View]) -> list[View]:
    gone = eqn.params["dimensions"]
    return [
        _rearranged(
            operands[0],
            lambda a: lax.squeeze(a, gone),
            lambda axes: tuple(origin for dim, origin in enumerate(axes) if dim not in gone),
        )
    ]


def _broadcast(eqn: Any, operands: list[Any]) -> list[View] | None:
    shape, dims = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    x = operands[0]
    if len(operands) > 1 or [shape[dim] for dim in dims] != list(x.values.shape):
        return None

    def move(array: Any) -> Any:
        ones = [1] * len(shape) if array is x.scale else list(shape)
        for dim, size in zip(dims, array.shape, strict=True):
            ones[dim] = size
        return lax.broadcast_in_dim(array, ones, dims)

    def axes(old: Axes) -> Axes:
        new = dict(zip(dims, old, strict=True))
        return tuple(new.get(dim, frozenset()) for dim in range(len(shape)))

    return [_rearranged(x, move, axes)]


def _slice(eqn: Any, operands: list[View]) -> list[View]:
    start, stop, strides = (eqn.params[name] for name in ("start_indices", "limit_indices", "strides"))
    whole = operands[0].values.shape

    def move(array: Any) -> Any:
        shared = [a == 1 and b != 1 for a, b in zip(array.shape, whole, strict=True)]
        low = [0 if one else at for one, at in zip(shared, start, strict=True)]
        high = [1 if one else at for one, at in zip(shared, stop, strict=True)]
        step = strides and [1 if one else by for one, by in zip(shared, strides, strict=True)]
        return lax.slice(array, low, high, step)

    return [_rearranged(operands[0], move, lambda axes: axes)]


def _dynamic_slice(eqn: Any, operands: list[Any]) -> list[View]:
    x, *starts = operands
    sizes, whole = eqn.params["slice_sizes"], x.values.shape

    def move(array: Any) -> Any:
        shared = [a == 1 and b != 1 for a, b in zip(array.shape, whole, strict=True)]
        low = [jnp.zeros_like(at) if one else at for one, at in zip(shared, starts, strict=True)]
        return lax.dynamic_slice(array, low, [1 if one else n for one, n in zip(shared, sizes, strict=True)])

    return [_rearranged(x, move, lambda axes: axes)]


def _split(eqn: Any, operands: list[View]) -> list[View]:
    (x,), sizes, axis = operands, eqn.params["sizes"], eqn.params["axis"]
    values = bind(eqn, [x.values])
    shared = x.scale is None or x.scale.shape[axis] == 1
    scales = [x.scale] * len(sizes) if shared else bind(eqn, [x.scale])
    return [dataclasses.replace(x, values=v, scale=s) for v, s in zip(values, scales, strict=True)]


def _concatenate(eqn: Any, operands: list[Any]) -> list[View] | None:
    at = eqn.params["dimension"]
    first = operands[0]
    alike = all(
        isinstance(x, View)
        and (x.scale is None) == (first.scale is None)
        and (x.input_scale is None) == (first.input_scale is None)
        and (x.values.dtype, x.dtype, x.multiplies) == (first.values.dtype, first.dtype, first.multiplies)
        for x in operands
    )
    if not alike:
        return None
    scale = None
    if first.scale is not None:
        shapes = [x.scale.shape[:at] + x.scale.shape[at + 1 :] for x in operands]
        if len(set(shapes)) > 1:
            return None
        scale = jnp.concatenate(
            [
                jnp.broadcast_to(x.scale, (*s[:at], x.values.shape[at], *s[at:]))
                for x, s in zip(operands, shapes, strict=True)
            ],
            at,
        )
    # Side by side they meet the same activations, and so the widest of their ranges.
    ranges = [x.input_scale for x in operands]
    values = bind(eqn, [x.values for x in operands])[0]
    input_scale = None if first.input_scale is None else jnp.max(jnp.stack(ranges))
    origins = tuple(origin for x in operands for origin in x.origins)
    return [dataclasses.replace(first, values=values, scale=scale, input_scale=input_scale, origins=origins)]


def _reshape(eqn: Any, operands: list[Any]) -> list[View] | None:
    x, new = operands[0], eqn.params["new_sizes"]
    if eqn.params["dimensions"] is not None or len(operands) > 1:
        return None
    groups = _groups(x.values.shape, new)
    scale_shape: list[int] = []
    for old_dims, new_dims in groups:
        sizes = None if x.scale is None else [x.scale.shape[dim] for dim in old_dims]
        if sizes is None or math.prod(sizes) == 1:
            scale_shape += [1] * len(new_dims)
        elif sizes == [x.values.shape[dim] for dim in old_dims]:
            scale_shape += [new[dim] for dim in new_dims]
        else:
            return None  # dimensions with and without a scale of their own become one
    scale = None if x.scale is None else x.scale.reshape(scale_shape)

    def axes(old: Axes) -> Axes:
        merged = [(new_dims, frozenset().union(*(old[dim] for dim in old_dims))) for old_dims, new_dims in groups]
        return tuple(origin for new_dims, origin in merged for _ in new_dims)

    origins = tuple((name, axes(old)) for name, old in x.origins)
    return [dataclasses.replace(x, values=bind(eqn, [x.values])[0], scale=scale, origins=origins)]


def _groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Which dimensions of a reshape become which: the finest runs whose sizes multiply to the same."""
    groups, at, to = [], 0, 0
    while at < len(old) or to < len(new):
        run, into = [], []
        before = after = 1
        while True:
            if before <= after and at < len(old):
                before *= old[at]
                run.append(at)
                at += 1
            elif to < len(new):
                after *= new[to]
                into.append(to)
                to += 1
            else:
                before *= old[at]
                run.append(at)
                at += 1
            if before == after and (into or to == len(new)):
                break
        groups.append((run, into))
    return groups


def _gather(eqn: Any, operands: list[Any]) -> list[Any]:
    """Rows of a table, in floating point: only the rows are dequantized, never the table."""
    x, indices = operands
    if isinstance(x, PackedView):
        return _gather_packed(eqn, x, indices)
    if x.scale is None:
        return bind(eqn, [x.values, indices])
    looked_up = eqn.params["dimension_numbers"].start_index_map
    spread = [
        n if dim in looked_up else s for dim, (n, s) in enumerate(zip(x.values.shape, x.scale.shape, strict=True))
    ]
    scale = jnp.broadcast_to(x.scale, spread)
    sizes = tuple(min(size, n) for size, n in zip(eqn.params["slice_sizes"], spread, strict=True))
    values = bind(eqn, [x.values, indices], fill_value=ONE)[0]
    return [dequantize(values, bind(eqn, [scale, indices], slice_sizes=sizes)[0], x.dtype)]


def _gather_packed(eqn: Any, x: PackedView, indices: Any) -> list[Any] | None:
    packed, numbers, sizes = x.packed, eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    last = packed.ndim - 1
    whole = packed.axes == (last,) and sizes[last] == packed.sizes[0] and last not in numbers.start_index_map
    kept = indices.ndim - 1 + last - len(numbers.collapsed_slice_dims) in numbers.offset_dims
    if not (whole and kept):
        return None
    values, scale = (
        bind(eqn, [part, indices], slice_sizes=(*sizes[:-1], part.shape[-1]), fill_value=fill)[0]
        for part, fill in ((packed.values, TWO_ONES), (packed.scale, eqn.params["fill_value"]))
    )
    return [unpacked(values, scale, sizes[last], packed.dtype)]


_RULES: dict[str, Callable[[Any, list[Any]], list[Any] | None]] = {
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "convert_element_type": _convert,
    "copy": _same,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "name": _same,
    "reshape": _reshape,
    "slice": _slice,
    "split": _split,
    "squeeze": _squeeze,
    "stop_gradient": _same,
    "transpose": _transpose,
}
