"""One training step of a torch workload."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from perfkit._batch import even_rows, sliced
from perfkit.backends.torch_copies import copied
from perfkit.backends.torch_state import keeping_state
from perfkit.backends.torch_surgery import COMPILED_WITH, around_call, around_forward, map_tensors, tensors_in

if TYPE_CHECKING:
    from perfkit._workload import Inputs, Workload


class Trainer:
    """`forward → loss → backward → optimizer step`, with dynamic loss scaling where the workload asks for it.

    Args:
        work: a training workload; its model and optimizer are trained in place.
    """

    def __init__(self, work: Workload):
        self.model = work.model
        self.training = work.training
        self.optimizer = work.training.optimizer
        self.rounds = work.training.rounds
        assert self.rounds is None or self.rounds.model is self.model, "they look after another copy of the model"
        self.scaler = torch.amp.GradScaler(work.device, enabled=work.training.loss_scaling)

    def step(self, inputs: Inputs, targets: Any) -> torch.Tensor:
        """Train on one batch; returns the loss before the step: a scalar without history."""
        with ExitStack() as contexts:
            for context in self.training.around:
                contexts.enter_context(context())
            self.optimizer.zero_grad(set_to_none=True)
            loss = (self.training.gradients or self._gradients)(self.model, inputs, targets)
            if self.rounds is not None:
                self.rounds.before_update()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.rounds is not None:
                self.rounds.after_update()
        return loss if self.training.averaged is None else self.training.averaged(loss)

    def _gradients(self, _model: nn.Module, inputs: Inputs, targets: Any) -> torch.Tensor:
        losses = [self._backward(*part) for part in self._micro_batches(inputs, targets)]
        return losses[0] if len(losses) == 1 else torch.stack(losses).mean()

    def _micro_batches(self, inputs: Inputs, targets: Any) -> Iterator[tuple[Inputs, Any]]:
        parts, dim = self.training.micro_batches, self.training.batch_dim
        if parts == 1:
            yield inputs, targets
            return
        rows = even_rows(tensors_in((inputs.args, inputs.kwargs)), dim, parts, list(tensors_in(targets)))
        for index in range(parts):
            if self.training.exchanging is not None:
                self.training.exchanging(index == parts - 1)
            yield map_tensors(sliced(rows, parts, index, dim), (inputs, targets))

    def _backward(self, inputs: Inputs, targets: Any) -> torch.Tensor:
        """Add the gradients of one micro-batch to those of the step; returns its loss."""
        teacher, parts = self.training.teacher, self.training.micro_batches
        outputs = self.model(*inputs.args, **inputs.kwargs)
        loss = self.training.loss(outputs, targets)
        if teacher is not None:
            with torch.no_grad():
                taught = teacher(*inputs.args, **inputs.kwargs)
            loss = (loss + _distance(outputs, taught)) / 2
        self.scaler.scale(loss if parts == 1 else loss / parts).backward()
        return loss.detach()

    @contextmanager
    def keeping_state(self) -> Iterator[None]:
        """Within it the model may be trained; after it model, optimizer and loss scale are as before."""
        parameters = list(self.model.parameters())
        before = [parameter.detach().clone() for parameter in parameters]
        self.optimizer.zero_grad(set_to_none=True)  # gradients of FSDP2 cannot be copied, and each step makes new ones
        optimizer = copied(self.optimizer).state_dict()
        scale = self.scaler.state_dict()
        rounds = self.rounds and self.rounds.state_dict()
        try:
            with keeping_state(self.model):
                yield
        finally:
            with torch.no_grad():
                for parameter, old in zip(parameters, before, strict=True):
                    parameter.copy_(old)
            self.optimizer.zero_grad(set_to_none=True)
            self.optimizer.load_state_dict(optimizer)
            self.scaler.load_state_dict(scale)
            if self.rounds is not None:
                self.rounds.load_state_dict(rounds)


def within(work: Workload, context: Callable[[], AbstractContextManager]) -> Workload:
    """The same workload with each call of the model and each training step as a whole within `context()`."""
    around_call(work.model, context)
    if not work.trains:
        return work
    return work.replace(training=replace(work.training, around=(*work.training.around, context)))


def anew(work: Workload) -> Workload:
    """A copy that has not been called yet, and is compiled when it is: it shares no program with the original.

    torch.compile keeps programs by the code that they are made of, and a copy has the original's.
    """
    work = work.backend.copy(work)
    if hasattr(type(work.model), COMPILED_WITH):
        around_forward(work.model, lambda forward: lambda module, *args, **kwargs: forward(module, *args, **kwargs))
    return work


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


def held_in_buckets(model: nn.Module) -> str | None:
    """Why a model that trains cannot be given other parameters; None where it can."""
    for name, module in model.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            where = f" ({name})" if name else ""
            return (
                f"DistributedDataParallel{where} adds up gradients of the parameters that it was made with, and this "
                "makes others: pass the module inside (model.module), and wrap result.model, or write '+data_parallel'"
            )
    return None
