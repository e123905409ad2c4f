"""Functions that torch models keep, and what these have beside their arguments: what a deepcopy leaves as it is."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

_CONTAINERS = (list, tuple, set, Mapping, torch.optim.Optimizer, LRScheduler)


def named(called: Any) -> str:
    """A function, or an object that is called, for people."""
    if isinstance(called, types.FunctionType):
        return f"the function {called.__qualname__!r}"
    return f"a {type(called).__qualname__} that is called"


def functions_in(value: Any, depth: int = 3) -> Iterator[Any]:
    """The functions in nested containers, partial functions and bound methods; and objects that are called as such."""
    if isinstance(value, types.FunctionType):
        yield value
    elif isinstance(value, types.MethodType):
        yield from functions_in(value.__func__, depth)
    elif isinstance(value, functools.partial):
        yield value
        yield from functions_in([value.func, *value.args, *value.keywords.values()], depth)
    elif _is_called(value):
        yield value
        if depth:
            yield from functions_in([type(value).__call__, *_attributes(value)], depth - 1)
    elif depth and isinstance(value, Mapping):
        yield from functions_in(list(value.values()), depth)
    elif depth and isinstance(value, (list, tuple, set)):
        for item in value:
            yield from functions_in(item, depth - 1)


def _is_called(value: Any) -> bool:
    """Whether it is an object of a class of somebody's own that is called like a function."""
    if isinstance(value, (type, nn.Module, torch.Tensor)) or not callable(value):
        return False
    return any(isinstance(vars(kind).get("__call__"), types.FunctionType) for kind in type(value).__mro__)


def _attributes(value: Any) -> Iterator[Any]:
    yield from getattr(value, "__dict__", {}).values()
    slots = [kind.__dict__.get("__slots__", ()) for kind in type(value).__mro__]
    for name in [name for each in slots for name in ((each,) if isinstance(each, str) else each)]:
        if name not in ("__dict__", "__weakref__") and hasattr(value, name):
            yield getattr(value, name)


def _brought(called: Any) -> Iterator[Any]:
    """What a function has beside its arguments, or an object that is called, or a partial function."""
    if isinstance(called, functools.partial):
        yield from (*called.args, *called.keywords.values())
    elif isinstance(called, types.FunctionType):
        yield from (cell.cell_contents for cell in called.__closure__ or () if _filled(cell))
        yield from (*(called.__defaults__ or ()), *(called.__kwdefaults__ or {}).values())
    else:
        yield from _attributes(called)


def enclosed(called: Any, depth: int = 3) -> Iterator[Any]:
    """What a function or an object that is called has beside its arguments, and what other functions there have."""
    for thing in _brought(called):
        held = thing.__self__ if isinstance(thing, types.MethodType) else thing
        for item in _contained(held) if isinstance(held, _CONTAINERS) else (held,):
            yield item
            if depth and isinstance(item, types.FunctionType):
                yield from enclosed(item, depth - 1)


def _contained(container: Any, depth: int = 5) -> Iterator[Any]:
    """What nested containers, optimizers and their schedulers hold."""
    if isinstance(container, LRScheduler):
        container = container.optimizer
    if isinstance(container, torch.optim.Optimizer):
        container = container.param_groups
    if isinstance(container, Mapping):
        container = [*container.keys(), *container.values()]
    for item in container:
        if depth and isinstance(item, _CONTAINERS):
            yield from _contained(item, depth - 1)
        else:
            yield item


def _filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # a name that nothing was assigned to
        return False
