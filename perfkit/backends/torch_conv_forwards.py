"""Forwards that call convolutions and linear layers, rewritten so that each hands over what follows as one group.

The forward of `nn.Sequential` is known; others are read (`torch_regroup.py`).
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable
from typing import Any

from torch import nn

from perfkit.backends.torch_fused_conv import may_begin, may_follow
from perfkit.backends.torch_regroup import regrouped
from perfkit.backends.torch_source import Unreadable

_ROOMS = tuple(f"perfkit.{room}." for room in ("backends", "recipes", "quantization", "pruning"))


def sequential(run: Callable[[tuple, Any], Any]) -> Callable:
    """The forward of `nn.Sequential`, with its groups handed to `run`."""

    def forward(self: nn.Sequential, input: Any) -> Any:
        modules = tuple(self._modules.values())
        at = 0
        while at < len(modules):
            end = at + 1
            if isinstance(modules[at], (nn.Conv2d, nn.Linear)):
                while end < len(modules) and may_follow(modules[end]):
                    end += 1
            input = modules[at](input) if end == at + 1 else run(modules[at:end][::-1], input)
            at = end
        return input

    return forward


def rewritten(owner: nn.Module, run: Callable[[tuple, Any], Any]) -> tuple[Callable, list[nn.Module]] | None:
    """The forward of a module with its groups handed to `run`, and the convolutions that they are known to begin with.

    None where it has no groups.

    Raises:
        Unreadable: its source is not there, or is not what runs.
    """
    own = written_forward(owner)
    if own is nn.Sequential.forward:
        pairs = itertools.pairwise(owner)
        begun = [one for one, other in pairs if may_begin(one) and may_follow(other)]
        found = (sequential(run), begun) if begun else None
    else:
        found = regrouped(owner, own, may_begin, may_follow, run)
    if found is None:
        return None
    if (forward := _replaced(type(owner).forward, own, found[0])) is None:
        raise Unreadable("its forward is wrapped")
    return forward, found[1]


def written_forward(owner: nn.Module) -> Callable:
    """The forward that the caller's class has, below what perfkit put around it."""
    forwards = [vars(kind)["forward"] for kind in type(owner).__mro__ if "forward" in vars(kind)]
    return next(each for each in forwards if not _is_ours(each))


def _is_ours(function: Any) -> bool:
    return (getattr(function, "__module__", None) or "").startswith(_ROOMS)


def _replaced(function: Any, old: Callable, new: Callable) -> Callable | None:
    """`function`, one of ours around `old`, around `new`; None where it is not around `old`."""
    if function is old:
        return new
    if not (isinstance(function, types.FunctionType) and _is_ours(function) and function.__closure__):
        return None
    cells = [cell.cell_contents for cell in function.__closure__]
    for at, value in enumerate(cells):
        if (inside := _replaced(value, old, new)) is not None:
            cells[at] = inside
            closure = tuple(map(types.CellType, cells))
            copy = types.FunctionType(
                function.__code__, function.__globals__, function.__name__, function.__defaults__, closure
            )
            copy.__kwdefaults__ = function.__kwdefaults__
            return copy
    return None
