"""One training step of a torch workload."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from perfkit.backends.torch_surgery import copied

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
        self.scaler = torch.amp.GradScaler(work.device, enabled=work.training.loss_scaling)

    def step(self, inputs: Inputs, targets: Any) -> torch.Tensor:
        """Train on one batch; returns the loss before the step: a scalar without history."""
        with ExitStack() as contexts:
            for context in self.around:
                contexts.enter_context(context())
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.loss(self.model(*inputs.args, **inputs.kwargs), targets)
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return loss.detach()

    @contextmanager
    def keeping_state(self) -> Iterator[None]:
        """Within it the model may be trained; after it model, optimizer and loss scale are as before."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        before = [tensor.detach().clone() for tensor in tensors]
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
