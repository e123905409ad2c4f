"""Unstructured and 2:4 sparsity of JAX models: which weights are set to zero."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from perfkit._errors import InvalidInputError
from perfkit._report import Skipped
from perfkit.backends.jax_model import JaxModel
from perfkit.backends.jax_prune_masks import Group
from perfkit.backends.jax_prune_units import layer_of

NOT_MULTIPLIED = {"embedding": "its rows are looked up, not multiplied", "bias": None, "scale": None}


def kernels(model: JaxModel) -> tuple[dict[int, str], list[Skipped]]:
    """Leaf number -> layer of every parameter that is a matrix or a convolution's kernel; and what looks like one."""
    found, skipped = {}, []
    for leaf, (path, array) in enumerate(jax.tree_util.tree_leaves_with_path(model.params)):
        name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value").split(".")[-1]
        if array.ndim < 2 or not jnp.issubdtype(array.dtype, jnp.floating):
            continue
        if name not in NOT_MULTIPLIED:
            found[leaf] = layer_of(path)
        elif NOT_MULTIPLIED[name]:
            skipped.append(Skipped(layer_of(path), NOT_MULTIPLIED[name]))
    return found, skipped


def weight_groups(model: JaxModel, recipe: Any) -> tuple[list[Group], tuple[str, ...], list[Skipped], tuple[str, ...]]:
    """The groups to mask, the layers they are in, the layers left alone, and a note on each.

    Raises:
        InvalidInputError: options that contradict each other.
    """
    _check(recipe)
    found, skipped = kernels(model)
    wanted, leaves = recipe.selected(dict.fromkeys(found.values())), jax.tree.leaves(model.params)
    groups, touched, notes = [], [], []
    for leaf, layer in found.items():
        array = leaves[leaf]
        if layer not in wanted:
            skipped.append(Skipped(layer, "left out by include or exclude"))
            continue
        if recipe.structure == "2:4" and array.shape[-2] % 4:
            skipped.append(Skipped(layer, f"its {array.shape[-2]} input features are no multiple of 4"))
            continue
        leaving = array.size // 2 if recipe.structure == "2:4" else round(array.size * recipe.amount)
        if leaving == 0:
            skipped.append(Skipped(layer, f"{recipe.amount:.0%} of its {array.size} weights is none"))
            continue
        groups.append(_group(leaf, array.shape, leaving, recipe))
        touched.append(layer)
        notes.append(f"{layer}: {leaving} of {array.size} weights zero")
    return groups, tuple(dict.fromkeys(touched)), skipped, tuple(notes)


def importance(criterion: str, weight: Any, gradient: Any) -> Any:
    """Of each weight: its square, or how much the loss would change without it, to first order.

    Source: Molchanov et al., "Importance Estimation for Neural Network Pruning" (2019).
    """
    return abs(weight * gradient) if criterion == "taylor" else weight * weight


def _group(leaf: int, shape: tuple[int, ...], leaving: int, recipe: Any) -> Group:
    def scores(leaves: Any, gradients: Any) -> jax.Array:
        gradient = gradients[leaf] if recipe.criterion == "taylor" else None
        found = importance(recipe.criterion, leaves[leaf], gradient)
        return (_two_of_four(found) if recipe.structure == "2:4" else found).reshape(-1)

    return Group(int(np.prod(shape)), leaving, scores, lambda stays: {leaf: stays.reshape(shape)})


def _two_of_four(scores: jax.Array) -> jax.Array:
    """The scores with the two best of each four inputs of an output put out of reach."""
    *_, inputs, outputs = scores.shape
    fours = scores.reshape(-1, inputs // 4, 4, outputs)
    rank = jnp.argsort(jnp.argsort(fours, axis=2), axis=2)
    return jnp.where(rank >= 2, jnp.inf, fours).reshape(scores.shape)


def _check(recipe: Any) -> None:
    if recipe.criterion == "activation":
        raise InvalidInputError(
            f"{recipe.name}(criterion='activation') rates units, and structure={recipe.structure!r} removes single "
            "weights: use structure='channels', or criterion='magnitude' or 'taylor'"
        )
    if recipe.structure == "2:4" and recipe.amount != 0.5:
        raise InvalidInputError(
            f"{recipe.name}(amount={recipe.amount}): structure='2:4' sets two of four weights to zero, so its amount "
            "is 0.5; use structure='unstructured' for another"
        )
