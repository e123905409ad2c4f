"""Local SGD in torch: every process trains a model of its own, and every few steps they are brought together.

torch.distributed.algorithms.model_averaging does a part of it: it knows no weights and no outer optimizer, leaves
buffers and parameters without a gradient alone, and averages after the first step of a round in place of the last.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from perfkit._errors import UnsupportedError
from perfkit._report import Effect, Skipped
from perfkit._workload import Workload
from perfkit.backends.torch_surgery import local, map_tensors
from perfkit.parallel.batch import part
from perfkit.parallel.spread import Spread
from perfkit.parallel.torch_data import unused
from perfkit.parallel.torch_mesh import alike, mesh_of
from perfkit.parallel.torch_pipe import pipelined

if TYPE_CHECKING:
    from perfkit.recipes.local_sgd import LocalSgd


def local_sgd(work: Workload, recipe: LocalSgd) -> tuple[Workload, Effect]:
    """Each process trains on its part of the batch by itself, until the next average."""
    mesh = mesh_of(work.layout, work.device)["data"]
    group, devices = mesh.get_group(), mesh.size()
    work = part(work, recipe.batch_dim, mesh.get_local_rank(), map_tensors)
    alike(work.model, group)
    idle = [] if pipelined(work.model) else unused(work)
    rounds = Rounds(work, recipe, group, mesh.get_local_rank(), idle)
    spread = work.spread or Spread()
    told = (*spread.parts, recipe.told(devices))
    spread = replace(spread, parts=told, period=recipe.sync_every)
    work = work.replace(training=replace(work.training, rounds=rounds), spread=spread)
    touched = tuple(name for name, _ in work.model.named_parameters() if name not in idle)
    skipped = tuple(Skipped(name, "no gradient reaches it on the example inputs") for name in idle)
    return work, Effect(touched, skipped, recipe.notes())


class Rounds:
    """What happens beside the steps that a process takes by itself.

    Args:
        work: its model and optimizer are trained in place, by this process.
        group: the processes that are averaged.
        place: of this one among them.
        idle: names of parameters that no gradient reaches.

    Attributes:
        taken: steps so far.
        since: of those, how many since the models were last the same.
    """

    def __init__(self, work: Workload, recipe: LocalSgd, group: Any, place: int, idle: Sequence[str]):
        self.model, self.optimizer, self.recipe, self.group = work.model, work.training.optimizer, recipe, group
        self.share = recipe.shares(group.size())[place]
        self.taken = self.since = 0
        named = self.model.named_parameters()
        self.trained = [tensor for name, tensor in named if tensor.requires_grad and name not in idle]
        self.anchors: list[torch.Tensor] = self.begun()["anchors"]
        self.outer = _outer(self.anchors, recipe)

    def before_update(self) -> None:
        """Between gradients and the optimizer's step."""
        if self.taken < self.recipe.warmup_steps:
            for tensor in self.trained:
                if tensor.grad is None:  # on these rows alone: every process sends as much as the others
                    tensor.grad = torch.zeros_like(tensor)
            self._average([tensor.grad for tensor in self.trained if tensor.grad is not None])

    def after_update(self) -> None:
        """After the optimizer's step."""
        warm = self.taken < self.recipe.warmup_steps
        self.taken += 1
        if warm:
            self._anchor()  # parameters are the same everywhere
        else:
            self.since += 1
            if self.since >= self.recipe.sync_every:
                self._together(self.recipe.average_state)

    def settle(self) -> None:
        """Bring all models together now, the optimizers' state too: the round ends here."""
        if self.taken:
            self._together(average_state=True, move=bool(self.since))

    def skip_warm_up(self) -> None:
        """Go on as after the warm-up."""
        self.taken = max(self.taken, self.recipe.warmup_steps)

    def state_dict(self) -> dict[str, Any]:
        """All of it; tensors are copies."""
        return {
            "taken": self.taken,
            "since": self.since,
            "anchors": [anchor.clone() for anchor in self.anchors],
            "momentum": [self.outer.state[anchor]["momentum_buffer"].clone() for anchor in self.anchors],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken, self.since = state["taken"], state["since"]
        with torch.no_grad():
            for anchor, old, momentum in zip(self.anchors, state["anchors"], state["momentum"], strict=True):
                anchor.copy_(old)
                self.outer.state[anchor]["momentum_buffer"].copy_(momentum)

    def begun(self) -> dict[str, Any]:
        """The state at the beginning of a training from the model as it is now."""
        anchors = [local(tensor).detach().clone() for tensor in self.trained] if self.recipe.diloco else []
        return {"taken": 0, "since": 0, "anchors": anchors, "momentum": [torch.zeros_like(one) for one in anchors]}

    def written_in(self, names: Container[str]) -> bool:
        """Whether a checkpoint holds this state, by the names of what it holds."""
        return ("rounds.anchors.0" if self.recipe.diloco else "rounds.taken") in names

    def _together(self, average_state: bool, move: bool = True) -> None:
        self.since = 0
        if move:
            self._average([*self.trained, *_floating(self.model.buffers())])
            if self.recipe.diloco:
                self._outer_step()
        if average_state:
            states = [self.optimizer.state.get(tensor, {}) for tensor in self.trained]
            # What has no dimension counts steps.
            held = [value for state in states for value in _floating(state.values()) if value.dim()]
            self._check_as_many(sum(local(value).numel() for value in held))
            self._average(held)

    @torch.no_grad()
    def _outer_step(self) -> None:
        for anchor, parameter in zip(self.anchors, self.trained, strict=True):
            anchor.grad = anchor - local(parameter)
        self.outer.step()
        self.outer.zero_grad(set_to_none=True)
        for anchor, parameter in zip(self.anchors, self.trained, strict=True):
            local(parameter).copy_(anchor)

    @torch.no_grad()
    def _anchor(self) -> None:
        if self.anchors:
            torch._foreach_copy_(self.anchors, [local(tensor) for tensor in self.trained])

    def _check_as_many(self, values: int) -> None:
        """Raise where the processes' optimizers hold different amounts of state."""
        least = torch.tensor([values, -values], device=local(self.trained[0]).device)
        dist.all_reduce(least, dist.ReduceOp.MIN, group=self.group)
        if least[0] != -least[1]:
            raise UnsupportedError(
                f"the optimizer holds {values} values of state here, and {least[0]} to {-least[1]} elsewhere: "
                "a parameter was trained on some devices alone, so its state cannot be averaged"
            )

    @torch.no_grad()
    def _average(self, tensors: Sequence[torch.Tensor]) -> None:
        """The weighted average over the processes, in place: one message for each dtype."""
        held = [local(tensor) for tensor in tensors]
        for dtype in dict.fromkeys(tensor.dtype for tensor in held):
            some = [tensor for tensor in held if tensor.dtype == dtype]
            flat = torch.cat([tensor.reshape(-1) for tensor in some]).mul_(self.share)
            dist.all_reduce(flat, group=self.group)
            parts = flat.split([tensor.numel() for tensor in some])
            torch._foreach_copy_(some, [one.view_as(tensor) for one, tensor in zip(parts, some, strict=True)])


def _outer(anchors: Sequence[torch.Tensor], recipe: LocalSgd) -> Any:
    """The outer optimizer over the anchors; None without any."""
    if not anchors:
        return None
    momentum = recipe.outer_momentum
    outer = torch.optim.SGD(anchors, lr=recipe.outer_lr, momentum=momentum, nesterov=momentum > 0)
    for anchor in anchors:  # what torch would start with, so that the state has one form from the beginning
        outer.state[anchor]["momentum_buffer"] = torch.zeros_like(anchor)
    return outer


def _floating(values: Any) -> Iterator[torch.Tensor]:
    return (value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point())
