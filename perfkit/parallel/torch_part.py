"""A torch model of which a process holds a part, under the names that everything has in the whole one."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad

from perfkit._errors import UnsupportedError
from perfkit.backends.torch_surgery import ELSEWHERE
from perfkit.parallel.torch_pipe import group_of

if TYPE_CHECKING:
    from perfkit.parallel.layout import Layout


class Elsewhere(nn.Module):
    """Stands for a module that another process holds."""

    def forward(self, *_: Any, **__: Any) -> Any:
        raise UnsupportedError("this layer is held by another process: call the whole model, on every process")


def held_alone(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    mine: Collection[int],
    stages: Sequence[nn.Module],
) -> None:
    """Let a model, and its optimizer, hold the tensors of some stages alone; what no stage reads belongs to the first.

    Args:
        mine: numbers of the stages to keep.
    """
    owned = [set(map(id, _tensors(stage))) for stage in stages]
    somewhere = set().union(*owned)
    kept = set().union(*(owned[number] for number in mine))
    if 0 in mine:
        kept |= set(map(id, _tensors(model))) - somewhere
    whole = {id(p): p.numel() for p in model.parameters()}
    _keep(model, kept)
    setattr(model, ELSEWHERE, sum(whole.values()) - sum(p.numel() for p in model.parameters()))
    if optimizer is None:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in kept:
                optimizer.state.pop(parameter, None)
        group["params"] = [parameter for parameter in group["params"] if id(parameter) in kept]


def _tensors(module: nn.Module) -> Iterable[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def _keep(module: nn.Module, kept: set[int]) -> None:
    for name, child in list(module.named_children()):
        there = [id(tensor) in kept for tensor in _tensors(child)]
        if there and not any(there):
            setattr(module, name, Elsewhere())
        elif not all(there):
            _keep(child, kept)
    for held in (module._parameters, module._buffers):
        for name, tensor in list(held.items()):
            if tensor is not None and id(tensor) not in kept:
                setattr(module, name, None)  # recurrent modules keep lists of their weights up to date by this


@contextmanager
def norms_of_all(layout: Layout, device: str) -> Iterator[None]:
    """Within it `torch.nn.utils.clip_grad_norm_` takes the norm over all stages: an optimizer's hook may call it."""
    own: Any = clip_grad._get_total_norm
    group = group_of(layout, device)

    def of_some(tensors, norm_type, foreach):
        norm = own(tensors, norm_type, False, foreach)
        return (norm.full_tensor() if isinstance(norm, DTensor) else norm).to(device)

    def over_all(tensors, norm_type=2.0, error_if_nonfinite=False, foreach=None):
        alike = {}
        for tensor in tensors:
            alike.setdefault(getattr(tensor, "device_mesh", None), []).append(tensor)
        norms = [of_some(some, norm_type, foreach) for some in alike.values()]
        # In one dtype on every process: a stage without weights has no norm, and no dtype of its own.
        here = torch.zeros((), dtype=torch.float64, device=device)
        if norms:
            here = torch.linalg.vector_norm(torch.stack(norms).double(), norm_type)
        there = [torch.zeros_like(here) for _ in range(dist.get_world_size(group))]
        dist.all_gather(there, here, group=group)
        total = torch.linalg.vector_norm(torch.stack(there), norm_type)
        if error_if_nonfinite and not torch.isfinite(total):
            raise RuntimeError(f"the norm of the gradients is {float(total)}: they cannot be clipped")
        return total.to(norms[0].dtype) if norms else total

    clip_grad._get_total_norm = over_all
    try:
        yield
    finally:
        clip_grad._get_total_norm = own
