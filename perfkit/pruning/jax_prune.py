"""Pruning of JAX models: units really removed, or weights masked; at once, or gradually while training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from perfkit._errors import InvalidInputError, UnsupportedError
from perfkit._report import Effect
from perfkit._workload import Workload
from perfkit.backends.jax_training import teacher
from perfkit.pruning import jax_channels as channels
from perfkit.pruning.jax_activations import mean_activations
from perfkit.pruning.jax_masks import Group, masking, zeroed
from perfkit.pruning.jax_modules import evaluating
from perfkit.pruning.jax_units import UnitSet, along, summed
from perfkit.pruning.jax_weights import importance, weight_groups

Numbered = Sequence[Any] | Mapping[int, Any]
"""A model's leaves by their number, all or some."""

NO_FASTER = "dense kernels run no faster on zeros: this shows what sparsity does to the outputs, not to the speed"


def pruned(work: Workload, recipe: Any) -> tuple[Workload, Effect]:
    """The workload with the least important weights or units gone.

    Units ("channels") really go: the arrays get smaller, with everything that depends on them. Single weights
    ("unstructured", "n:m") are set to zero and stay zero in training. In training with a `schedule` units are masked
    too, and pruning the trained model by the same amount in inference removes them.

    Args:
        recipe: has `amount`, `structure` ("channels", "unstructured", or "2:4" and other patterns), `criterion`
            ("magnitude", "taylor", "activation"), `schedule` (training steps), `round_to`, `distill`, `name`, and
            `selected(names)`.

    Raises:
        InvalidInputError: options that cannot be had together, or in this mode.
        UnsupportedError: the model has no parameters, its dependencies cannot be seen without example inputs, or its
            code runs without none of its units.

    Source: Li et al. 2017 (magnitude), Molchanov et al. 2019 (taylor), Zhu and Gupta 2017 (schedule).
    """
    _check(work, recipe)
    taught = with_teacher(work, recipe)
    if recipe.structure != "channels":
        return _sparse(taught, recipe)
    if work.trains and recipe.schedule:
        return _gradual(taught, recipe)
    smaller, effect = channels.smaller(taught, recipe, lambda sets: _scores(work, recipe, sets))
    if work.trains and effect.touched:
        note = "the optimizer's state starts anew, from the smaller parameters: there is none to repair"
        effect = dataclasses.replace(effect, notes=(*effect.notes, note))
    return smaller, effect


def _check(work: Workload, recipe: Any) -> None:
    if not jax.tree.leaves(work.model.params):
        raise UnsupportedError(f"{recipe.name}: {work.model.name} has no parameters: pass a function's as params=")
    if recipe.structure == "channels" and work.inputs is None:
        raise UnsupportedError(
            f"{recipe.name}: what depends on a channel is read off a run of the model: pass example_inputs, "
            "or use structure='unstructured'"
        )
    if recipe.criterion == "taylor" and not work.trains:
        raise InvalidInputError(
            f"{recipe.name}(criterion='taylor') needs gradients: use mode='training', or criterion='magnitude'"
        )


def with_teacher(work: Workload, recipe: Any) -> Workload:
    """The workload taught by the model as it is now, without dropout, where the recipe says `distill`.

    Raises:
        InvalidInputError: there is no training in which to teach.
    """
    if not recipe.distill:
        return work
    if not work.trains:
        raise InvalidInputError(f"{recipe.name}(distill=True) is a training loss: use mode='training'")
    original = teacher(work.replace(model=evaluating(work.model)))
    return work.replace(training=dataclasses.replace(work.training, teacher=original))


def _sparse(work: Workload, recipe: Any) -> tuple[Workload, Effect]:
    groups, touched, skipped, notes = weight_groups(work.model, recipe)
    if not groups:
        return work, Effect((), tuple(skipped))
    notes = (*notes, NO_FASTER)
    if work.trains:
        work = _under_masks(work, recipe, groups)
        notes += (f"zero after {recipe.schedule} training steps",) if recipe.schedule else ()
    else:
        work = _with_params(work, zeroed(work.model.params, groups))
    return work, Effect(touched, tuple(skipped), notes, simulated=True)


def _gradual(work: Workload, recipe: Any) -> tuple[Workload, Effect]:
    kept, skipped = channels.planned(work, recipe, lambda sets: _scores(work, recipe, sets))
    if not kept:
        return work, Effect((), tuple(skipped))
    sets = [units for units, _ in kept]
    fixed = _activations(work, sets) if recipe.criterion == "activation" else [None] * len(sets)
    groups = [_unit_group(work, recipe, units, scores) for units, scores in zip(sets, fixed, strict=True)]
    touched = tuple(dict.fromkeys(layer for units in sets for layer in units.layers))
    notes = [
        f"{units.name}: {units.size} → {units.size - group.leaving} after {recipe.schedule} training steps"
        for units, group in zip(sets, groups, strict=True)
    ]
    notes.append(
        "the units are at zero and still computed: prune the trained model by as much, in inference, to remove them"
    )
    return _under_masks(work, recipe, groups), Effect(touched, tuple(skipped), tuple(notes), simulated=True)


def _unit_group(work: Workload, recipe: Any, units: UnitSet, fixed: Any) -> Group:
    """The units of a set as a group, masked in every parameter in which they lie."""
    count = len(jax.tree.leaves(work.model.params))
    ndims = [leaf.ndim for leaf in jax.tree.leaves(work.model.params)]

    def scores(leaves: Sequence[Any], gradients: Sequence[Any]) -> jax.Array:
        return fixed if fixed is not None else _weighed(units, recipe, leaves, gradients)

    def masks(stays: jax.Array) -> dict[int, jax.Array]:
        found: dict[int, jax.Array] = {}
        for slot in units.slots:
            if slot.leaf < count:
                mask = along((slot.unit < 0) | stays[slot.unit], slot.dim, ndims[slot.leaf])
                found[slot.leaf] = found[slot.leaf] & mask if slot.leaf in found else mask
        return found

    return Group(units.size, channels.removed(units.size, recipe), scores, masks)


def _under_masks(work: Workload, recipe: Any, groups: Sequence[Group]) -> Workload:
    training = work.training
    if recipe.schedule == 0:
        gradients = _gradients(work) if recipe.criterion == "taylor" else None
        work = _with_params(work, zeroed(work.model.params, groups, gradients))
    optimizer = masking(training.optimizer, groups, recipe.schedule)
    return work.replace(training=dataclasses.replace(training, optimizer=optimizer))


def _with_params(work: Workload, params: Any) -> Workload:
    return work.replace(model=work.model.with_state(params, work.model.rest))


def _scores(work: Workload, recipe: Any, sets: Sequence[UnitSet]) -> list[Any]:
    """How important each unit of each set is, by the recipe's criterion."""
    if recipe.criterion == "activation":
        return _activations(work, sets)
    producing = {slot.leaf for units in sets for slot in units.producers}  # of the others some may be no numbers

    def numbers(tree: Any) -> dict[int, np.ndarray]:
        return {number: np.asarray(leaf) for number, leaf in enumerate(jax.tree.leaves(tree)) if number in producing}

    gradients = numbers(_gradients(work)) if recipe.criterion == "taylor" else {}
    return [_weighed(units, recipe, numbers(work.model.params), gradients) for units in sets]


def _weighed(units: UnitSet, recipe: Any, leaves: Numbered, gradients: Numbered) -> Any:
    """The summed importance of the weights that make each unit; for "magnitude" the square of their L2 norm."""
    found = {
        slot.leaf: importance(
            recipe.criterion, leaves[slot.leaf], gradients[slot.leaf] if recipe.criterion == "taylor" else None
        )
        for slot in units.producers
    }
    return summed(units, units.producers, found)


def _activations(work: Workload, sets: Sequence[UnitSet]) -> list[Any]:
    return mean_activations(evaluating(work.model), work.calibration or (work.inputs,), sets)


def _gradients(work: Workload) -> Any:
    """The gradients of the loss on the example batch."""
    function, training, inputs = work.model.function(), work.training, work.inputs

    def loss(params):
        return training.loss(function(params, work.model.rest, *inputs.args, **inputs.kwargs)[0], training.targets)

    return jax.jit(jax.grad(loss))(work.model.params)
