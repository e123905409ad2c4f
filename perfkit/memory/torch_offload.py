"""What training in torch remembers, in the memory of the host: saved activations, and the optimizer's state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from perfkit._report import Effect
from perfkit._workload import Workload
from perfkit.backends.torch_surgery import around_call, map_tensors, parts


def offloaded(work: Workload, activations: bool, optimizer: bool, least_bytes: int) -> tuple[Workload, Effect]:
    """Move to the host what the backward pass and the next step need later."""
    touched, notes = [], []
    if activations:
        around_call(work.model, partial(saving_on_host, work.model, least_bytes))
        touched.append(work.backend.model_name(work))
        notes.append(
            f"what is saved for the backward pass in tensors of {least_bytes / 1e6:g} MB or more lies on the host"
        )
    if optimizer:
        held = work.training.optimizer
        state_to_host(held)
        held.register_step_pre_hook(state_to_device)
        held.register_step_post_hook(state_to_host)
        touched.append(type(held).__name__)
        notes.append("the optimizer's state lies on the host between steps, and is copied both ways in each")
    return work, Effect(tuple(touched), notes=tuple(notes))


@contextmanager
def saving_on_host(model: nn.Module, least_bytes: int) -> Iterator[None]:
    """Within it, what is saved for the backward pass is copied to pinned memory of the host; parameters are not.

    Source: torch.autograd.graph.save_on_cpu, which copies parameters too.
    """
    if not torch.is_grad_enabled():
        yield
        return
    held = (*model.parameters(), *model.buffers())
    own = {part.untyped_storage().data_ptr() for tensor in held for part in parts(tensor)}

    def pack(tensor: torch.Tensor) -> Any:
        small = tensor.numel() * tensor.element_size() < least_bytes
        if small or any(part.untyped_storage().data_ptr() in own for part in parts(tensor)):
            return tensor
        return tensor.device, on_host(tensor)

    def unpack(packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        device, tensor = packed
        return tensor.to(device, non_blocking=tensor.is_pinned())

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in the host's memory, pinned where it comes from a GPU; the copy is complete when this returns."""
    pinned = tensor.device.type == "cuda"
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, layout=tensor.layout, device="cpu", pin_memory=pinned)
    return copy.copy_(tensor)


def state_to_host(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Move the optimizer's state to the host, after a step."""
    for parameter, state in optimizer.state.items():
        optimizer.state[parameter] = {
            name: on_host(value) if isinstance(value, torch.Tensor) and value.device == parameter.device else value
            for name, value in state.items()
        }


def state_to_device(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Move the optimizer's state to where its parameters are, before a step. Adam's step counter stays on the host."""
    for parameter, state in optimizer.state.items():

        def moved(value: torch.Tensor, device: torch.device = parameter.device) -> torch.Tensor:
            return value.to(device, non_blocking=True) if value.dim() else value

        optimizer.state[parameter] = {name: map_tensors(moved, value) for name, value in state.items()}
