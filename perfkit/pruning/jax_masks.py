"""Masks over a JAX model's weights, at once or growing while it is trained.

Source: Zhu and Gupta, "To prune, or not to prune" (2017), https://arxiv.org/abs/1710.01878.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Leaves = Sequence[Any]
UPDATES = 32  # so many times the masks grow, evenly over the schedule


@dataclass(frozen=True)
class Group:
    """Entries among which the least important are set to zero.

    Args:
        size: how many entries: weights, or units.
        leaving: how many of them go in the end.
        scores: `scores(leaves, gradients)`, how important each is: (size,).
        masks: `masks(stays)`, from a bool for each entry: leaf number -> what to multiply the leaf with.
    """

    size: int
    leaving: int
    scores: Callable[[Leaves, Leaves], jax.Array]
    masks: Callable[[jax.Array], Mapping[int, jax.Array]]


class MaskState(NamedTuple):
    """The optimizer's own state, the steps so far, and which entries of each group stay."""

    inner: Any
    step: jax.Array
    stays: tuple[jax.Array, ...]


def masking(optimizer: optax.GradientTransformation, groups: Sequence[Group], steps: int):
    """An optimizer that sets the least important entries to zero and holds them there.

    The share that is gone after step t of `steps` is 1 − (1 − t / steps)³; with steps=0 all are gone from the first.
    What has gone never returns.

    Args:
        optimizer: what updates the entries that stay; it sees no gradient of the others.

    Returns:
        optax.GradientTransformation, whose state is a `MaskState`.
    """
    optimizer = optax.with_extra_args_support(optimizer)
    every = max(1, steps // UPDATES)

    def init(params):
        stays = tuple(jnp.ones(group.size, bool) for group in groups)
        return MaskState(optimizer.init(params), jnp.int32(0), stays)

    def update(gradients, state, params, **more):
        leaves, tree = jax.tree.flatten(params)
        step = state.step + 1
        share = 1 - (1 - jnp.minimum(step / max(steps, 1), 1.0)) ** 3
        due = (step == max(steps, 1)) | ((step < steps) & (step % every == 0))

        def grown():
            flat = jax.tree.leaves(gradients)
            return tuple(
                staying(group, group.scores(leaves, flat), jnp.round(group.leaving * share).astype(int), before)
                for group, before in zip(groups, state.stays, strict=True)
            )

        stays = jax.lax.cond(due, grown, lambda: state.stays)
        masks = masks_of(groups, stays)
        updates, inner = optimizer.update(_masked(gradients, masks), state.inner, params, **more)
        updates = [
            jnp.where(masks[at], change, -leaf).astype(leaf.dtype) if at in masks else change
            for at, (change, leaf) in enumerate(zip(jax.tree.leaves(updates), leaves, strict=True))
        ]
        return jax.tree.unflatten(tree, updates), MaskState(inner, step, stays)

    return optax.GradientTransformationExtraArgs(init, update)


def staying(group: Group, scores: jax.Array, leaving: Any, before: jax.Array | bool = True) -> jax.Array:
    """Which entries stay if the `leaving` least important go: a bool for each. What was gone goes first."""
    order = jnp.argsort(jnp.where(before, scores, -jnp.inf))
    return jnp.zeros(group.size, bool).at[order].set(jnp.arange(group.size) >= leaving)


def masks_of(groups: Sequence[Group], stays: Sequence[jax.Array]) -> dict[int, jax.Array]:
    """leaf number -> its mask, bool, broadcastable to it; leaves that no group touches are missing."""
    masks: dict[int, jax.Array] = {}
    for group, kept in zip(groups, stays, strict=True):
        for leaf, mask in group.masks(kept).items():
            masks[leaf] = masks[leaf] & mask if leaf in masks else mask
    return masks


def zeroed(params: Any, groups: Sequence[Group], gradients: Any = None) -> Any:
    """The parameters with all that leaves set to zero at once."""

    def run(params, gradients):
        leaves, flat = jax.tree.leaves(params), jax.tree.leaves(gradients)
        stays = [staying(group, group.scores(leaves, flat), group.leaving) for group in groups]
        return _masked(params, masks_of(groups, stays))

    return jax.jit(run)(params, gradients)


def _masked(tree: Any, masks: Mapping[int, jax.Array]) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(
        structure, [jnp.where(masks[at], leaf, 0).astype(leaf.dtype) if at in masks else leaf
                    for at, leaf in enumerate(leaves)]
    )  # fmt: skip
