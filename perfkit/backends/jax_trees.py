"""Parameter trees by name, in which a quantized parameter is one leaf."""

from __future__ import annotations

import collections
from collections.abc import Iterable
from typing import Any

import jax

from perfkit.backends.jax_autocast import ARRAYS
from perfkit.backends.jax_quantized import is_quantized

LAST = ("kernel", "embedding", "bias", "scale")
"""The last part of a parameter's path in flax; what is before it is the layer's name."""


def leaves_with_names(params: Any) -> tuple[list[tuple[str, Any]], Any]:
    """The parameters with their names ("conv1.kernel"), and the tree to put them back into."""
    pairs, structure = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_quantized)
    names = distinct(_name(path) for path, _ in pairs)
    return list(zip(names, (leaf for _, leaf in pairs), strict=True)), structure


def distinct(names: Iterable[str]) -> list[str]:
    """The names, of which none stands for two: {"a.b": …} and {"a": {"b": …}} are written alike."""
    seen: collections.Counter = collections.Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return found


def layer_of(name: str) -> str:
    """The layer of a parameter: "conv1" of "conv1.kernel"; of other names the parameter itself."""
    layer, _, last = name.rpartition(".")
    return layer if layer and last in LAST else name


def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """The floating-point parameter that a quantized one stands for, without its numbers."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def is_abstract(value: Any) -> bool:
    return isinstance(value, jax.ShapeDtypeStruct)


def array_names(params: Any) -> list[str]:
    """The names of what is traced of the parameters, in order."""
    return [name for name, leaf in leaves_with_names(params)[0] if isinstance(leaf, ARRAYS)]


def leaves(params: Any) -> list[Any]:
    return jax.tree.leaves(params, is_leaf=is_quantized)


def with_leaves(structure: Any, new: list[Any]) -> Any:
    return jax.tree.unflatten(structure, new)


def _name(path: tuple) -> str:
    """A parameter's path; without the attribute of an nnx variable, and without the name of linen's collection."""
    if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    if len(path) > 1 and path[0] == jax.tree_util.DictKey("params"):
        path = path[1:]
    return jax.tree_util.keystr(path, simple=True, separator=".")
