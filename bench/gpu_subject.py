"""One call of an op on a device's tensors: computed by any implementation, and held to a float64 reference."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from perfkit.kernels._op import Op


class Subject(ABC):
    """One call of an op, with its tensors.

    Args:
        name: of the case, for people.
        op: who can compute it.
        training: a call is a forward and a backward pass, else a forward pass alone.
        device: of the tensors. On "meta" there are none, or none with numbers: enough for `problem`.
    """

    def __init__(self, name: str, op: Op, training: bool, device: str):
        self.name, self.op, self.training, self.device = name, op, training, device
        self.leaves: dict[str, Tensor] = {}
        self.gradients: list[Tensor] = []

    @property
    @abstractmethod
    def problem(self) -> Any:
        """The call without its numbers."""

    @abstractmethod
    def outputs(self, implementation: str | None) -> list[Tensor]:
        """The op's results, by the public function."""

    @abstractmethod
    def native(self) -> list[Tensor]:
        """The same by the framework's own layers, as its users call them."""

    @property
    @abstractmethod
    def expected(self) -> Any:
        """The results in float64, found once; what `wrong` compares with."""

    @abstractmethod
    def wrong(self, implementation: str, found: list[Tensor]) -> str:
        """What is wrong with the result of a call, for people; empty where nothing is."""

    def call(self, implementation: str | None = None) -> list[Tensor]:
        """One call, and in training every gradient after the outputs."""
        return self.complete(functools.partial(self.outputs, implementation))

    def complete(self, forward: Callable[[], list[Tensor]]) -> list[Tensor]:
        """A call of anything that returns such outputs."""
        if not self.training:
            with torch.no_grad():
                return forward()
        found = forward()
        return [*found, *torch.autograd.grad(found, list(self.leaves.values()), self.gradients)]

    def able(self) -> dict[str, str | None]:
        """Each implementation, and why it cannot."""
        mine = [found for found in self.op.implementations if found.framework == "torch"]
        return {found.name: found.why_not(self.problem) for found in mine}
