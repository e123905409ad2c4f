"""torchao's Adam, whose moments are held in 8 or 4 bits, in the place of torch's."""

from __future__ import annotations

from dataclasses import replace

import torch

from perfkit._report import Effect
from perfkit._workload import Workload
from perfkit.backends.torch_stderr import without_lines

LEAST = 4096
"""Parameters with fewer numbers keep their moments as they are."""

KINDS = {torch.optim.Adam: "Adam", torch.optim.AdamW: "AdamW"}
OPTIONS = ("lr", "betas", "eps", "weight_decay", "amsgrad")


def refusal(optimizer: torch.optim.Optimizer) -> str | None:
    """Why an optimizer has no twin with a state in few bits; None where it has one."""
    if type(optimizer) not in KINDS:
        return f"torchao's states in few bits are Adam's and AdamW's, and the optimizer is {type(optimizer).__name__}"
    if optimizer.state:
        return "the optimizer has taken steps: its moments would be lost"
    if any(group.get("maximize") for group in optimizer.param_groups):
        return "the optimizer maximizes, which torchao's do not"
    return None


def low_bit(work: Workload, bits: str) -> tuple[Workload, Effect]:
    """The optimizer's twin of the same settings, on the same parameters."""
    with without_lines("Failed to load"):
        import torchao.optim
    optimizer = work.training.optimizer
    kind = getattr(torchao.optim, KINDS[type(optimizer)] + {"8": "8bit", "4": "4bit", "fp8": "Fp8"}[bits])
    groups = [
        {"params": group["params"], **{name: group[name] for name in OPTIONS}} for group in optimizer.param_groups
    ]
    twin = kind(groups, **{name: optimizer.defaults[name] for name in OPTIONS})
    block = twin.block_size
    if work.device == "cpu":
        _without_compiling(twin)
    names = {id(parameter): name for name, parameter in work.model.named_parameters()}
    held = [parameter for group in twin.param_groups for parameter in group["params"]]
    fits = [p for p in held if p.numel() >= LEAST and p.numel() % block == 0]
    if not fits:
        return work, Effect(notes=(f"no parameter has {LEAST} numbers or more, in a multiple of {block}",))
    work = work.replace(training=replace(work.training, optimizer=twin))
    share = sum(p.numel() for p in fits) / sum(p.numel() for p in held)
    notes = [f"the moments of {len(fits)} of {len(held)} parameters, {share:.1%} of the numbers"]
    if work.device == "cpu":
        notes.append("the update runs eagerly on CPU: torchao would compile it anew for each shape")
    notes.append("its learning rate is a tensor: change it with optimizer.param_groups[…]['lr'].fill_(…)")
    return work, Effect(tuple(names[id(p)] for p in fits), notes=tuple(notes))


def _without_compiling(optimizer: torch.optim.Optimizer) -> None:
    base = type(optimizer)

    def step(self, closure=None):
        with torch.compiler.set_stance("force_eager"):
            return base.step(self, closure)

    optimizer.__class__ = type(base.__name__, (base,), {"__module__": base.__module__, "step": step})
