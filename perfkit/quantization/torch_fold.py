"""Folding batch norms into the convolutions before them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from perfkit._workload import Workload
from perfkit.backends.torch_state import keeping_state
from perfkit.backends.torch_surgery import tensors_in, widened
from perfkit.quantization.torch_ranges import linked

ROUNDING = 1e-4
"""Relative error that folding may bring, from computing in another order."""


def fold_norms(work: Workload, convs: Mapping[str, nn.Module]) -> dict[str, str]:
    """Fold each batch norm in eval mode into the convolution before it, where that leaves the outputs as they are.

    A norm behind an integer convolution would otherwise run on its own, in float32.

    Args:
        convs: the convolutions that may be changed, by name.

    Returns:
        By each norm that was folded, the convolution that it was folded into.
    """
    model, folded = work.model, {}
    norms = linked(work, convs).norms
    if not norms:
        return folded
    before = _outputs(work)
    for name, conv_name in norms.items():
        norm, conv = model.get_submodule(name), convs.get(conv_name)
        if conv is None or norm.training or not norm.track_running_stats:
            continue
        weight, bias = conv.weight, conv.bias
        fused = fuse_conv_bn_eval(conv, norm)
        conv.weight, conv.bias = fused.weight, fused.bias
        model.set_submodule(name, _rest(norm))
        if _distance(_outputs(work), before) <= ROUNDING:
            folded[name] = conv_name
        else:  # something else takes the convolution's output too
            conv.weight, conv.bias = weight, bias
            model.set_submodule(name, norm)
    return folded


def _rest(norm: nn.Module) -> nn.Module:
    """What a norm does beside: such as timm's, which have an activation in them."""
    held = [module for module in norm.children() if type(module) is not nn.Identity]
    return nn.Identity() if not held else held[0] if len(held) == 1 else nn.Sequential(*held)


def _outputs(work: Workload) -> list[torch.Tensor]:
    inputs = work.inputs or work.calibration[0]
    work.backend.seed(work.seed)
    with torch.no_grad(), keeping_state(work.model):
        outputs = work.model(*inputs.args, **inputs.kwargs)
    return [widened(tensor.detach()) for tensor in tensors_in(outputs)]


def _distance(outputs: list[torch.Tensor], before: list[torch.Tensor]) -> float:
    """The largest relative error of an output."""
    pairs = zip(outputs, before, strict=True)
    return max((float((new - old).norm() / old.norm().clamp_min(1e-30)) for new, old in pairs), default=0.0)
