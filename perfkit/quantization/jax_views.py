"""Views of weights: what is left of a weight after it was reshaped, transposed, cast and sliced, still quantized."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from perfkit.backends.jax_autocast_casting import bind
from perfkit.backends.jax_quantized import Packed, Quantized, dequantize

Axes = tuple[frozenset[int], ...]
"""For each dimension of a view: which dimensions of the parameter lie in it."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class View:
    """Some or all of one parameter, or of several side by side.

    Args:
        values: the numbers as stored, int8 or float8; or floating point where the weight is not quantized.
        scale: as many dimensions as `values`, 1 along those that share a scale; None where they are not quantized.
        input_scale: see `Quantized`.
        origins: the parameters' names, each with its `Axes`.
        dtype: what the program takes the numbers for.
        multiplies: see `Quantized`.
    """

    values: Any
    scale: Any
    input_scale: Any
    origins: tuple[tuple[str, Axes], ...] = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})
    multiplies: bool = dataclasses.field(default=True, metadata={"static": True})

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.origins)

    def origin(self, dims: Sequence[int]) -> dict[str, frozenset[int]]:
        """For each parameter, which of its dimensions lie in these of the view."""
        return {name: frozenset().union(*(axes[dim] for dim in dims)) for name, axes in self.origins}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedView:
    """A parameter in int4: only looked up by rows, or dequantized."""

    packed: Packed
    name: str = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class Faked:
    """Activations that the program rounds as quantization would, before they are rounded: `eqn` would do it."""

    value: Any
    eqn: Any


def view(name: str, weight: Any) -> View | PackedView:
    """The whole of a parameter."""
    if isinstance(weight, Packed):
        return PackedView(weight, name)
    origins = ((name, tuple(frozenset({axis}) for axis in range(weight.ndim))),)
    if isinstance(weight, Quantized):
        return View(weight.values, weight.scale, weight.input_scale, origins, weight.dtype, weight.multiplies)
    return View(weight, None, None, origins, weight.dtype)


def is_view(value: Any) -> bool:
    return isinstance(value, (View, PackedView, Faked))


def plain(value: Any) -> Any:
    """The value in the dtype that the program takes it for."""
    if isinstance(value, PackedView):
        return value.packed.dequantized()
    if isinstance(value, Faked):
        return bind(value.eqn, [value.value])[0]
    if not isinstance(value, View):
        return value
    return value.values if value.scale is None else dequantize(value.values, value.scale, value.dtype)


def sliced(value: View | PackedView) -> tuple[Any, Callable[[Any], Any]] | None:
    """A view as something to scan over: what is scanned, and a function that makes a view of each slice.

    None where the slices have no scale of their own to be found.
    """
    if isinstance(value, PackedView):
        packed = value.packed
        if 0 in packed.axes:
            return None
        axes = tuple(axis - 1 for axis in packed.axes)
        return (packed.values, packed.scale), lambda x: PackedView(
            dataclasses.replace(packed, values=x[0], scale=x[1], axes=axes), value.name
        )
    origins = tuple((name, axes[1:]) for name, axes in value.origins)
    own = value.scale is not None and value.scale.shape[0] == value.values.shape[0]
    shared = None if own or value.scale is None else value.scale[0]
    return (value.values, value.scale if own else ()), lambda x: dataclasses.replace(
        value, values=x[0], scale=x[1] if own else shared, origins=origins
    )
