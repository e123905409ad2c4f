"""How close one set of outputs, or one loss curve, is to another. Plain arrays; everything is compared in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from perfkit._report import Fidelity, Quantity

FLAT = 0.1
"""A loss curve that moves by less than this share of its own size is measured against that share instead."""

END = 5
"""Losses at the end of a curve that are averaged, where it is judged by its end."""


@dataclass(frozen=True)
class _Leaf:
    """One output's errors; `broken` says what makes it wrong whatever its errors are."""

    error: float
    original_error: float
    max_abs_error: float
    exact_type: bool
    silent: bool
    broken: str = ""

    def excess(self, factor: float) -> float:
        return math.inf if self.broken else self.error - factor * self.original_error


def compare_outputs(
    result: Sequence[np.ndarray],
    original: Sequence[np.ndarray],
    reference: Sequence[np.ndarray],
    *,
    tolerance: float,
    factor: float = 2.0,
    reference_name: str,
) -> Fidelity:
    """Compare the outputs of the result and of the original with a reference, output by output.

    An output passes where `error <= factor * original_error + tolerance`, with `error = ‖x - reference‖ / ‖reference‖`
    over the entries that are finite in both. The output that passes least is reported. An output whose reference is
    zero throughout takes a norm of one per entry in its place: its error is then the root mean square.
    Integer and boolean outputs count the share of entries that differ.

    Values that are not finite where the original's are finite always fail; the same ones in the same places do not.

    Args:
        result, original, reference: flattened outputs, of any shape and dtype; as many on each side.
        reference_name: what the reference is, for the report.

    Raises:
        ValueError: the reference is not shaped like the original.

    Source: the rule of torch/_dynamo/utils.py, `same`.
    """
    result, original, reference = ([np.asarray(leaf) for leaf in side] for side in (result, original, reference))
    if [leaf.shape for leaf in reference] != [leaf.shape for leaf in original]:
        raise ValueError(
            f"the reference has outputs of shape {[leaf.shape for leaf in reference]}, "
            f"but the original's are {[leaf.shape for leaf in original]}"
        )

    def fidelity(error: float, original_error: float, max_abs_error: float, sqnr: Quantity, top1: Quantity, reason=""):
        return Fidelity(
            ok=not reason,
            relative_error=error,
            original_error=original_error,
            factor=factor,
            tolerance=tolerance,
            reference=reference_name,
            max_abs_error=max_abs_error,
            sqnr_db=sqnr,
            top1_agreement=top1,
            reason=reason,
        )

    if reason := _different_structure(result, original):
        return fidelity(
            math.inf, 0.0, math.inf, Quantity.missing("dB", reason), Quantity.missing("ratio", reason), reason
        )
    count = len(result)
    names = ["the output"] if count == 1 else [f"output {i + 1} of {count}" for i in range(count)]
    leaves = [_leaf(*arrays) for arrays in zip(names, result, original, reference, strict=True)]
    if not leaves:
        nothing = "there are no outputs"
        return fidelity(0.0, 0.0, 0.0, Quantity.missing("dB", nothing), Quantity.missing("ratio", nothing))
    worst = max(range(count), key=lambda i: leaves[i].excess(factor))
    leaf = leaves[worst]
    reason = leaf.broken
    if not reason and not leaf.error <= factor * leaf.original_error + tolerance:
        reason = (
            f"the relative error of {names[worst]} is {leaf.error:.3g}, above {factor:g} × "
            f"{leaf.original_error:.3g} (the original's own) + {tolerance:g}"
        )
    return fidelity(
        math.inf if leaf.broken else leaf.error,
        leaf.original_error,
        max(leaf.max_abs_error for leaf in leaves),
        _sqnr_db(leaves),
        _top1_agreement(result, original),
        reason,
    )


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
        reason = f"{_counted(lost)} of {len(first)} losses are not finite where the original's are, from step {step} on"
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

    `error = max(0, end of after - max(before)) / range of both`, the end being the mean of the last `END` losses: it
    passes where training leads back to where the original's curve lies.

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
        reason = f"{_counted(lost)} of {len(second)} losses are not finite, from step {int(np.argmax(lost))} on"
        if not np.isfinite(first).all():
            reason += "; nor are the original's: lower the learning rate"
    elif np.isfinite(first).any():
        highest = float(first[np.isfinite(first)].max())
        both = np.concatenate([first[np.isfinite(first)], second])
        distance = max(0.0, float(second[-END:].mean()) - highest)
        error = distance / (float(np.ptp(both)) or 1.0)
        if error > tolerance:
            reason = (
                f"after {len(second)} steps the loss is still {error:.3g} of the curves' range above the original's "
                f"highest, which is more than {tolerance:g}: train longer, or take less away"
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
        reason = f"{_counted(lost)} of the {len(first)} losses that are compared are not finite"
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


def _different_structure(result: list[np.ndarray], original: list[np.ndarray]) -> str:
    if len(result) != len(original):
        return f"the number of outputs differs: {len(result)} from the result, {len(original)} from the original"
    for index, (new, old) in enumerate(zip(result, original, strict=True), 1):
        if new.shape != old.shape:
            return f"output {index} of {len(original)} has shape {new.shape}, but the original's has {old.shape}"
    return ""


def _leaf(name: str, result: np.ndarray, original: np.ndarray, reference: np.ndarray) -> _Leaf:
    if result.dtype.kind in "biu" and original.dtype.kind in "biu":
        return _exact_leaf(result, original, reference)
    new, old, true = (_float64(array) for array in (result, original, reference))
    broken = _broken(name, new, old, true)
    comparable = np.isfinite(true) & np.isfinite(new)
    error, max_abs_error = _errors(new[comparable], true[comparable])
    comparable = np.isfinite(true) & np.isfinite(old)
    original_error, _ = _errors(old[comparable], true[comparable])
    silent = not true[np.isfinite(true)].any()
    return _Leaf(error, original_error, max_abs_error, exact_type=False, silent=silent, broken=broken)


def _exact_leaf(result: np.ndarray, original: np.ndarray, reference: np.ndarray) -> _Leaf:
    def share(array: np.ndarray) -> float:
        return float(np.mean(array != reference)) if array.size else 0.0

    distance = np.abs(_float64(result) - _float64(reference)).max(initial=0.0)
    return _Leaf(share(result), share(original), float(distance), exact_type=True, silent=False)


def _broken(name: str, new: np.ndarray, old: np.ndarray, true: np.ndarray) -> str:
    """What no tolerance excuses: values that are not finite, or not infinite, where the original's are."""
    unlike = ~np.isfinite(new) & ~((new == old) | (np.isnan(new) & np.isnan(old)))
    nans, infinities = _counted(unlike & np.isnan(new)), _counted(unlike & np.isinf(new))
    if nans or infinities:
        return f"{name} has {nans} NaN and {infinities} Inf, of {new.size} values, where the original does not"
    # A NaN of the original leaves the value open. An infinity does not: masks and log(0) mean it.
    tamed = _counted(np.isinf(old) & (old == true) & np.isfinite(new))
    if tamed:
        return f"{name} is finite in {tamed} of {new.size} places where the original is infinite"
    return ""


def _errors(values: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """‖values - reference‖ / ‖reference‖ and the largest absolute difference; neither overflows on the way."""
    if not reference.size:
        return 0.0, 0.0
    size, reach = float(np.abs(reference).max()), float(np.abs(values).max())
    scale = max(size, reach)
    if scale == 0:
        return 0.0, 0.0
    # Squares of large values overflow and those of small ones vanish: divide by the largest first.
    difference = values / scale - reference / scale
    distance = float(np.linalg.norm(difference))
    with np.errstate(over="ignore"):
        max_abs_error = float(np.multiply(np.abs(difference).max(), scale))
        if size == 0:
            return float(np.multiply(distance / math.sqrt(reference.size), scale)), max_abs_error
        norm = float(np.linalg.norm(reference / size))
        return float(np.multiply(distance / norm, np.divide(scale, size))), max_abs_error


def _sqnr_db(leaves: list[_Leaf]) -> Quantity:
    """-20 log10 of the largest relative error of any floating-point output."""
    errors = [leaf.error for leaf in leaves if not leaf.exact_type and not leaf.silent]
    if any(leaf.broken for leaf in leaves):
        return Quantity.missing("dB", "there are values that are not finite")
    if not errors:
        return Quantity.missing("dB", "no output is a floating-point number other than zero")
    if max(errors) == 0:
        return Quantity.missing("dB", "exact: no error")
    return Quantity(-20 * math.log10(max(errors)), "dB", method="the output with the largest relative error")


def _top1_agreement(result: list[np.ndarray], original: list[np.ndarray]) -> Quantity:
    """The share of rows whose largest entry is the original's, in the first output that can be logits."""
    for new, old in zip(result, original, strict=True):
        if old.dtype.kind not in "biuc" and old.ndim == 2 and old.shape[0] >= 1 and old.shape[1] >= 2:
            same = _float64(new).argmax(axis=1) == _float64(old).argmax(axis=1)
            return Quantity(
                float(same.mean()), "ratio", method=f"{len(same)} rows of {old.shape[1]} against the original"
            )
    return Quantity.missing("ratio", "no output has two dimensions with two classes or more")


def _float64(array: np.ndarray) -> np.ndarray:
    """As float64, from any number type that numpy can cast (ml_dtypes' bfloat16 too); complex as pairs."""
    if array.dtype.kind == "c":
        return np.ascontiguousarray(array, np.complex128).reshape(-1).view(np.float64)
    return array.astype(np.float64)


def _counted(mask: np.ndarray) -> int:
    return int(np.count_nonzero(mask))
