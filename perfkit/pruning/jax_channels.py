"""Structured pruning of JAX models: channels, features and hidden units really removed, and the proof that it is right.

Source: Li et al., "Pruning Filters for Efficient ConvNets" (2017), https://arxiv.org/abs/1608.08710;
Fang et al., "DepGraph: Towards Any Structural Pruning" (2023), https://arxiv.org/abs/2301.12900.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from perfkit._errors import UnsupportedError
from perfkit._report import Effect, Skipped
from perfkit._workload import Inputs, Workload
from perfkit.backends.jax_model import JaxModel, LinenModel
from perfkit.pruning import amounts
from perfkit.pruning.jax_modules import evaluating, resized
from perfkit.pruning.jax_units import Anatomy, UnitSet, anatomy, cut, keeping, masked, summed

Kept = list[tuple[UnitSet, np.ndarray]]
Scores = Callable[[Sequence[UnitSet]], Sequence[Any]]


def smaller(work: Workload, recipe: Any, scores: Scores) -> tuple[Workload, Effect]:
    """The workload with the least important units removed.

    Args:
        recipe: `amount`, `round_to`, `include` and `exclude` of it are read.
        scores: how important each unit of each set is.

    Raises:
        UnsupportedError: there are units to remove, and the model's code runs without none of them.
    """
    kept, skipped = planned(work, recipe, scores)
    model = resized(cut(work.model, keeping(kept))) if kept else work.model
    touched = tuple(dict.fromkeys(layer for units, _ in kept for layer in units.layers))
    notes = tuple(f"{units.name}: {units.size} → {int(stays.sum())}" for units, stays in kept)
    return work.replace(model=model), Effect(touched, tuple(skipped), notes)


def planned(work: Workload, recipe: Any, scores: Scores) -> tuple[Kept, list[Skipped]]:
    """Which units of which sets stay, each cut proven, and what is left alone.

    Raises:
        UnsupportedError: there are units to remove, and the model's code runs without none of them.
    """
    found = anatomy(evaluating(work.model), work.inputs)
    sets, skipped = eligible(found, recipe)
    rated = zip(sets, scores(sets) if sets else (), strict=True)
    kept = [(units, best(units, rates, removed(units.size, recipe), work.model)) for units, rates in rated]
    kept, refused = sound(work.model, work.inputs, kept)
    if refused and not kept:
        told = "; ".join(f"{item.name}: {item.reason}" for item in refused[:2])
        told += f"; and {len(refused) - 2} more" if len(refused) > 2 else ""
        stated = ", since linen modules state the sizes of their layers in their code"
        raise UnsupportedError(
            f"{recipe.name}: no unit of {work.model.name} can be removed"
            f"{stated if isinstance(work.model, LinenModel) else ''} ({told}). "
            "structure='unstructured' sets weights to zero and leaves all shapes as they are"
        )
    return kept, [*skipped, *refused]


def removed(size: int, recipe: Any) -> int:
    """How many of `size` units go."""
    return size - amounts.kept(size, recipe.amount, recipe.round_to)


def eligible(found: Anatomy, recipe: Any) -> tuple[list[UnitSet], list[Skipped]]:
    """The sets that `recipe` shall cut, and the layers that it leaves alone with the reasons."""
    names = [*dict.fromkeys([*(layer for units in found.sets for layer in units.layers), *found.stuck])]
    wanted = recipe.selected(names)
    sets, skipped = [], [Skipped(name, why) for name, why in found.stuck.items()]
    for units in found.sets:
        out = [layer for layer in units.layers if layer not in wanted]
        if out:
            skipped += [
                Skipped(layer, "left out by include or exclude" if layer in out else f"its units are also {out[0]!r}'s")
                for layer in units.layers
            ]
        elif removed(units.size, recipe) == 0:
            reason = f"{units.size} units less {recipe.amount:.0%}, as a multiple of {recipe.round_to}, are all of them"
            skipped += [Skipped(layer, reason) for layer in units.layers]
        else:
            sets.append(units)
    return sets, skipped


def best(units: UnitSet, scores: np.ndarray, leaving: int, model: JaxModel) -> np.ndarray:
    """Which units stay: a bool for each. Those whose parameters are all zero go first, then the lowest scores."""
    leaves = jax.tree.leaves(model.params)
    slots = [slot for slot in units.slots if slot.leaf < len(leaves)]
    weight = summed(units, slots, {slot.leaf: np.abs(np.asarray(leaves[slot.leaf])) for slot in slots})
    order = np.lexsort((np.asarray(scores), weight > 0))
    stays = np.ones(units.size, bool)
    stays[order[:leaving]] = False
    return stays


def sound(model: JaxModel, inputs: Inputs, kept: Kept) -> tuple[Kept, list[Skipped]]:
    """Those cuts after which the model computes what it computes with the cut units' parameters set to zero.

    Arrays of equal entries, such as fresh biases, would hide a unit taken for another: they get noise for the proof.
    """
    model = _told_apart(evaluating(model))
    running, refused = _sifted(kept, lambda some: _not_running(model, inputs, some))
    equal, differing = _sifted(running, lambda some: _not_equal(model, inputs, some))
    return equal, [*refused, *differing]


def _sifted(kept: Kept, problem: Callable[[Kept], str | None]) -> tuple[Kept, list[Skipped]]:
    """The cuts that together have no problem, found one by one where all of them have one; and the others."""
    if not kept or problem(kept) is None:
        return kept, []
    good, refused = [], []
    for one in kept:
        why = problem([*good, one])
        if why is None:
            good.append(one)
        else:
            refused += [Skipped(layer, why) for layer in one[0].layers]
    return good, refused


def _not_running(model: JaxModel, inputs: Inputs, kept: Kept) -> str | None:
    """Why the model's code cannot run without these units; None where it can. Nothing is computed."""
    small = resized(cut(model, keeping(kept)))
    try:
        found = _shapes(small, inputs)
    except Exception as error:  # whatever the caller's code raises at sizes that it was not written for
        return f"the model's code does not run with fewer units: {_first_line(error)}"
    return None if found == _shapes(model, inputs) else "the outputs' shapes would change"


def _not_equal(model: JaxModel, inputs: Inputs, kept: Kept) -> str | None:
    """Why the smaller model is not the masked one; None where their outputs are equal."""
    if why := _not_running(model, inputs, kept):  # fewer cuts than were found to run together
        return why
    keep = keeping(kept)
    expected = _outputs(model.with_state(masked(model.params, keep), model.rest), inputs)
    found = _outputs(resized(cut(model, keep)), inputs)
    for want, got in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        if not _close(np.asarray(want), np.asarray(got)):
            return "without them the model does not compute what it computes with them at zero"
    return None


def _shapes(model: JaxModel, inputs: Inputs) -> list[tuple[int, ...]]:
    outputs = jax.eval_shape(model.function(), model.params, model.rest, *inputs.args, **inputs.kwargs)[0]
    return [leaf.shape for leaf in jax.tree.leaves(outputs)]


def _close(want: np.ndarray, got: np.ndarray) -> bool:
    """Equal to half the digits of their type: rounding, in another order of sums, takes less, a wrong unit takes more.

    Whole numbers, such as the class that an argmax finds, may flip on rounding and prove nothing either way.
    """
    if not jnp.issubdtype(want.dtype, jnp.inexact):
        return True
    wide = np.complex128 if jnp.issubdtype(want.dtype, jnp.complexfloating) else np.float64
    allowed = math.sqrt(float(jnp.finfo(want.dtype).eps))
    want, got = want.astype(wide), got.astype(wide)
    finite = np.isfinite(want)
    if not np.array_equal(finite, np.isfinite(got)):
        return False
    return np.linalg.norm((want - got)[finite]) <= allowed * np.linalg.norm(want[finite])


def _outputs(model: JaxModel, inputs: Inputs) -> Any:
    return jax.jit(model.function())(model.params, model.rest, *inputs.args, **inputs.kwargs)[0]


def _told_apart(model: JaxModel) -> JaxModel:
    leaves, tree = jax.tree.flatten(model.params)
    generator = np.random.default_rng(0)

    def one(leaf: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jnp.floating) or not leaf.size:
            return leaf
        array = np.asarray(leaf)
        if (array != array.reshape(-1)[0]).any():
            return leaf
        return jnp.asarray(array + (0.1 * generator.standard_normal(array.shape)).astype(array.dtype))

    return model.with_state(jax.tree.unflatten(tree, map(one, leaves)), model.rest)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"
