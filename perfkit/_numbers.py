"""Are a result's numbers close enough: its outputs against a float64 run, or its losses against the original's."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from perfkit._chain import Chain
from perfkit._errors import first_line
from perfkit._recipe import LayerRecipe, ask
from perfkit._report import Fidelity, LossCurves
from perfkit._settings import Settings
from perfkit._workload import Workload
from perfkit.backends.adapter import Finished
from perfkit.measure import fidelity, loss_curves

if TYPE_CHECKING:
    from perfkit._variant import Variant

TRAINING_STEPS = 50
LOSS_TOLERANCE = 0.05
"""Mean distance of two loss curves, as a share of the range that the original's covers."""

LAG_TOLERANCE = 0.5
"""Share of the original's progress that may be missing where a recipe trains another way by design."""

UNLIKE = 0.5
"""Relative error of the original from which on its float64 run says nothing about a result: twice that is allowed.

No precision comes near it; what exceeds it draws other random numbers, or decides by a hair.
"""

JUDGED_BY_METRIC = 1.0
"""Relative error allowed where layers were compressed and the caller's metric tells what that costs."""


class Numbers:
    """What a workload computes on its example inputs. Each is asked once: a search compares many with the original, and
    the best of them twice.
    """

    def __init__(self, work: Workload, finished: Finished):
        self._work, self._finished = work, finished
        self._losses: dict[tuple[int, int], tuple[float, ...]] = {}

    @cached_property
    def outputs(self) -> list[np.ndarray]:
        return self._work.backend.outputs(self._work, self._finished)

    @cached_property
    def reference(self) -> tuple[list[np.ndarray], str]:
        """What outputs are compared with, and its name: a float64 run, where that says something about them."""
        try:
            found = self._work.backend.float64_outputs(self._work)
        except Exception as error:  # whatever a model may raise in a precision it was not written for
            return self.outputs, f"the original itself, since it does not run in float64 ({first_line(error)})"
        name = "a float64 run of the original"
        away = fidelity.compare_outputs(
            self.outputs, self.outputs, found, tolerance=math.inf, factor=0.0, reference_name=name
        )
        if away.relative_error > UNLIKE:
            return self.outputs, f"the original itself, since a float64 run of it differs by {away.relative_error:.2g}"
        return found, name

    @cached_property
    def drawn(self) -> bool:
        """Whether the outputs depend on the seed."""
        other = self._work.backend.outputs(self._work.replace(seed=self._work.seed + 1), self._finished)
        return not all(
            np.array_equal(a, b, equal_nan=a.dtype.kind in "fc") for a, b in zip(self.outputs, other, strict=True)
        )

    def losses(self, steps: int, seed: int) -> tuple[float, ...]:
        if (steps, seed) not in self._losses:
            self._losses[steps, seed] = self._work.backend.losses(self._work, self._finished, steps, seed)
        return self._losses[steps, seed]


def check_numbers(
    original: Variant, result: Variant, chain: Chain, settings: Settings
) -> tuple[Fidelity, LossCurves | None]:
    """Inference: the outputs, against a float64 run of the original. Training: the loss curves."""
    tolerance = settings.tolerance
    if original.work.trains:
        return _check_losses(original, result, chain, tolerance)
    if tolerance is None:
        judged = settings.evaluate is not None and any(isinstance(recipe, LayerRecipe) for recipe in chain)
        tolerance = JUDGED_BY_METRIC if judged else chain.tolerance
    numbers = original.numbers
    reference, name = numbers.reference
    close = fidelity.compare_outputs(
        result.numbers.outputs, numbers.outputs, reference, tolerance=tolerance, reference_name=name
    )
    if not close.ok and numbers.drawn:
        reason = f"{close.reason}; the model draws random numbers, and the result draws others"
        close = replace(close, reason=reason)
    return original.work.world.agree(close), None


def _check_losses(
    original: Variant, result: Variant, chain: Chain, tolerance: float | None
) -> tuple[Fidelity, LossCurves]:
    work, numbers = original.work, original.numbers
    before = numbers.losses(TRAINING_STEPS, work.seed)
    after = result.numbers.losses(TRAINING_STEPS, work.seed)
    if steps := next(filter(None, (ask(recipe, "judged_at", TRAINING_STEPS) for recipe in chain)), None):
        # Every process told the loss of its own part; those of the example batch are equally large.
        after = tuple(map(fmean, zip(*work.world.gather(after), strict=True)))
        before, after = work.world.agree((before, after))
        tolerance = LAG_TOLERANCE if tolerance is None else tolerance
        return loss_curves.compare_progress(before, after, steps, tolerance=tolerance), LossCurves(before, after)
    before, after = work.world.agree((before, after))
    tolerance = LOSS_TOLERANCE if tolerance is None else tolerance
    if any(recipe.retrains for recipe in chain):
        return loss_curves.compare_ends(before, after, tolerance=tolerance), LossCurves(before, after)
    noise = None
    if numbers.losses(1, work.seed + 1)[0] != before[0]:
        # The model draws random numbers: how far apart are two seeds of the original?
        other = numbers.losses(TRAINING_STEPS, work.seed + 1)
        noise = loss_curves.compare_losses(before, other, tolerance=tolerance).relative_error
    return loss_curves.compare_losses(before, after, tolerance=tolerance, seed_noise=noise), LossCurves(before, after)
