"""Random keys of a JAX model, which are part of its state or of its inputs."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from perfkit._workload import Inputs

if TYPE_CHECKING:
    from perfkit.backends.jax_training import Trainer


def is_key(leaf: Any) -> bool:
    """Whether it is a key, or an array of keys, as `jax.random.key` makes them."""
    return jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key)


def drawing_others(trainer: Trainer, inputs: Inputs, number: int) -> Inputs:
    """Let a training draw the random numbers number `number` in place of its own, 0.

    Returns:
        The inputs to train with.
    """
    if number == 0:
        return inputs
    params, rest, *others = trainer.state
    trainer.state = params, other_keys(rest, number), *others
    return Inputs(*other_keys((inputs.args, dict(inputs.kwargs)), number))


def other_keys(tree: Any, number: int) -> Any:
    """`tree` with another key in place of each, those of `jax.random.PRNGKey` too; always the same for one number."""
    fold = partial(jax.random.fold_in, data=number)

    def other(leaf: Any) -> Any:
        if is_key(leaf):
            return jax.vmap(fold)(leaf.reshape(-1)).reshape(leaf.shape)
        if getattr(leaf, "dtype", None) == jnp.uint32 and leaf.shape == (2,):
            return jax.random.key_data(fold(jax.random.wrap_key_data(leaf, impl="threefry2x32")))
        return leaf

    return jax.tree.map(other, tree)
