"""The units of a JAX model, channels, features and hidden units, and cutting them out of its parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from perfkit._workload import Inputs
from perfkit.backends.jax_inputs import tracing
from perfkit.backends.jax_model import JaxModel
from perfkit.pruning.jax_labels import Labels, given_axes
from perfkit.pruning.jax_walk import walk

Keep = Mapping[tuple[int, int], np.ndarray]
"""(leaf, dimension) -> for each index whether it stays."""


@dataclass(frozen=True)
class Slot:
    """Where the units of a set lie along one dimension of one array.

    Args:
        leaf: number of the array among the leaves of (params, rest).
        dim: the dimension.
        unit: for each index the number of its unit; -1 for those that are part of none.
        produces: it is the output of a matrix product or convolution with this array.
    """

    leaf: int
    dim: int
    unit: np.ndarray
    produces: bool


@dataclass(frozen=True)
class UnitSet:
    """Units that lie side by side in the same places, any number of which may go.

    Args:
        size: how many there are.
        slots: every place where they lie.
        layers: the layers that produce them.
        roots: for each unit the label that it goes by.
    """

    size: int
    slots: tuple[Slot, ...]
    layers: tuple[str, ...]
    roots: np.ndarray

    @property
    def name(self) -> str:
        """The layer, or what its layers have in common, or all of them."""
        common = []
        for parts in zip(*(layer.split(".") for layer in self.layers), strict=False):
            if len(set(parts)) > 1:
                break
            common.append(parts[0])
        return ".".join(common) or " + ".join(self.layers)

    @property
    def producers(self) -> tuple[Slot, ...]:
        return tuple(slot for slot in self.slots if slot.produces)


@dataclass(frozen=True)
class Anatomy:
    """What there is to cut in a model.

    Args:
        sets: the units that may go.
        stuck: layer -> why its output features must all stay.
        labels: of each dimension of each leaf of (params, rest), and the sets that they ended up in.
    """

    sets: tuple[UnitSet, ...]
    stuck: Mapping[str, str]
    labels: Labels
    axes: tuple[list[np.ndarray], ...]


def layer_of(path: Sequence[Any]) -> str:
    """The layer that a parameter belongs to: its path without the last part; "w" for a parameter at the top."""
    parts = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value").split(".")
    return ".".join(parts[:-1]) or parts[0]


def layers(params: Any) -> list[str]:
    """The layer of each leaf of the parameters."""
    return [layer_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]


def anatomy(model: JaxModel, inputs: Inputs) -> Anatomy:
    """Follow every dimension of every parameter through the model's jaxpr."""
    state = model.params, model.rest
    leaves, names = jax.tree.leaves(state), layers(model.params)
    with tracing():
        traced, shapes = jax.make_jaxpr(model.function(), return_shape=True)(*state, *inputs.args, **inputs.kwargs)
    labels = Labels()
    axes = tuple([labels.fresh(size) for size in leaf.shape] for leaf in leaves)
    given = [given_axes(variable.aval.shape) for variable in traced.jaxpr.invars[len(leaves) :]]
    results = walk(labels, traced, [*axes, *given])
    count = len(jax.tree.leaves(shapes[0]))
    labels.freeze_all(results[:count], "the model's outputs have its size")
    if len(results) - count == len(leaves) - len(names):  # running statistics stay of one size with what they were
        for before, after in zip(axes[len(names) :], results[count:], strict=True):
            for one, other in zip(before, after, strict=True):
                labels.unite(one, other)
    sets = _sets(labels, axes, names)
    found = {layer for units in sets for layer in units.layers}
    stuck: dict[str, str] = {}
    for name, dims in zip(names, axes, strict=False):
        made = [axis for axis in dims if labels.is_produced(axis)]
        if name not in found and len(dims) > 1:
            why = labels.why_frozen(made[0]) if made else "it is not multiplied as it stands, such as an embedding"
            stuck.setdefault(name, why or "it has one output feature")
    return Anatomy(sets, stuck, labels, axes)


def _sets(labels: Labels, axes: Sequence[list[np.ndarray]], names: Sequence[str]) -> tuple[UnitSet, ...]:
    places: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
    roots = {(leaf, dim): labels.roots(axis) for leaf, dims in enumerate(axes) for dim, axis in enumerate(dims)}
    for (leaf, dim), line in roots.items():
        found, counts = np.unique(line[labels.live(line)], return_counts=True)
        for root, count in zip(found.tolist(), counts.tolist(), strict=True):
            places[root].append((leaf, dim, count))
    members: dict[tuple, list[int]] = defaultdict(list)
    for root, where in places.items():
        members[tuple(where)].append(root)
    sets = []
    for where, units in members.items():
        units = np.sort(np.array(units))
        slots = []
        for leaf, dim, _ in where:
            line = roots[leaf, dim]
            number = np.searchsorted(units, line).clip(max=len(units) - 1)
            produces = leaf < len(names) and len(axes[leaf]) > 1 and labels.is_produced(axes[leaf][dim])
            slots.append(Slot(leaf, dim, np.where(units[number] == line, number, -1), produces))
        producing = tuple(dict.fromkeys(names[slot.leaf] for slot in slots if slot.produces))
        if producing and len(units) > 1:
            sets.append(UnitSet(len(units), tuple(slots), producing, units))
    return tuple(sets)


def keeping(kept: Sequence[tuple[UnitSet, np.ndarray]]) -> Keep:
    """What stays of each array where of each set only some units (a bool for each) stay."""
    keep: dict[tuple[int, int], np.ndarray] = {}
    for units, stays in kept:
        for slot in units.slots:
            here = (slot.unit < 0) | stays[slot.unit]
            keep[slot.leaf, slot.dim] = keep.get((slot.leaf, slot.dim), True) & here
    return keep


def cut(model: JaxModel, keep: Keep) -> JaxModel:
    """The model with smaller arrays; its structure is not adapted.

    Done in numpy, as is all that runs once: JAX would compile every operation for every shape.
    """
    leaves, tree = jax.tree.flatten((model.params, model.rest))
    whole: dict[int, np.ndarray] = {}
    for (leaf, dim), stays in keep.items():
        whole[leaf] = whole.get(leaf, np.asarray(leaves[leaf])).take(np.flatnonzero(stays), axis=dim)
    leaves = [jnp.asarray(whole[at]) if at in whole else leaf for at, leaf in enumerate(leaves)]
    return model.with_state(*jax.tree.unflatten(tree, leaves))


def masked(params: Any, keep: Keep) -> Any:
    """Parameters of the old shapes in which everything that does not stay is zero."""
    leaves, tree = jax.tree.flatten(params)
    whole: dict[int, np.ndarray] = {}
    for (leaf, dim), stays in keep.items():
        if leaf < len(leaves):
            array = whole.get(leaf, np.asarray(leaves[leaf]))
            whole[leaf] = array * along(stays.astype(array.dtype), dim, array.ndim)
    return jax.tree.unflatten(tree, [jnp.asarray(whole[at]) if at in whole else leaf for at, leaf in enumerate(leaves)])


def along(line: Any, dim: int, ndim: int) -> Any:
    """A line of values that broadcasts along one dimension."""
    return line.reshape([-1 if at == dim else 1 for at in range(ndim)])


def summed(units: UnitSet, slots: Sequence[Slot], leaves: Mapping[int, Any] | Sequence[Any]) -> Any:
    """For each unit the sum of the leaves' entries that lie in these slots: (size,); numpy of numpy, JAX of JAX."""
    total = np.zeros(units.size, np.float32)
    for slot in slots:
        leaf, inside = leaves[slot.leaf].astype(np.float32), slot.unit >= 0
        line = leaf.sum(tuple(dim for dim in range(leaf.ndim) if dim != slot.dim))
        if isinstance(line, np.ndarray):
            total = total + np.bincount(slot.unit[inside], line[inside], units.size)
        else:
            total = total + jax.ops.segment_sum(jnp.where(inside, line, 0), slot.unit.clip(0), units.size)
    return total
