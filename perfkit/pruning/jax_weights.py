"""Unstructured and n:m sparsity of JAX models: which weights are set to zero."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from perfkit._errors import InvalidInputError
from perfkit._report import Skipped
from perfkit.backends.jax_model import JaxModel
from perfkit.pruning.jax_masks import Group
from perfkit.pruning.jax_units import layer_of

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
    if recipe.criterion == "activation":
        raise InvalidInputError(
            f"{recipe.name}(criterion='activation') rates units, and structure={recipe.structure!r} removes single "
            "weights: use structure='channels', or criterion='magnitude' or 'taylor'"
        )
    pattern = None if recipe.structure == "unstructured" else tuple(map(int, recipe.structure.split(":")))
    found, skipped = kernels(model)
    wanted, leaves = recipe.selected(dict.fromkeys(found.values())), jax.tree.leaves(model.params)
    groups, touched, notes = [], [], []
    for leaf, layer in found.items():
        array = leaves[leaf]
        if layer not in wanted:
            skipped.append(Skipped(layer, "left out by include or exclude"))
            continue
        if pattern and array.shape[-2] % pattern[1]:
            skipped.append(Skipped(layer, f"its {array.shape[-2]} input features are no multiple of {pattern[1]}"))
            continue
        leaving = round(array.size * (1 - pattern[0] / pattern[1] if pattern else recipe.amount))
        if leaving == 0:
            skipped.append(Skipped(layer, f"{recipe.amount:.0%} of its {array.size} weights is none"))
            continue
        groups.append(_group(leaf, array.shape, leaving, recipe.criterion, pattern))
        touched.append(layer)
        notes.append(f"{layer}: {leaving} of {array.size} weights zero")
    return groups, tuple(dict.fromkeys(touched)), skipped, tuple(notes)


def importance(criterion: str, weight: Any, gradient: Any) -> Any:
    """Of each weight: the square of its size, or how much the loss would change without it, to first order.

    Source: Molchanov et al., "Importance Estimation for Neural Network Pruning" (2019).
    """
    return abs(weight * gradient) if criterion == "taylor" else abs(weight) ** 2  # of complex ones too


def _group(leaf: int, shape: tuple[int, ...], leaving: int, criterion: str, pattern: tuple[int, int] | None) -> Group:
    def scores(leaves: Any, gradients: Any) -> jax.Array:
        found = importance(criterion, leaves[leaf], gradients[leaf] if criterion == "taylor" else None)
        return (_best_of_each(found, *pattern) if pattern else found).reshape(-1)

    return Group(int(np.prod(shape)), leaving, scores, lambda stays: {leaf: stays.reshape(shape)})


def _best_of_each(scores: jax.Array, n: int, m: int) -> jax.Array:
    """The scores with the `n` best of each `m` consecutive inputs of an output put out of reach."""
    *_, inputs, outputs = scores.shape
    runs = scores.reshape(-1, inputs // m, m, outputs)
    rank = jnp.argsort(jnp.argsort(runs, axis=2), axis=2)
    return jnp.where(rank >= m - n, jnp.inf, runs).reshape(scores.shape)
