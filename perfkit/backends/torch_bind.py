"""What a caller passed as a torch model's inputs and optimizer, as a workload holds them; bad input is refused here."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from perfkit._errors import InvalidInputError, PerfkitWarning
from perfkit._workload import Inputs
from perfkit.backends.torch_functions import enclosed, functions_in, named
from perfkit.backends.torch_surgery import tensors_in


def as_inputs(model: nn.Module, example_inputs: Any) -> Inputs:
    """A tuple as positional arguments, a dict as keywords if its keys are forward's parameters, else one argument."""
    if isinstance(example_inputs, Inputs):
        return example_inputs
    if isinstance(example_inputs, tuple) and not hasattr(example_inputs, "_fields"):
        return Inputs(example_inputs)
    if isinstance(example_inputs, Mapping):
        called = model.forward if type(model).__call__ is nn.Module.__call__ else model.__call__
        parameters = inspect.signature(called).parameters.values()
        names = {parameter.name for parameter in parameters}
        if set(example_inputs) <= names or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return Inputs((), dict(example_inputs))
    return Inputs((example_inputs,))


def optimizer_of(model: nn.Module, optimizer: Any) -> torch.optim.Optimizer:
    """The caller's optimizer, or the one that its function makes of the model's parameters.

    Raises:
        InvalidInputError: it is none, or holds parameters that are not the model's.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        if not callable(optimizer):
            raise InvalidInputError(
                f"optimizer is a {type(optimizer).__name__}: pass a torch optimizer over the model's parameters, "
                "or a function of the parameters such as functools.partial(torch.optim.Adam, lr=1e-3)"
            )
        try:
            optimizer = optimizer(model.parameters())
        except Exception as error:
            raise InvalidInputError(f"optimizer(model.parameters()) raised {type(error).__name__}: {error}") from error
    own = {id(parameter) for parameter in model.parameters()}
    foreign = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in own]
    if foreign:
        raise InvalidInputError(
            f"optimizer holds {len(foreign)} parameter(s) that are not the model's: build it on this model"
        )
    return optimizer


def check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Refuse what a copy of an optimizer could not train with, and tell of a scheduler, which does not know the copy.

    Raises:
        InvalidInputError: its step asks for a function, or a hook has the model or the optimizer itself.
    """
    kind, scheduled = type(optimizer).__name__, "make a scheduler over result.optimizer and step it after train_step"
    _, *given = inspect.signature(type(optimizer).step).parameters.values()  # a scheduler wraps the instance's
    first = next(
        (each for each in given if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD), None
    )
    if first is not None:
        raise InvalidInputError(
            f"{kind}.step asks for {first.name}, to compute the loss several times a step; train_step computes it once "
            "and calls step() without arguments: take an optimizer that does without, such as torch.optim.Adam"
        )
    own = {id(thing) for thing in (*model.modules(), *model.parameters(), *model.buffers())}
    hooks = [held for name, held in vars(optimizer).items() if name.startswith("_optimizer_")]
    for called in functions_in(hooks):
        if any(id(thing) in own for thing in enclosed(called)):
            raise InvalidInputError(
                f"a hook of {kind} is {named(called)}, which has the model, the optimizer or "
                "its scheduler from outside of its arguments: a copy would go on changing the original's. Let it use "
                f"the optimizer that it is given; {scheduled}"
            )
    if hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        warnings.warn(
            f"a learning-rate scheduler steps {kind}, and train_step works with a copy of that, whose learning rates "
            f"stay as they are now: {scheduled}",
            PerfkitWarning,
            stacklevel=4,
        )


def device_of(model: nn.Module, inputs: Inputs | None) -> str:
    """The kind of device that the model or its inputs are on: "cpu" only where all of them are.

    Raises:
        InvalidInputError: the model is on the meta device.
    """
    held = [*model.parameters(), *model.buffers(), *(tensors_in((inputs.args, inputs.kwargs)) if inputs else ())]
    kinds = {tensor.device.type for tensor in held} or {"cpu"}
    if "meta" in kinds:
        raise InvalidInputError("the model is on the meta device and has no values: materialize it first")
    return next(iter(kinds - {"cpu"}), "cpu")
