"""Nested inputs as JSON, with their tensors apart: what a file holds of what a model is called with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from perfkit._errors import InvalidInputError

_PLAIN = (bool, int, float, str, type(None))


def packed(tree: Any, add: Callable[[Any], Any | None], parts: Callable[[Any], tuple[str, Iterable] | None]) -> Any:
    """`tree` as JSON-ready data.

    Args:
        add: takes a tensor and returns what stands for it, text or a number; None for what is no tensor.
        parts: takes what is made of tensors, and returns the name of its kind and those; None for anything else.

    Raises:
        InvalidInputError: it holds something that a file without pickle cannot.
    """
    if type(tree) in _PLAIN:
        return tree
    if (stands := add(tree)) is not None:
        return {"tensor": stands}
    if (made := parts(tree)) is not None:
        kind, items = made
        return {"made": kind, "of": [packed(item, add, parts) for item in items]}
    if type(tree) in (list, tuple):
        return {type(tree).__name__: [packed(item, add, parts) for item in tree]}
    if type(tree) is dict and all(type(key) in _PLAIN for key in tree):
        return {"dict": [[key, packed(value, add, parts)] for key, value in tree.items()]}
    raise InvalidInputError(
        f"the inputs hold a {type(tree).__module__}.{type(tree).__qualname__}, which a file cannot: it holds tensors, "
        "numbers and text in tuples, lists and dicts. Let the model take those, or save result.recipe and use "
        "perfkit.apply where it is loaded"
    )


def unpacked(data: Any, tensor: Callable[[Any], Any], make: Callable[[str, list], Any]) -> Any:
    """What `packed` made the data of.

    Args:
        tensor: the tensor that something stands for.
        make: makes what is made of tensors, of its kind's name and those.
    """
    if not isinstance(data, dict):
        return data
    ((kind, held),) = [(kind, held) for kind, held in data.items() if kind != "of"]
    if kind == "tensor":
        return tensor(held)
    if kind == "made":
        return make(held, [unpacked(item, tensor, make) for item in data["of"]])
    if kind == "dict":
        return {key: unpacked(value, tensor, make) for key, value in held}
    items = [unpacked(item, tensor, make) for item in held]
    return tuple(items) if kind == "tuple" else items
