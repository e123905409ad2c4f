"""Writing results in torch over what they are made from, where nobody else reads that."""

from __future__ import annotations

import itertools

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from perfkit._report import Effect, Skipped
from perfkit._workload import Workload

FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)
"""Optimizers with an update in one pass, without temporaries."""

MAKERS = (_ConvNd, nn.Linear, _BatchNorm)
"""Layers whose gradients need no output of theirs, and who keep none."""

IN_PLACE = (nn.ReLU, nn.ReLU6, nn.LeakyReLU)
"""Activations whose gradients can be told from their outputs."""


def in_place(work: Workload) -> tuple[Workload, Effect]:
    """The optimizer updates in one pass, and activations in a sequence write over the output of the layer before."""
    names = {id(module): name for name, module in work.model.named_modules()}
    touched, skipped = [], []
    optimizer = work.training.optimizer
    if (reason := _not_fused(optimizer)) is None:
        for options in (optimizer.defaults, *optimizer.param_groups):
            options |= {"fused": True, "foreach": False}
        optimizer._step_supports_amp_scaling = True
        touched.append(type(optimizer).__name__)
    else:
        skipped.append(Skipped(type(optimizer).__name__, reason))
    for sequence in work.model.modules():
        if type(sequence).forward is not nn.Sequential.forward:
            continue
        for before, after in itertools.pairwise(sequence):
            if isinstance(before, MAKERS) and type(after) in IN_PLACE and not _seen(before) and not after.inplace:
                after.inplace = True
                touched.append(names[id(after)])
    return work, Effect(tuple(touched), tuple(skipped))


def _seen(layer: nn.Module) -> bool:
    """Whether a hook may keep the layer's output."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks)


def _not_fused(optimizer: torch.optim.Optimizer) -> str | None:
    if type(optimizer) not in FUSED:
        return f"torch has no fused {type(optimizer).__name__}: {', '.join(kind.__name__ for kind in FUSED)} have one"
    if optimizer.state:
        return "it has taken steps, and holds its state as the plain update wants it"
    if any(group.get("fused") for group in optimizer.param_groups):
        return "it is fused already"
    if any(group.get("differentiable") or group.get("capturable") for group in optimizer.param_groups):
        return "it was made differentiable or capturable, which a fused one is not"
    if not all(p.is_floating_point() for group in optimizer.param_groups for p in group["params"]):
        return "the fused update takes floating-point parameters alone"
    return None
