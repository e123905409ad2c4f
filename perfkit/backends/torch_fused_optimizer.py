"""torch's optimizers with an update in one pass over each parameter, without temporaries."""

from __future__ import annotations

import torch
from torch import nn

from perfkit._report import Effect
from perfkit._workload import Workload

FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)
"""Those that have such an update."""


def fused(work: Workload) -> tuple[Workload, Effect]:
    """Fuse the update, in place: of an optimizer that `refusal` has nothing against."""
    optimizer = work.training.optimizer
    for options in (optimizer.defaults, *optimizer.param_groups):
        options |= {"fused": True, "foreach": False}
    optimizer._step_supports_amp_scaling = True
    for parameter, state in optimizer.state.items():
        if isinstance(step := state.get("step"), torch.Tensor):  # read by the kernel, where the parameter is
            state["step"] = step.to(parameter.device, torch.float32)
    return work, Effect((type(optimizer).__name__,))


def refusal(work: Workload) -> str | None:
    """Why the optimizer's update cannot be fused; None where it can."""
    optimizer = work.training.optimizer
    groups = optimizer.param_groups
    if type(optimizer) not in FUSED:
        return f"torch has no fused {type(optimizer).__name__}: {', '.join(kind.__name__ for kind in FUSED)} have one"
    if all(group.get("fused") for group in groups):
        return "the update is fused already"
    if any(group.get("differentiable") or group.get("capturable") for group in groups):
        return "the optimizer was made differentiable or capturable, which a fused one is not"
    if not all(p.is_floating_point() for group in groups for p in group["params"]):
        return "the fused update takes floating-point parameters alone"
    for name, module in work.model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse:
            return f"the gradient of {name or type(module).__name__} is sparse, and the fused update takes dense ones"
    return None
