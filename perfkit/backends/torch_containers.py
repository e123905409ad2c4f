"""Dataclasses and mappings of a stranger's made anew with other values, whatever their constructors take."""

from __future__ import annotations

import copy
import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from typing import Any


def replaced(tree: Any, fields: dict[str, Any]) -> Any:
    """A dataclass with other fields."""
    try:
        return dataclasses.replace(tree, **fields)
    except (TypeError, ValueError):  # a constructor of its own, or one that wants what is not kept
        made = copy.copy(tree)
        for name, value in fields.items():
            object.__setattr__(made, name, value)
        return made


def refilled(tree: Mapping, items: dict[Any, Any]) -> Mapping:
    """A mapping of the same class with these items."""
    if isinstance(tree, defaultdict):
        return defaultdict(tree.default_factory, items)
    if not isinstance(tree, dict):
        return type(tree)(items)
    try:
        made = type(tree)(items)
    except TypeError:
        made = {}
    if made.keys() == items.keys() and all(made[key] is value for key, value in items.items()):
        return made
    made = type(tree).__new__(type(tree))  # its constructor takes something else, such as each item by its name
    vars(made).update(vars(tree))
    for key, value in items.items():
        made[key] = value
    return made
