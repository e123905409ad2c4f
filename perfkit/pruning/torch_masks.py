"""Masks: weights that are held at zero, in training more and more of them.

What is masked stands in buffers beside the weights, and the number of steps in one of the model, so that whoever keeps
a model's state keeps these. They are applied to the weights in place before each call and before saving: an optimizer's
momentum moves them off zero after each step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from perfkit.backends.torch_surgery import derive
from perfkit.pruning.torch_cut import mask
from perfkit.pruning.torch_rank import chosen, magnitudes
from perfkit.pruning.torch_units import Structure

UPDATES = 64
"""How often the masks grow, at most: ranking takes time."""

_GROWTH = "_perfkit_pruning"
_STEP = "_perfkit_prune_step"


@dataclass(frozen=True)
class Growth(ABC):
    """What is removed as training goes on: `amount · (1 − (1 − step/steps)³)`.

    Args:
        amount: the share removed at the end.
        steps: training steps until then; 0 for at once.

    Source: Zhu and Gupta, "To prune, or not to prune" (2017), https://arxiv.org/abs/1710.01878
    """

    amount: float
    steps: int

    def share(self, step: int) -> float:
        """The share removed in that step, counted from zero."""
        if step >= self.steps:
            return self.amount
        return self.amount * (1 - (1 - step / self.steps) ** 3)

    def due(self, step: int) -> bool:
        """Whether masks grow in that step."""
        return step == self.steps or (step < self.steps and step % max(1, self.steps // UPDATES) == 0)

    @abstractmethod
    def prepare(self, model: nn.Module) -> None:
        """Make the buffers."""

    @abstractmethod
    def grow(self, model: nn.Module, share: float) -> None:
        """Extend the masks; what is masked stays so."""

    @abstractmethod
    def hold(self, model: nn.Module) -> None:
        """Set to zero what is masked."""

    @abstractmethod
    def clear(self, model: nn.Module) -> None:
        """Take the buffers away again."""


@dataclass(frozen=True)
class Units(Growth):
    """Whole units.

    Args:
        scores: how important each is; None to rank by magnitude at each step.
    """

    structure: Structure = field(kw_only=True)
    round_to: int = field(kw_only=True)
    scores: torch.Tensor | None = field(kw_only=True)

    def prepare(self, model: nn.Module) -> None:
        device = next(model.parameters()).device
        gone = torch.zeros(self.structure.count, dtype=torch.bool, device=device)
        model.register_buffer("_perfkit_pruned", gone, persistent=False)

    def grow(self, model: nn.Module, share: float) -> None:
        gone = model._perfkit_pruned
        scores = magnitudes(self.structure, model) if self.scores is None else self.scores
        scores = torch.where(gone.cpu(), -1.0, scores)
        gone |= chosen(self.structure, scores, share, self.round_to).to(gone.device)

    def hold(self, model: nn.Module) -> None:
        mask(model, self.structure, model._perfkit_pruned)

    def clear(self, model: nn.Module) -> None:
        del model._perfkit_pruned


@dataclass(frozen=True)
class Weights(Growth):
    """Single weights.

    Args:
        tensors: (module, tensor) of each matrix.
        pattern: (n, m), at most n of m consecutive inputs stay; None for a share of each matrix.
    """

    tensors: tuple[tuple[str, str], ...] = field(kw_only=True)
    pattern: tuple[int, int] | None = field(kw_only=True)

    def prepare(self, model: nn.Module) -> None:
        for name, tensor in self.tensors:
            module = model.get_submodule(name)
            gone = torch.zeros_like(getattr(module, tensor), dtype=torch.bool)
            module.register_buffer(_mask_of(tensor), gone, persistent=False)

    def grow(self, model: nn.Module, share: float) -> None:
        for name, tensor in self.tensors:
            module = model.get_submodule(name)
            gone, importance = getattr(module, _mask_of(tensor)), getattr(module, tensor).detach().abs()
            gone |= smallest(importance.masked_fill(gone, -1), share, self.pattern)

    def hold(self, model: nn.Module) -> None:
        with torch.no_grad():
            for name, tensor in self.tensors:
                module = model.get_submodule(name)
                getattr(module, tensor).masked_fill_(getattr(module, _mask_of(tensor)), 0)

    def clear(self, model: nn.Module) -> None:
        for name, tensor in self.tensors:
            delattr(model.get_submodule(name), _mask_of(tensor))


def smallest(importance: torch.Tensor, share: float, pattern: tuple[int, int] | None = None) -> torch.Tensor:
    """Which entries are the least important: that share of all, or all but n of m consecutive inputs (dimension 1)."""
    gone = torch.zeros_like(importance, dtype=torch.bool)
    if pattern is None:
        count = round(share * importance.numel())
        gone.view(-1)[importance.flatten().argsort(stable=True)[:count]] = True
        return gone
    kept, length = pattern
    groups = importance.movedim(1, -1).unflatten(-1, (-1, length))
    order = groups.argsort(dim=-1, stable=True)[..., : length - kept]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order, True).flatten(-2).movedim(-1, 1).contiguous()


def attach(model: nn.Module, growth: Growth) -> None:
    """From now on `model` counts its training steps and holds its masks."""
    growth.prepare(model)
    model.register_buffer(_STEP, torch.zeros((), dtype=torch.int64), persistent=False)
    setattr(model, _GROWTH, growth)
    model.register_state_dict_pre_hook(_hold_before_saving)
    base = type(model)

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        _before_call(self)
        return base.__call__(self, *args, **kwargs)

    derive(model, __call__=__call__)


def settle(model: nn.Module) -> None:
    """End what `attach` began: what is masked is zero for good, and nothing is counted any more."""
    growth = vars(model).get(_GROWTH)
    if growth is not None:
        growth.hold(model)
        growth.clear(model)
        delattr(model, _GROWTH)
        delattr(model, _STEP)


def _before_call(model: nn.Module) -> None:
    growth = vars(model).get(_GROWTH)
    if growth is None:
        return
    if model.training and torch.is_grad_enabled():
        counter = getattr(model, _STEP)
        step = int(counter)
        if growth.due(step):
            growth.grow(model, growth.share(step))
        counter += 1
    growth.hold(model)


def _hold_before_saving(model: nn.Module, *_: Any) -> None:
    growth = vars(model).get(_GROWTH)
    if growth is not None:
        growth.hold(model)


def _mask_of(tensor: str) -> str:
    return f"_perfkit_mask_{tensor}"
