"""What is held at a moment of a step, and whose it is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import jax

from perfkit.profiling._memory_data import Allocation
from perfkit.profiling.jax_run import Run

_KEYS = re.compile(r"\['([^']*)'\]|\[(\d+)\]|\.(\w+)")
_ROOTS = re.compile(r"^(params|rest|args|kwargs|targets|state\[[0-3]\])")
_CATEGORIES = {
    "params": "parameters", "rest": "parameters", "args": "inputs", "kwargs": "inputs", "targets": "inputs",
    "state[0]": "parameters", "state[1]": "parameters", "state[2]": "optimizer state", "state[3]": "other",
}  # fmt: skip


@dataclass(frozen=True)
class Moment:
    """All that is held at a moment; `peak` is the one at which most is."""

    at_ms: float
    held: tuple[Allocation, ...]
    peak: bool = False


def argument(name: str) -> tuple[str, str]:
    """Category and module of an argument by its name in the program: "state[0]['fc1']['kernel'].value"."""
    root = _ROOTS.match(name)
    category = _CATEGORIES[root[1]] if root else "other"
    keys = [quoted or number or "" for quoted, number, _ in _KEYS.findall(name[root.end() :] if root else name)]
    keys = [key for key in keys if key]
    while keys and keys[0].isdigit():
        keys = keys[1:]  # the place in a chain of optimizers
    keys = keys[1:] if keys[:1] == ["params"] else keys  # linen's collection
    return category, ".".join(keys[:-1]) if category in ("parameters", "optimizer state") else ""


def argument_names(run: Run) -> list[str]:
    """The names of a program's arguments, in order."""
    roots = ("state", "args", "kwargs", "targets") if run.work.trains else ("params", "rest", "args", "kwargs")
    return [
        root + jax.tree_util.keystr(path)
        for root, tree in zip(roots, run.arguments, strict=True)
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]


def described(array: Any) -> str:
    return f"{array.dtype}{list(array.shape)}"
