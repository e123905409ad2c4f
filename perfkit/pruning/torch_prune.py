"""Pruning of torch models: whole units really removed, or single weights set to zero."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import nn

from perfkit._report import Effect, Skipped
from perfkit._workload import Workload
from perfkit.backends.torch_training import teacher
from perfkit.pruning import torch_masks as masks
from perfkit.pruning.torch_cut import cut, verified
from perfkit.pruning.torch_layers import OWNERS, bound_parameters, label, owners, structure
from perfkit.pruning.torch_rank import balanced, chosen, scores
from perfkit.pruning.torch_sparse import SPARSE_KERNELS, use_sparse_kernel
from perfkit.pruning.torch_units import Structure

if TYPE_CHECKING:
    from perfkit.recipes.prune import Prune

_WORDS = {nn.Linear: "features", nn.RNNBase: "hidden units"}
_DENSE = "the zeros are stored and multiplied like any number: dense kernels do not get faster or smaller by them"


def pruned(work: Workload, recipe: Prune) -> tuple[Workload, Effect]:
    """Remove what `recipe` says from `work.model`, in place.

    Raises:
        UnsupportedError: the optimizer keeps a state that cannot be cut with its weights.
        InvalidInputError: a pattern of include or exclude matches no layer.
    """
    masks.settle(work.model)
    if recipe.distill and work.training.teacher is None:  # a teacher that is there knew the model before
        work = work.replace(training=dataclasses.replace(work.training, teacher=teacher(work)))
    return work, (_units if recipe.structure == "channels" else _weights)(work, recipe)


def _units(work: Workload, recipe: Prune) -> Effect:
    wanted = recipe.selected(owners(work.model))
    found = balanced(structure(work, wanted))
    importance = scores(found, work, recipe.criterion)
    removed, refused = verified(work, found, chosen(found, importance, recipe.amount, recipe.round_to))
    found = _fixed(found, refused)
    sizes = _sizes(found, removed)
    skipped = [
        Skipped(name, refused.get(name) or _reason(name, found, recipe))
        for name in owners(work.model)
        if name not in sizes
    ]
    modules = {label(work.model, name): module for name, module in work.model.named_modules()}
    notes = [f"{name}: {old} → {new} {_word(modules[name])}" for name, (old, new) in sizes.items()]
    if recipe.schedule and sizes:
        fixed_order = None if recipe.criterion == "magnitude" else importance
        growth = masks.Units(
            recipe.amount, recipe.schedule, structure=found, round_to=recipe.round_to, scores=fixed_order
        )
        masks.attach(work.model, growth)
        notes.append(
            f"masked step by step over {recipe.schedule} training steps; prune the trained model in inference mode to "
            "remove what is zero by then"
        )
    elif sizes:
        cut(work.model, found, removed, work.training.optimizer if work.trains else None)
    return Effect(tuple(sizes), tuple(skipped), tuple(notes), simulated=bool(recipe.schedule))


def _fixed(found: Structure, refused: dict[str, str]) -> Structure:
    """The units of these layers stay too."""
    fixed = dict(found.fixed)
    for layer, reason in refused.items():
        for part in found.axes[layer]:
            fixed |= {unit: fixed.get(unit, reason) for unit in part.tolist()}
    return dataclasses.replace(found, fixed=fixed)


def _sizes(found: Structure, removed: torch.Tensor) -> dict[str, tuple[int, int]]:
    """Layers that lose units -> outputs before and after; of a recurrent layer for each layer and direction."""
    sizes = {name: (len(parts[0]), int((~removed[parts[0]]).sum())) for name, parts in found.axes.items()}
    return {name: (old, new) for name, (old, new) in sizes.items() if new < old}


def _reason(name: str, found: Structure, recipe: Prune) -> str:
    if name in found.skipped:
        return found.skipped[name]
    units = [unit for part in found.axes[name] for unit in part.tolist()]
    reasons = [found.fixed[unit] for unit in units if unit in found.fixed]
    if reasons:
        return f"its output {reasons[0]}"
    size = len(found.axes[name][0])
    return f"amount={recipe.amount:g} of {size}, rounded to a multiple of {recipe.round_to}, leaves nothing to remove"


def _word(module: nn.Module) -> str:
    return next((word for kind, word in _WORDS.items() if isinstance(module, kind)), "channels")


def _weights(work: Workload, recipe: Prune) -> Effect:
    model, pattern = work.model, recipe.pattern
    shared, wanted = bound_parameters(model), recipe.selected(owners(model))
    tensors, touched, skipped = [], [], []
    for name, module in model.named_modules():
        called = label(model, name)
        if not isinstance(module, OWNERS):
            continue
        matrices = [key for key, value in module.named_parameters(recurse=False) if value.ndim > 1]
        reason = shared.get(name) and f"it {shared[name]}"
        if called not in wanted:
            reason = "include/exclude leave it alone"
        elif not all(key.startswith("weight") for key in matrices) or not matrices:
            reason = "its weights are computed from other parameters"
        elif pattern:
            widths = {getattr(module, key).shape[1] for key in matrices}
            if uneven := [width for width in widths if width % pattern[1]]:
                reason = f"its {uneven[0]} inputs are no multiple of {pattern[1]}"
        if reason:
            skipped.append(Skipped(called, reason))
        else:
            touched.append(called)
            tensors.extend((name, key) for key in matrices)
    if not tensors:
        return Effect((), tuple(skipped))
    if work.trains:
        growth = masks.Weights(recipe.amount, recipe.schedule, tensors=tuple(tensors), pattern=pattern)
        masks.attach(model, growth)
        return Effect(tuple(touched), tuple(skipped), (_DENSE,), simulated=True)
    dense = {}
    for name, key in tensors:
        module = model.get_submodule(name)
        weight = getattr(module, key)
        with torch.no_grad():
            weight.masked_fill_(masks.smallest(weight.abs(), recipe.amount, pattern), 0)
        if pattern != SPARSE_KERNELS:
            dense[label(model, name)] = _DENSE
        elif reason := use_sparse_kernel(module):
            dense[label(model, name)] = f"{_DENSE} ({reason})"
    reasons: dict[str, list[str]] = {}
    for name, reason in dense.items():
        reasons.setdefault(reason, []).append(name)
    notes = [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return Effect(tuple(touched), tuple(skipped), tuple(notes), simulated=bool(dense))
