"""Writing results in torch over what they are made from, where nobody else reads that."""

from __future__ import annotations

import itertools

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from perfkit._report import Effect, Skipped
from perfkit._workload import Workload
from perfkit.backends.torch_fused_optimizer import fused, refusal

MAKERS = (_ConvNd, nn.Linear, _BatchNorm)
"""Layers whose gradients need no output of theirs, and who keep none."""

IN_PLACE = (nn.ReLU, nn.ReLU6, nn.LeakyReLU)
"""Activations whose gradients can be told from their outputs."""


def in_place(work: Workload) -> tuple[Workload, Effect]:
    """The optimizer updates in one pass, and activations in a sequence write over the output of the layer before."""
    names = {id(module): name for name, module in work.model.named_modules()}
    touched, skipped = [], []
    if (reason := refusal(work)) is None:
        touched += fused(work)[1].touched
    else:
        skipped.append(Skipped(type(work.training.optimizer).__name__, reason))
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
