"""Copies of torch models, and of the optimizers that train them: nothing of a copy is the original's."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from perfkit._errors import InvalidInputError

_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


def copied(*things: Any) -> Any:
    """Deep copies that share what the originals share: a module, or a module and its optimizer.

    Raises:
        InvalidInputError: the module cannot be copied.
    """
    modules = [module for thing in things if isinstance(thing, nn.Module) for module in thing.modules()]
    try:
        beforehand = non_leaf_copies(held for module in modules for held in _held(module))
        copies = copy.deepcopy(things, beforehand | _scripted_copies(modules))
    except Exception as error:
        raise InvalidInputError(
            f"the model cannot be copied ({type(error).__name__}: {error}), and perfkit never changes the caller's: "
            "give it a __deepcopy__, or take out what cannot be copied (locks, files, compiled code)"
        ) from error
    for thing, original in zip(copies, things, strict=True):
        if isinstance(thing, torch.optim.Optimizer):
            _copy_hooks(original, thing)
    return copies if len(copies) > 1 else copies[0]


def _copy_hooks(optimizer: torch.optim.Optimizer, copied_to: torch.optim.Optimizer) -> None:
    """deepcopy leaves an optimizer's hooks behind, gradient clipping among them. They are given the optimizer."""
    for name, hooks in vars(optimizer).items():
        if name.startswith("_optimizer_") and name.endswith("_hooks"):
            getattr(copied_to, name).update(hooks)


def non_leaf_copies(tensors: Iterable[torch.Tensor]) -> dict[int, Any]:
    """deepcopy refuses tensors that have a history, such as cached or reparametrized weights: copy those beforehand.

    So it does sparse ones whose indices are compressed.
    """
    refused = (tensor for tensor in tensors if not tensor.is_leaf or tensor.layout in _COMPRESSED)
    return {id(tensor): tensor.detach().clone() for tensor in refused}


def _held(value: Any, depth: int = 5) -> Iterator[torch.Tensor]:
    """The tensors that a module has beside its parameters, those in plain containers included."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, nn.Module):
        names = vars(value).keys() - {"_parameters", "_modules"}
        yield from _held([vars(value)[name] for name in names], depth)
    elif depth and isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            if not isinstance(item, nn.Module):
                yield from _held(item, depth - 1)


def _scripted_copies(modules: Iterable[nn.Module]) -> dict[int, Any]:
    """deepcopy makes TorchScript weights that are computed from the original's: gradients would go to those."""
    memo: dict[int, Any] = {}
    for module in modules:
        if not isinstance(module, torch.jit.ScriptModule) or id(module) in memo:
            continue
        twin = copy.deepcopy(module)
        memo |= {id(part): other for part, other in zip(module.modules(), twin.modules(), strict=True)}
        for tensor, other in zip(_registered(module), _registered(twin), strict=True):
            memo[id(tensor)] = other.detach_().requires_grad_(tensor.requires_grad)
    return memo


def _registered(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()
