"""Hooks of a torch model: of its modules' calls; and of parameters, which deepcopy leaves behind."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch
from torch import nn


def gradient_hooks(parameter: torch.Tensor) -> tuple[list[Callable], list[Callable]]:
    """What is called with a parameter's gradient, and what once it was added to the parameter's."""
    kinds = parameter._backward_hooks, getattr(parameter, "_post_accumulate_grad_hooks", None)
    before, after = (list(hooks.values()) if hooks else [] for hooks in kinds)
    return before, after


def copy_gradient_hooks(model: nn.Module, copied_to: nn.Module) -> None:
    """Give a copy's parameters the hooks of the model's.

    What is a method of the model becomes one of the copy, and so does a module, parameter or buffer of the model that
    an object among the hooks holds.
    """
    twins = dict(copied_to.named_parameters())
    memo: dict[int, object] = {id(module): copied_to.get_submodule(name) for name, module in model.named_modules()}
    tensors = twins | dict(copied_to.named_buffers())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        memo[id(tensor)] = tensors[name]
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        with_gradient, once_added = gradient_hooks(parameter)
        for hook in with_gradient:
            twins[name].register_hook(copy.deepcopy(hook, memo))
        for hook in once_added:
            twins[name].register_post_accumulate_grad_hook(copy.deepcopy(hook, memo))


def call_hooks(module: nn.Module) -> list[Callable]:
    """What the caller wants called around this module's calls; what torch's own libraries put there is not among it."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return [hook for hook in hooks if not _made_in(hook).startswith(("torch.", "perfkit."))]


def _made_in(hook: Callable) -> str:
    """The module that defines it."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    return getattr(hook, "__module__", None) or type(hook).__module__
