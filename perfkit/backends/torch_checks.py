"""What a torch model and its inputs must be, told before anything is done."""

from __future__ import annotations

import copy
import dataclasses
import types
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedTensorMixin

from perfkit._errors import InvalidInputError, PerfkitWarning
from perfkit._workload import Inputs
from perfkit.backends.torch_copies import non_leaf_copies
from perfkit.backends.torch_functions import enclosed, functions_in, named
from perfkit.backends.torch_hooks import gradient_hooks
from perfkit.backends.torch_surgery import COMPILED_WITH, map_tensors, parts, tensors_in

_PLAIN = (str, bytes, int, float, complex, bool, type(None), type, types.ModuleType, torch.dtype, torch.device)


def check_module(model: nn.Module) -> None:
    """Refuse what cannot be copied or rewritten: scripted, exported, compiled, or without numbers.

    Raises:
        InvalidInputError: with what to do about it.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise InvalidInputError(
            f"{type(model).__name__} is a TorchScript module, which cannot be rewritten: pass the module it was made of"
        )
    if any(kind.__module__.startswith("torch.export") for kind in type(model).__mro__):
        raise InvalidInputError(
            f"{type(model).__name__} is the module of an exported program, which has no layers any more: pass the "
            "module that was exported, and export the result where that is needed"
        )
    for name, module in model.named_modules():
        compiled = module._compiled_call_impl and not hasattr(type(module), COMPILED_WITH)
        if "_orig_mod" in module._modules or compiled:
            raise InvalidInputError(
                f"{name or type(model).__name__} is compiled already: pass the module as it was before torch.compile"
            )
    check_initialized(model)
    for name, parameter in model.named_parameters():
        held = [part for part in parts(parameter.detach()) if part.is_floating_point()]
        bad = sum(int((~torch.isfinite(part)).sum()) for part in held)
        if bad:
            raise InvalidInputError(
                f"parameter {name!r} holds {bad} NaN or infinite of {parameter.numel()} values: repair them first"
            )


def check_initialized(model: nn.Module) -> None:
    """Refuse a lazy module that was never called.

    Raises:
        InvalidInputError: a parameter or buffer has no shape yet.
    """
    held = [*model.named_parameters(), *model.named_buffers()]
    lazy = [name for name, tensor in held if isinstance(tensor, UninitializedTensorMixin)]
    if lazy:
        raise InvalidInputError(
            f"{', '.join(map(repr, lazy))} of {type(model).__name__} has no shape yet (a lazy module): "
            "call the model once on its inputs, then pass it"
        )


def warn_of_hidden_modules(model: nn.Module) -> None:
    """Say which modules torch does not know of, since no recipe sees them: those in plain lists and dicts."""
    known = {id(module) for module in model.modules()}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute == "_modules" or not isinstance(value, (list, tuple, dict)):
                continue
            items = value.values() if isinstance(value, dict) else value
            hidden = [item for item in items if isinstance(item, nn.Module) and id(item) not in known]
            if hidden:
                kind = "ModuleDict" if isinstance(value, dict) else "ModuleList"
                warnings.warn(
                    f"{attribute} of {name or type(model).__name__} holds {len(hidden)} module(s) in a plain "
                    f"{type(value).__name__}, where torch does not find them (.parameters() and .to() neither), so no "
                    f"recipe works on them: use nn.{kind}",
                    PerfkitWarning,
                    stacklevel=4,
                )


def check_surroundings(device: str) -> None:
    """Refuse to measure within autocast: neither side would be in the precision that the report tells.

    Raises:
        InvalidInputError: autocast is on for the device.
    """
    if torch.is_autocast_enabled(device):
        raise InvalidInputError(
            f"this was called within torch.autocast on {device}, so the original would not be measured in its own "
            "precision: call it outside, and choose recipe='bf16' or 'fp16' for autocast"
        )


def check_on_its_own(twin: nn.Module, original: nn.Module) -> None:
    """Refuse a copy whose functions go on using the original: deepcopy copies no function, and so nothing in one.

    Raises:
        InvalidInputError: a hook, or a function kept in an attribute, holds a module or tensor of the original.
    """
    foreign = {id(thing) for thing in (*original.modules(), *original.parameters(), *original.buffers())}
    for holder, value in _kept(twin):
        for called in functions_in(value):
            if any(id(thing) in foreign for thing in enclosed(called)):
                raise InvalidInputError(
                    f"{holder} holds {named(called)}, which has the model, or a part of it, "
                    "from outside of its arguments: a copy would go on using the original's. Make it a method "
                    "(self.hook), or let a hook use what it is given"
                )


def _kept(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """What may hold functions: the attributes of modules, and the hooks of parameters."""
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute == "extra_repr":  # for people alone; torchao's has the original
                continue
            yield f"{attribute} of {name or type(model).__name__}", value
    for name, parameter in model.named_parameters():
        yield f"a gradient hook of parameter {name!r}", gradient_hooks(parameter)


def own_inputs(inputs: Inputs) -> Inputs:
    """Copies of the inputs, so that no model writes to the caller's."""
    memo = non_leaf_copies(tensors_in((inputs.args, inputs.kwargs)))
    try:
        return copy.deepcopy(inputs, memo)
    except Exception:  # whatever an object of the caller's may raise that cannot be copied: its tensors can
        given = inputs.args, inputs.kwargs
        return Inputs(*map_tensors(lambda tensor: memo.get(id(tensor), tensor.detach().clone()), given))


def check_inputs(inputs: Inputs) -> None:
    """Refuse inputs that nothing can be computed from.

    Raises:
        InvalidInputError: an empty tensor, or a nested one.
    """
    for tensor in tensors_in((inputs.args, inputs.kwargs)):
        if tensor.is_nested:
            raise InvalidInputError(
                "example_inputs hold a nested tensor, whose rows of different lengths cannot be counted or compared: "
                "pass a list of tensors, a packed sequence or a padded tensor"
            )
        if tensor.numel() == 0:
            raise InvalidInputError(f"example_inputs hold an empty tensor of shape {list(tensor.shape)}")


def check_outputs(name: str, outputs: Any, inputs: Inputs) -> None:
    """Refuse outputs that cannot be compared with anything.

    Raises:
        InvalidInputError: no tensor was found, or a nested one, or no floating-point number that is finite.
    """
    found = list(tensors_in(outputs))
    if any(tensor.is_nested for tensor in found):
        raise InvalidInputError(
            f"{name} returned a nested tensor, which cannot be compared: let forward return a list of tensors "
            "(unbind()) or a padded one (to_padded_tensor)"
        )
    if not found:
        raise InvalidInputError(
            f"{name} returned a {type(outputs).__name__} without any tensor that could be compared: let forward return "
            "tensors, or tuples, lists, dicts, dataclasses or packed sequences of them"
        )
    if hidden := sorted({type(item).__name__ for item in _opaque(outputs)}):
        warnings.warn(
            f"the outputs of {name} hold tensors in objects ({', '.join(hidden)}), where they are neither compared nor "
            "returned in the precision that they had: return them in tuples, lists, dicts or dataclasses",
            PerfkitWarning,
            stacklevel=5,
        )
    values = [_dense(tensor) for tensor in found if tensor.is_floating_point() or tensor.is_complex()]
    if sum(value.numel() for value in values) and not any(torch.isfinite(value).any() for value in values):
        given = map(_dense, tensors_in((inputs.args, inputs.kwargs)))
        bad = sum(int((~torch.isfinite(tensor)).sum()) for tensor in given)
        raise InvalidInputError(
            f"{name} returned no finite number on example_inputs, which hold {bad} NaN or infinite ones: "
            "nothing could be compared. Pass inputs on which its outputs are numbers"
        )


def _opaque(tree: Any) -> Iterator[Any]:
    """Objects among the outputs that have tensors which are not looked for."""
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    if isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _opaque(item)
    elif not isinstance(tree, (*_PLAIN, torch.Tensor, nn.Module)) and not dataclasses.is_dataclass(tree):
        held = getattr(tree, "__dict__", {}).values()
        yield from [tree] if any(isinstance(value, torch.Tensor) for value in held) else ()


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


def writes_to_inputs(name: str, more: str) -> InvalidInputError:
    """The error for a model whose every call finds other inputs than the one before."""
    return InvalidInputError(
        f"{name} writes to its inputs {more}: it is run many times on the same ones here, and each call would find "
        "others. Let forward work on copies: x.clone() before an in-place operation, copy.deepcopy of a cache; or "
        "leave the cache out of the example inputs: the result takes one all the same"
    )


def content(inputs: Inputs) -> list[tuple]:
    """What tells whether inputs were written to: which tensors they hold, how often written, in what containers."""
    found: list[tuple] = []
    _content(("example_inputs", (inputs.args, inputs.kwargs)), found, set())
    return found


def _content(named: tuple[str, Any], found: list[tuple], seen: set[int]) -> None:
    name, value = named
    if isinstance(value, torch.Tensor):
        found.append((name, id(value), value._version))
        return
    if isinstance(value, (*_PLAIN, nn.Module)) or id(value) in seen:
        return
    seen.add(id(value))
    inner: list[tuple[str, Any]] = []
    if isinstance(value, Mapping):
        inner += [(f"{name}[{key!r}]", item) for key, item in value.items()]
    elif isinstance(value, (list, tuple)):
        inner += [(f"{name}[{index}]", item) for index, item in enumerate(value)]
    fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
    attributes = {item.name: getattr(value, item.name, None) for item in fields} | getattr(value, "__dict__", {})
    inner += [(f"{name}.{key}", item) for key, item in attributes.items()]
    found.append((name, len(inner)))
    for item in inner:
        _content(item, found, seen)
