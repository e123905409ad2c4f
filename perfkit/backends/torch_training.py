"""One training step of a torch workload."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from perfkit.backends.torch_surgery import copied, tensors_in

if TYPE_CHECKING:
    from perfkit._workload import Inputs, Workload


class Trainer:
    """`forward → loss → backward → optimizer step`, with dynamic loss scaling where the workload asks for it.

    Args:
        work: a training workload; its model and optimizer are trained in place.
    """

    def __init__(self, work: Workload):
        self.model = work.model
        self.loss = work.training.loss
        self.optimizer = work.training.optimizer
        self.around = work.training.around
        self.teacher = work.training.teacher
        self.averaged = work.training.averaged
        self.gradients = work.training.gradients or self._gradients
        self.scaler = torch.amp.GradScaler(work.device, enabled=work.training.loss_scaling)

    def step(self, inputs: Inputs, targets: Any) -> torch.Tensor:
        """Train on one batch; returns the loss before the step: a scalar without history."""
        with ExitStack() as contexts:
            for context in self.around:
                contexts.enter_context(context())
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.gradients(self.model, inputs, targets)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return loss if self.averaged is None else self.averaged(loss)

    def _gradients(self, model: nn.Module, inputs: Inputs, targets: Any) -> torch.Tensor:
        outputs = model(*inputs.args, **inputs.kwargs)
        loss = self.loss(outputs, targets)
        if self.teacher is not None:
            with torch.no_grad():
                taught = self.teacher(*inputs.args, **inputs.kwargs)
            loss = (loss + _distance(outputs, taught)) / 2
        self.scaler.scale(loss).backward()
        return loss.detach()

    @contextmanager
    def keeping_state(self) -> Iterator[None]:
        """Within it the model may be trained; after it model, optimizer and loss scale are as before."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        before = [tensor.detach().clone() for tensor in tensors]
        self.optimizer.zero_grad(set_to_none=True)  # gradients of FSDP2 cannot be copied, and each step makes new ones
        optimizer = copied(self.optimizer).state_dict()
        scale = self.scaler.state_dict()
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, old in zip(tensors, before, strict=True):
                    tensor.copy_(old)
            self.optimizer.zero_grad(set_to_none=True)
            self.optimizer.load_state_dict(optimizer)
            self.scaler.load_state_dict(scale)


def teacher(work: Workload) -> nn.Module:
    """The model as it is now, frozen: what `Training.teacher` asks for."""
    return copied(work.model).eval().requires_grad_(False)


def _distance(outputs: Any, taught: Any) -> torch.Tensor:
    """Mean squared distance to the teacher's outputs, in units of their variance.

    Source: Ba and Caruana, "Do deep nets really need to be deep?" (2014): logits are matched, not probabilities.
    """
    pairs = zip(tensors_in(outputs), tensors_in(taught), strict=True)
    terms = [(o - t).square().mean() / t.var(correction=0).clamp_min(1e-12) for o, t in pairs if t.is_floating_point()]
    return torch.stack(terms).mean()
