"""Where a JAX model's arrays lie, and what a training step is compiled with there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax

from perfkit.backends.jax_compile import Program

if TYPE_CHECKING:
    from perfkit.backends.jax_model import Function


class Placement(ABC):
    """Where a model's arrays lie. Parameters carry their sharding themselves; everything else is asked of this.

    Attributes:
        scattered: whether devices hold different parameters: then the model that is trained gathers them to be called,
            and one for inference is called in stages.
    """

    scattered = False

    def trained(self, params: Any) -> Any:
        """The parameters in the form in which they are trained."""
        return params

    def bytes_of(self, params: Any) -> int:
        """Bytes of the parameters that one device holds."""
        stored = {id(leaf): leaf for leaf in jax.tree.leaves(params) if hasattr(leaf, "dtype")}
        return sum(map(device_bytes, stored.values()))

    def pieces(self, tree: Any) -> Any:
        """Parameters and other state as a module of the caller's holds them from step to step."""
        return self.held(tree)

    def stored(self, state: Any) -> list[Any]:
        """The leaves of the state of training, as a checkpoint keeps them."""
        return jax.tree.leaves(state)

    def loaded(self, state: Any, leaves: list[Any]) -> Any:
        """The state that a checkpoint kept, lying as `state` does."""
        return jax.tree.unflatten(jax.tree.structure(state), leaves)

    @abstractmethod
    def state(self, state: Any) -> Any:
        """The state of training with every leaf on the devices: as it lies there already, or else whole on each."""

    @abstractmethod
    def batch(self, batch: Any) -> Any:
        """The inputs and targets of one step where the program wants them; raises InvalidInputError."""

    @abstractmethod
    def function(self, function: Function) -> Function:
        """The model as one device runs it."""

    @abstractmethod
    def averaged(self, found: Any) -> Any:
        """Gradients, loss and other state of one device's part, as they are for the whole batch."""

    @abstractmethod
    def program(self, step: Callable, donate: tuple[int, ...], state: Any) -> Program:
        """The step `(state, args, kwargs, targets) -> (state, loss)` as one program, whose state lies as `state`."""

    @abstractmethod
    def held(self, tree: Any) -> Any:
        """Parameters or other state as the caller's model holds them."""


class OneDevice(Placement):
    """Everything lies on the device where it is."""

    def state(self, state: Any) -> Any:
        return state

    def batch(self, batch: Any) -> Any:
        return batch

    def function(self, function: Function) -> Function:
        return function

    def averaged(self, found: Any) -> Any:
        return found

    def program(self, step: Callable, donate: tuple[int, ...], state: Any) -> Program:
        return Program(step, donate)

    def held(self, tree: Any) -> Any:
        return tree


ONE_DEVICE = OneDevice()


def device_bytes(leaf: jax.Array) -> int:
    """Bytes of an array that one device holds: all of them, or its part where the array is sharded."""
    size = leaf.size
    if isinstance(leaf, jax.Array):
        size = 1
        for length in leaf.sharding.shard_shape(leaf.shape):
            size *= length
    return size * leaf.dtype.itemsize
