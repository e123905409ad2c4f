"""How close one loss curve is to another. Plain numbers; everything is compared in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from perfkit._quantity import Quantity
from perfkit._report import Fidelity

FLAT = 0.1
"""A loss curve that moves by less than this share of its own size is measured against that share instead."""

END = 5
"""Losses at the end of a curve that are averaged, where it is judged by its end."""


def compare_losses(
    before: Sequence[float],
    after: Sequence[float],
    *,
    tolerance: float,
    factor: float = 2.0,
    seed_noise: float | None = None,
) -> Fidelity:
    """Compare two loss curves: their mean absolute distance, relative to the range of the original's curve.

    `error = mean(|after - before|) / max(max(before) - min(before), FLAT * mean(|before|))`, and it passes where
    `error <= factor * seed_noise + tolerance`. Steps at which the original is not finite are left out; a loss that is
    not finite where the original's is fails.

    Args:
        before, after: (steps,), losses of the original and of the result from the same start on the same data.
        seed_noise: the same error between two seeds of the original, where it draws random numbers.

    Raises:
        ValueError: no steps, or not the same number of them.
    """
    first, second = _curves(before, after)
    finite = np.isfinite(first)
    lost = finite & ~np.isfinite(second)
    noise = 0.0 if seed_noise is None else float(seed_noise)
    error, distance = 0.0, 0.0
    if lost.any():
        error = distance = math.inf
    elif finite.any():
        with np.errstate(over="ignore"):
            differences = np.abs(second[finite] - first[finite])
            spread = np.ptp(first[finite])
            scale = max(float(spread), FLAT * float(np.abs(first[finite]).mean())) or 1.0
            error, distance = float((differences / scale).mean()), float(differences.max())
    reason = ""
    if lost.any():
        step = int(np.argmax(lost))
        reason = f"{lost.sum()} of {len(first)} losses are not finite where the original's are, from step {step} on"
    elif not finite.any():
        reason = "no loss of the original is finite, so there is nothing to compare with"
    elif not math.isfinite(noise):
        reason = "the original itself diverges with another seed, so nothing can be said about the result"
    elif not error <= factor * noise + tolerance:
        reason = (
            f"the loss curves lie {error:.3g} of the original's range apart, above {factor:g} × {noise:.3g} "
            f"(two seeds of the original) + {tolerance:g}"
        )
    return _of_losses(error, distance, tolerance, reason, factor=factor, noise=noise)


def compare_ends(before: Sequence[float], after: Sequence[float], *, tolerance: float) -> Fidelity:
    """Whether a model that starts from another loss, because a recipe took something away, learns it again.

    `error = max(0, end of after - middle) / range of both`, the end being the mean of the last `END` losses, and the
    middle that of the original's highest loss and its end: it passes where training leads back into the lower half of
    what the original's curve goes through. A model that stays where the original began learns nothing.

    Args:
        before, after: (steps,), losses of the original and of the result on the same data.

    Raises:
        ValueError: no steps, or not the same number of them.
    """
    first, second = _curves(before, after)
    reason, error, distance = "", 0.0, 0.0
    if not np.isfinite(second).all():
        lost = ~np.isfinite(second)
        error = distance = math.inf
        reason = f"{lost.sum()} of {len(second)} losses are not finite, from step {int(np.argmax(lost))} on"
        if not np.isfinite(first).all():
            reason += "; nor are the original's: lower the learning rate"
    elif np.isfinite(first).any():
        known = first[np.isfinite(first)]
        middle = (float(known.max()) + float(known[-END:].mean())) / 2
        distance = max(0.0, float(second[-END:].mean()) - middle)
        error = distance / (float(np.ptp(np.concatenate([known, second]))) or 1.0)
        if error > tolerance:
            reason = (
                f"after {len(second)} steps the loss is still {error:.3g} of the curves' range above the middle of "
                f"the original's ({middle:.4g}), which is more than {tolerance:g}: train longer, or take less away"
            )
    return _of_losses(error, distance, tolerance, reason)


def compare_progress(
    before: Sequence[float], after: Sequence[float], steps: Sequence[int], *, tolerance: float
) -> Fidelity:
    """How far a training came that takes another way than the original's, such as one of models averaged at times.

    `error = max(0, end of after - end of before) / (before[0] - end of before)`, the share of the original's progress
    that is missing, the end being the mean of the last `END` of `steps`, or of the last half of fewer.

    Args:
        before, after: losses of the original and of the result from the same start on the same data.
        steps: at which losses are of the same thing, such as of averaged models.

    Raises:
        ValueError: no steps, or not the same number of them.
    """
    first, second = (curve[list(steps)] for curve in _curves(before, after))
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        lost = ~(np.isfinite(first) & np.isfinite(second))
        reason = f"{lost.sum()} of the {len(first)} losses that are compared are not finite"
        return _of_losses(math.inf, math.inf, tolerance, reason)
    last = min(END, max(1, len(first) // 2))
    end = float(first[-last:].mean())
    distance = max(0.0, float(second[-last:].mean()) - end)
    error = distance / max(abs(float(first[0]) - end), FLAT * float(np.abs(first).mean()), np.finfo(float).tiny)
    reason = ""
    if error > tolerance:
        reason = (
            f"after {len(before)} steps {error:.3g} of what the original has learned is missing, which is more than "
            f"{tolerance:g}: exchange more often, or begin with steps that all take together"
        )
    return _of_losses(error, distance, tolerance, reason)


def _curves(before: Sequence[float], after: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise ValueError(
            f"loss curves have as many steps, one at least, but these are {first.shape} and {second.shape}"
        )
    return first, second


def _of_losses(
    error: float, distance: float, tolerance: float, reason: str, factor: float = 1.0, noise: float = 0.0
) -> Fidelity:
    nothing = "training compares loss curves"
    return Fidelity(
        ok=not reason,
        relative_error=error,
        original_error=noise,
        factor=factor,
        tolerance=tolerance,
        reference="the loss curve of the original",
        max_abs_error=distance,
        sqnr_db=Quantity.missing("dB", nothing),
        top1_agreement=Quantity.missing("ratio", nothing),
        reason=reason,
    )
