"""Torch modules with their weights and activations in 16 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils.stateless import _reparametrize_module

from perfkit._errors import UnsupportedError
from perfkit._report import Effect, Skipped
from perfkit._workload import Workload
from perfkit.backends.torch_precision import (
    at_the_boundary,
    dtypes_of,
    holders_of,
    keep_in_float32,
    named,
    only_in_float32,
    outputs_dtype,
)
from perfkit.backends.torch_state import keeping_state
from perfkit.backends.torch_surgery import around_forward, cast

Named = dict[str, torch.Tensor]


def cast_weights(work: Workload, dtype: torch.dtype) -> tuple[Workload, Effect]:
    """Parameters, buffers and inputs in `dtype`; outputs in what the parameters were in, float32 as a rule.

    In training the optimizer keeps float32 parameters, and each forward casts copies of them and of the buffers, so
    that small updates are not lost. What a model writes to while it trains stays in float32.

    For inference, where the forward makes float32 numbers that do not go with the rest, layers are cast one by one:
    each computes in `dtype`, and everything between them in float32.

    Raises:
        UnsupportedError: the model does not run so.
    """
    model = work.model
    recurrent = only_in_float32(model, dtype, work.device)
    written, constant = _written_and_constant(work) if work.trains else ({}, {})
    updating = _updating(model, written) if work.trains else {}
    kept = [*recurrent.values(), *updating.values(), *(_statistics(model) if work.trains else ())]
    alone = {item.name for item in kept}
    left = {id(part) for name, module in named(model) if name in alone for part in module.modules()}
    holders = {name: module for name, module in holders_of(model) if id(module) not in left}
    touched = tuple(name for name, module in holders.items() if any(p.dtype != dtype for p in _own(module)))
    kept += [Skipped(name, f"its parameters are {dtypes_of(m)}") for name, m in holders.items() if name not in touched]
    if not touched:
        return work, Effect((), tuple(kept), ("the model has no parameters to store in another precision",))
    held, outside = {p.dtype for p in model.parameters()}, outputs_dtype(work)
    keep_in_float32(recurrent, outputs=dtype)
    for module in updating:
        around_forward(module, lambda forward: at_the_boundary(forward, torch.float32, dtype))
    if work.trains:
        cast_ones = [module for module in model.modules() if id(module) not in left]
        _register({module: constant[module] for module in cast_ones})
        chosen = {id(tensor) for module in cast_ones for tensor in (*_own(module), *_buffers(module).values())}
        chosen -= {id(buffer) for buffers in written.values() for buffer in buffers.values()}
        _cast_in_forward(model, dtype, chosen, held, outside)
    else:
        apart = {name: module for name, module in holders.items() if name in touched and isinstance(module, _LAYERS)}
        before = [_own_tensors(module) for module in model.modules() if module not in apart.values()]
        for module in model.modules():
            if id(module) not in left:
                _cast_own(module, dtype)
        around_forward(model, lambda forward: at_the_boundary(forward, dtype, outside, held))
        if work.inputs is not None and (effect := _one_by_one(work, dtype, apart, before, touched, kept)):
            return work, effect
    if work.inputs is not None and work.trains:
        _check_runs(work, dtype)
    return work, Effect(touched, tuple(kept))


_LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding, nn.RNNBase, nn.RNNCellBase)
"""What computes in its weights' precision, given inputs in it."""


def _one_by_one(
    work: Workload,
    dtype: torch.dtype,
    apart: Mapping[str, nn.Module],
    before: Iterable[Callable[[], None]],
    touched: Iterable[str],
    kept: Iterable[Skipped],
) -> Effect | None:
    """Where the cast model does not run: each layer of `apart` by itself, all else as it was; None where it does.

    Args:
        before: puts back what the others held.

    Raises:
        UnsupportedError: it does not run so either.
    """
    try:
        _check_runs(work, dtype)
        return None
    except UnsupportedError as error:
        if not apart:
            raise
        model, whole = work.model, error
    model.__class__ = type(model).__mro__[1]  # without what was put around it
    for put_back in before:
        put_back()
    for module in apart.values():
        around_forward(module, lambda forward: at_the_boundary(forward, dtype, torch.float32))
    try:
        _check_runs(work, dtype)
    except UnsupportedError:
        raise whole from whole.__cause__
    label = str(dtype).removeprefix("torch.")
    reason = (
        f"it stays in float32: layers are cast one by one, since the forward makes numbers that {label} does not fit"
    )
    left = [Skipped(name, reason) for name in touched if name not in apart]
    told = f"each layer computes in {label} by itself, and what is between them in float32: {whole.__cause__}"
    return Effect(tuple(apart), (*kept, *left), (told,))


def _own_tensors(module: nn.Module) -> Callable[[], None]:
    """What puts back the tensors that a module holds now."""
    data = [(parameter, parameter.data) for parameter in _own(module)]
    buffers = dict(module._buffers)
    others = {name: value for name, value in vars(module).items() if isinstance(value, torch.Tensor)}

    def put_back() -> None:
        for parameter, held in data:
            parameter.data = held
        module._buffers.update(buffers)
        vars(module).update(others)

    return put_back


def _own(module: nn.Module) -> list[torch.Tensor]:
    return [p for p in module.parameters(recurse=False) if p.is_floating_point()]


def _statistics(model: nn.Module) -> list[Skipped]:
    """The norms that keep running statistics: small updates to them would be lost, and their weights go with them."""
    reason = "its running statistics and weights stay in float32 while it trains"
    norms = nn.modules.batchnorm._NormBase
    return [Skipped(name, reason) for name, module in named(model) if isinstance(module, norms)]


def _updating(model: nn.Module, written: Mapping[nn.Module, Mapping[str, Any]]) -> dict[nn.Module, Skipped]:
    """The layers whose buffers or gradients can only be in float32 while they train.

    Of a module that has layers below, the buffers stay as they are, and the layers do not.
    """
    found = {}
    for name, module in named(model):
        below = [part for part in module.modules() if part is not module and _own(part)]
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse:
            found[module] = Skipped(name, "its gradient is sparse, and such are not cast: it stays in float32")
        elif module in written and not below and not isinstance(module, nn.modules.batchnorm._NormBase):
            buffers = ", ".join(written[module])
            found[module] = Skipped(name, f"it writes to {buffers} while it trains: it stays in float32")
    return found


def _written_and_constant(work: Workload) -> tuple[dict[nn.Module, Named], dict[nn.Module, Named]]:
    """By module, the buffers that one run of the model, which is left as it is, writes to; and the unregistered
    tensors that it does not write to. All are floating-point.
    """
    model, inputs = work.model, work.inputs
    modules = list(model.modules())
    before = {module: [_versions(held) for held in (_buffers(module), _unregistered(module))] for module in modules}
    with torch.random.fork_rng(), torch.no_grad(), keeping_state(model):
        work.backend.seed(work.seed)
        model(*inputs.args, **inputs.kwargs)
        written, constant = {}, {}
        for module, (buffers, others) in before.items():
            written[module] = {name: held for name, (held, _) in buffers.items() if not _same(module, name, buffers)}
            constant[module] = {name: held for name, (held, _) in others.items() if _same(module, name, others)}
    return {module: held for module, held in written.items() if held}, constant


def _versions(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, int]]:
    return {name: (held, held._version) for name, held in tensors.items()}


def _same(module: nn.Module, name: str, before: Mapping[str, tuple[torch.Tensor, int]]) -> bool:
    held, version = before[name]
    return getattr(module, name, None) is held and held._version == version


def _register(tensors: Mapping[nn.Module, Named]) -> None:
    """Make buffers of them, which are in no state_dict: in place of buffers forward can be given copies."""
    for module, held in tensors.items():
        for name, tensor in held.items():
            del vars(module)[name]
            module.register_buffer(name, tensor, persistent=False)


def _unregistered(module: nn.Module) -> Named:
    """The floating-point tensors of its own that are used like buffers, but were never registered."""
    held = {name: value for name, value in vars(module).items() if isinstance(value, torch.Tensor)}
    return {name: value for name, value in held.items() if value.is_floating_point() and not value.requires_grad}


def _buffers(module: nn.Module) -> Named:
    """The floating-point buffers of its own."""
    return {name: held for name, held in module.named_buffers(recurse=False) if held.is_floating_point()}


def _check_unwritten(buffers: Mapping[str, torch.Tensor], copies: Mapping[str, torch.Tensor]) -> None:
    """Refuse to lose what was written to copies of buffers that nothing wrote to when the recipe was applied."""
    lost = [name for name, held in buffers.items() if name in copies and (held is not copies[name] or held._version)]
    if lost:
        raise UnsupportedError(
            f"{', '.join(lost)} was written to, and was not on the example inputs: in training 'half' gives forward "
            "copies of such buffers. Choose 'bf16' or 'fp16', which give it the buffers themselves"
        )


def _check_runs(work: Workload, dtype: torch.dtype) -> None:
    model, inputs = work.model, work.inputs
    with torch.random.fork_rng(), torch.no_grad(), keeping_state(model):
        try:
            model(*inputs.args, **inputs.kwargs)
        except Exception as error:  # whatever an operation raises that was given two precisions
            label = str(dtype).removeprefix("torch.")
            raise UnsupportedError(
                f"weights in {label} do not fit the rest of {type(model).__name__}, which has an operation that does "
                f"not take {label}, or numbers that stay in float32 (made in forward, in a list or dict, or written to "
                f"while it trains): {type(error).__name__}: {error}. Hold constants with register_buffer, or choose "
                "'bf16' or 'fp16', which cast at each operation instead"
            ) from error


def _cast_own(module: nn.Module, dtype: torch.dtype) -> None:
    for parameter in _own(module):
        parameter.data = parameter.data.to(dtype)
    for name, buffer in module.named_buffers(recurse=False):
        if buffer.is_floating_point():
            setattr(module, name, buffer.to(dtype))
    for name, value in vars(module).items():
        if isinstance(value, torch.Tensor):  # used like a buffer, but never registered
            vars(module)[name] = cast(value, dtype)
    if isinstance(module, nn.RNNBase):
        module.flatten_parameters()


def _cast_in_forward(
    model: nn.Module, dtype: torch.dtype, chosen: set[int], held: Iterable[torch.dtype], outside: torch.dtype
) -> None:
    """`forward` on parameters cast to `dtype`: gradients flow back through the cast to the float32 originals."""
    first = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    places = {
        f"{prefix}.{name}" if prefix else name: first[id(tensor)]  # of tied ones the first
        for prefix, module in model.named_modules()  # a module that stands in two places once, to be put back once
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if id(tensor) in chosen
    }
    names = set(places.values())

    def wrap(forward: Callable) -> Callable:
        def cast_anew(module, *args, **kwargs):
            # functional_call would call the module, hooks and this wrapper included: only its inner half is wanted
            tensors = (*module.named_parameters(), *module.named_buffers())
            low = {name: tensor.to(dtype) for name, tensor in tensors if name in names}
            state = {place: low[name] for place, name in places.items() if name in low}
            with _reparametrize_module(module, state):
                outputs = forward(module, *args, **kwargs)
                if not torch.compiler.is_compiling():
                    _check_unwritten(dict(module.named_buffers()), state)
            return outputs

        return at_the_boundary(cast_anew, dtype, outside, held)

    around_forward(model, wrap)
