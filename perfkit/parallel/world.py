"""Who this process is among those that work together, and what all of them agree on.

Processes that call collective operations must call them equally often. A decision that rests on a clock, such as how
often to repeat a call, is therefore made by rank 0 and told to the others: `World.agree`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, TypeVar

T = TypeVar("T")


class World(ABC):
    """The processes that work together.

    Attributes:
        rank: the number of this one, from 0.
        size: how many there are.
        devices: how many devices they work on, all together: one each in torch, any number each in JAX.
    """

    rank: int
    size: int
    devices: int

    @abstractmethod
    def gather(self, value: T) -> list[T]:
        """What each process passed, by rank, on every process. Values must be picklable."""

    @abstractmethod
    def agree(self, value: T) -> T:
        """What rank 0 passed, on every process."""

    @abstractmethod
    def barrier(self) -> None:
        """Returns when every process has come here."""

    @property
    def alone(self) -> bool:
        return self.size == 1

    @property
    def leads(self) -> bool:
        """Whether it is this process that measures, decides and writes."""
        return self.rank == 0


class Alone(World):
    """One process."""

    rank, size = 0, 1

    def __init__(self, devices: int = 1):
        self.devices = devices

    def gather(self, value: T) -> list[T]:
        return [value]

    def agree(self, value: T) -> T:
        return value

    def barrier(self) -> None:
        """There is nobody to wait for."""


ALONE = Alone()


def of(framework: str) -> World:
    """The world of this process in that framework.

    torch: the process group that is there, else the one that a launcher's environment variables describe, which is then
    joined. JAX: what `jax.distributed` was set up with, which must have been done before anything else ran.
    """
    from importlib import import_module

    found: Any = import_module(f"perfkit.parallel.{framework}_world")
    return found.world()
