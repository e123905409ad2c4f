"""Accuracy repair: where a result's numbers are too far off, the most sensitive layers are given back one by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from glob import escape

from perfkit._chain import Chain
from perfkit._errors import PerfkitError, first_line
from perfkit._recipe import LayerRecipe
from perfkit._report import Skipped
from perfkit._variant import Applied, Variant, apply, observed, ready
from perfkit._workload import Workload


@dataclass(frozen=True)
class Missed:
    """By how much a variant misses what is asked of it (not above 0 where it holds), and that in words."""

    by: float
    told: str


@dataclass(frozen=True)
class Repaired:
    """A chain that holds, or why none was found.

    Args:
        applied, variant: the chain without the layers that were given back; None where none holds.
        explanation: what was tried, for the caller.
    """

    explanation: str
    applied: Applied | None = None
    variant: Variant | None = None


def repaired(
    work: Workload,
    applied: Applied,
    missed: Callable[[Variant, Chain], Missed],
    progress: Callable[[str], object],
) -> Repaired:
    """Give back layers of the chain's recipe that can until the result holds.

    Layers are ranked by what each costs alone, and leave in that order. The other recipes of the chain are left out of
    the search where they come after, so that nothing is compiled for it.

    Args:
        work: what the chain is applied to.
        applied: the chain that missed.
        missed: judges a variant.
    """
    index, recipe, layers = repairable(applied)
    before, after = applied.chain.recipes[:index], applied.chain.recipes[index + 1 :]

    def tried(candidate: LayerRecipe) -> Missed:
        chain = Chain((*before, candidate))
        try:
            return missed(ready(apply(chain, work).works[-1], str(chain)), chain)
        except PerfkitError as error:  # what does not run cannot be kept either
            return Missed(math.inf, first_line(error))

    costs = {}
    for number, layer in enumerate(layers, 1):
        progress(f"finding the sensitive layers of {recipe.name} ({number} of {len(layers)})")
        costs[layer] = tried(replace(recipe, include=(escape(layer),), exclude=()))
    ranked = sorted(layers, key=lambda layer: costs[layer].by, reverse=True)
    for count in range(1, len(ranked)):
        progress(f"giving back {', '.join(ranked[:count])}")
        smaller = replace(recipe, exclude=(*recipe.exclude, *map(escape, ranked[:count])))
        if tried(smaller).by <= 0:
            chain = Chain((*before, smaller, *after))
            applied = apply(chain, work)
            variant = ready(applied.works[-1], str(chain))
            given_back = {layer: costs[layer] for layer in ranked[:count]}
            applied = _told(observed(applied, variant.log), index, given_back)
            if missed(variant, chain).by <= 0:
                return Repaired(f"{count} of {len(ranked)} layers were given back", applied, variant)
    return Repaired(f"giving back all but {ranked[-1]} of its {len(ranked)} layers did not help")


def repairable(applied: Applied) -> tuple[int, LayerRecipe, tuple[str, ...]] | None:
    """The chain's recipe that can give layers back, its place and its layers; None where there is none."""
    for index, (recipe, step) in enumerate(zip(applied.chain, applied.steps, strict=True)):
        if isinstance(recipe, LayerRecipe) and recipe.gives_back and len(step.effect.touched) > 1:
            return index, recipe, step.effect.touched
    return None


def _told(applied: Applied, index: int, given_back: Mapping[str, Missed]) -> Applied:
    """The effect says of each layer that was given back what it costs."""
    step = applied.steps[index]

    def reason(item: Skipped) -> Skipped:
        cost = given_back.get(item.name)
        return replace(item, reason=f"given back: with this layer alone, {cost.told}") if cost else item

    effect = replace(step.effect, skipped=tuple(map(reason, step.effect.skipped)))
    steps = [replace(item, effect=effect) if item is step else item for item in applied.steps]
    return replace(applied, steps=tuple(steps))
