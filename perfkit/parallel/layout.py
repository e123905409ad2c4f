"""How many devices the recipes of a chain take along each axis of the mesh."""

from __future__ import annotations

import math
from dataclasses import dataclass

from perfkit._chain import Chain
from perfkit._errors import ChainError, InvalidInputError
from perfkit._recipe import ParallelRecipe
from perfkit.parallel.world import World


@dataclass(frozen=True)
class Layout:
    """The mesh of a chain.

    Args:
        axes: the axes, outermost first: "pipeline", "data", "tensor". Neighbours along the last one talk most, and lie
            in one machine.
        sizes: how many devices along each.
    """

    axes: tuple[str, ...]
    sizes: tuple[int, ...]

    def size(self, axis: str) -> int:
        """How many devices there are along an axis; 1 along one that no recipe asks for."""
        return dict(zip(self.axes, self.sizes, strict=True)).get(axis, 1)

    def place(self, axis: str, rank: int) -> int:
        """Where along an axis a rank is: ranks count along the last axis first; 0 along one that nobody asks for."""
        inner = math.prod(self.sizes[self.axes.index(axis) + 1 :]) if axis in self.axes else 1
        return rank // inner % self.size(axis)

    def __str__(self) -> str:
        return " × ".join(f"{axis} {size}" for axis, size in zip(self.axes, self.sizes, strict=True))


AXES = ("pipeline", "data", "tensor")


def layout(chain: Chain, world: World) -> Layout | None:
    """The mesh that a chain asks for; None where it asks for none, or there is one device only.

    A recipe without a size takes what the others leave.

    Raises:
        ChainError: several recipes without a size.
        InvalidInputError: the sizes do not make up the number of devices.
    """
    asking = {recipe.axis: recipe for recipe in chain if isinstance(recipe, ParallelRecipe)}
    if not asking or world.devices == 1:
        return None
    open_ended = [recipe.name for recipe in asking.values() if recipe.size is None]
    given = math.prod(recipe.size or 1 for recipe in asking.values())
    if len(open_ended) > 1:
        names = " and ".join(open_ended)
        raise ChainError(
            f"{names} have no size: {world.devices} devices can be shared in several ways; {_example(chain)}"
        )
    rest, over = divmod(world.devices, given)
    if over or (rest > 1 and not open_ended):
        told = " × ".join(str(recipe.size or "the rest") for recipe in asking.values())
        raise InvalidInputError(
            f"{chain} asks for {told} devices, and there are {world.devices}: start {given} processes, or change a size"
        )
    axes = tuple(axis for axis in AXES if axis in asking)
    return Layout(axes, tuple(asking[axis].size or rest for axis in axes))


def _example(chain: Chain) -> str:
    names = [recipe.name for recipe in chain if isinstance(recipe, ParallelRecipe)]
    return f"write such as {'+'.join(f'{name}(2)' for name in names)!r}"
