"""Quantized parameters: what stands in a parameter tree in place of a floating-point array, and how it is made.

Symmetric: `weight ≈ values * scale`, zero is zero. Both kinds are pytree nodes, so that everything that maps over
parameters (saving, moving, donating, counting bytes) sees small integer arrays and their scales.

Source: https://arxiv.org/abs/1712.05877 (integer arithmetic), https://arxiv.org/abs/2004.09602 (symmetric, per channel)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, Self

import jax
import jax.numpy as jnp

GROUP = 32
FLOAT8 = jnp.float8_e4m3fn


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A weight in int8 or float8: `values * scale`.

    Args:
        values: int8 (within ±127, or fewer bits' worth) or float8_e4m3fn, in the weight's shape.
        scale: float32, as many dimensions as `values`, 1 along those that share a scale.
        input_scale: float32 scalar: the static scale of the activations it is multiplied with; None: one per row,
            computed at each call.
        multiplies: whether products run on `values` as they are; else they are dequantized first (weight-only).
        original: name of the floating-point dtype that it stands for.
    """

    values: Any
    scale: Any
    input_scale: Any = None
    multiplies: bool = dataclasses.field(default=True, metadata={"static": True})
    original: str = dataclasses.field(default="float32", metadata={"static": True})

    @classmethod
    def of(cls, weight: Any, axes: Iterable[int], *, bits: int = 8, dtype: Any = jnp.int8, **options: Any) -> Self:
        """`weight` quantized, with one scale for what differs only along `axes`."""
        scale = weight_scale(weight, axes, bits, dtype)
        return cls(quantize(weight, scale, bits, dtype), scale, original=str(weight.dtype), **options)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def dtype(self) -> Any:
        return _stood_for(self)

    def dequantized(self) -> jax.Array:
        """The weight in floating point."""
        return dequantize(self.values, self.scale, self.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """A weight in int4, two numbers a byte, with one scale per `GROUP` of them.

    Args:
        values: uint8 (other dimensions…, half of the flattened `axes`), low nibble first.
        scale: float32 (other dimensions…, groups).
        axes: dimensions of the weight that are flattened into the last one: those that products sum over.
        sizes: their sizes.
        original: name of the floating-point dtype that it stands for.
    """

    values: Any
    scale: Any
    axes: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    sizes: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    original: str = dataclasses.field(default="float32", metadata={"static": True})

    @classmethod
    def of(cls, weight: Any, axes: Iterable[int]) -> Self:
        """`weight` in groups along `axes`."""
        axes = tuple(sorted(axes))
        sizes = tuple(weight.shape[axis] for axis in axes)
        flat = jnp.moveaxis(weight, axes, range(weight.ndim - len(axes), weight.ndim))
        flat = flat.reshape(*flat.shape[: weight.ndim - len(axes)], -1)
        length = flat.shape[-1]
        padding = [(0, 0)] * (flat.ndim - 1)
        groups = jnp.pad(flat, [*padding, (0, -length % GROUP)]).reshape(*flat.shape[:-1], -1, GROUP)
        scale = weight_scale(groups, (-1,), 4)
        whole = quantize(groups, scale, 4).reshape(*flat.shape[:-1], -1)[..., : length + length % 2]
        nibbles = (whole & 15).astype(jnp.uint8)
        packed = nibbles[..., ::2] | nibbles[..., 1::2] << 4
        return cls(packed, scale[..., 0], axes, sizes, str(weight.dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        rest = iter(self.values.shape[:-1])
        summed = dict(zip(self.axes, self.sizes, strict=True))
        return tuple(summed[at] if at in summed else next(rest) for at in range(self.ndim))

    @property
    def ndim(self) -> int:
        return self.values.ndim - 1 + len(self.axes)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def dtype(self) -> Any:
        return _stood_for(self)

    def flat(self) -> jax.Array:
        """The weight in floating point, with `axes` flattened into the last dimension."""
        return unpacked(self.values, self.scale, math.prod(self.sizes), self.dtype)

    def dequantized(self) -> jax.Array:
        """The weight in floating point."""
        flat = self.flat()
        apart = flat.reshape(*flat.shape[:-1], *self.sizes)
        return jnp.moveaxis(apart, range(apart.ndim - len(self.axes), apart.ndim), self.axes)


def is_quantized(node: Any) -> bool:
    return isinstance(node, (Quantized, Packed))


def largest(bits: int = 8, dtype: Any = jnp.int8) -> float:
    """The largest number that is used: 127 for int8, 7 for four bits, 448 for float8_e4m3fn."""
    return float(2 ** (bits - 1) - 1) if dtype == jnp.int8 else float(jnp.finfo(dtype).max)


def weight_scale(weight: Any, axes: Iterable[int], bits: int = 8, dtype: Any = jnp.int8) -> jax.Array:
    """float32, 1 along `axes`: what the largest entry needs. Entries that are all zero get the scale 1."""
    return range_scale(jnp.max(jnp.abs(weight), axis=tuple(axes), keepdims=True), bits, dtype)


def range_scale(largest_entry: Any, bits: int = 8, dtype: Any = jnp.int8) -> jax.Array:
    """The scale at which `largest_entry` (≥ 0) is the largest number that can be held; of NaN it is NaN."""
    wide = jnp.promote_types(jnp.float32, largest_entry.dtype)
    return jnp.where(largest_entry == 0, 1, largest_entry.astype(wide) / largest(bits, dtype))


def quantize(x: Any, scale: Any, bits: int = 8, dtype: Any = jnp.int8) -> jax.Array:
    """`x / scale`, rounded to the nearest and held within the largest number."""
    bound = largest(bits, dtype)
    scaled = jnp.clip(x / scale, -bound, bound)
    return (jnp.round(scaled) if dtype == jnp.int8 else scaled).astype(dtype)


def dequantize(values: Any, scale: Any, dtype: Any) -> jax.Array:
    return (values.astype(scale.dtype) * scale).astype(dtype)


def unpacked(values: Any, scale: Any, length: int, dtype: Any) -> jax.Array:
    """int4 numbers, two a byte, in floating point: (…, length)."""
    both = jnp.stack([values << 4, values & 0xF0], axis=-1).reshape(*values.shape[:-1], -1)[..., :length]
    whole = both.view(jnp.int8) >> 4  # arithmetic: the sign comes along
    return dequantize(whole, jnp.repeat(scale, GROUP, axis=-1)[..., :length], dtype)


def _stood_for(node: Quantized | Packed) -> Any:
    # A reference run in float64 widens every array of the model, and means the weight as well.
    return jnp.dtype("float64" if node.scale.dtype == jnp.float64 else node.original)
