"""The pipeline: apply a chain to copies, prove the result, decide. Each stage takes the last one's value."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from perfkit import _proof
from perfkit._chain import NOTHING, Chain
from perfkit._errors import FidelityError, NoEffectError, PerfkitWarning, SlowerError
from perfkit._numbers import check_numbers
from perfkit._repair import Missed, repairable, repaired
from perfkit._report import Candidate, Effect, Report
from perfkit._settings import Settings
from perfkit._variant import Applied, Variant, apply, idle, observed, ready
from perfkit._workload import Workload
from perfkit.backends.adapter import Finished

UNASKED = "perfkit.apply and perfkit.load measure nothing"


@dataclass(frozen=True)
class Result:
    """What `optimize` returns; calling it calls the model.

    Args:
        model: takes the place of the original: a true `nn.Module`, flax module, or function of the same signature.
        report: what was measured and decided.
        train_step: in training, `train_step((inputs, targets)) -> loss`; else None.
        recipe: what `perfkit.apply` makes the same of the same model with: a chain, or "nothing" for the original.
        calibrated: how many batches of calibration data it was made with.
    """

    model: Any
    report: Report
    finished: Finished
    calibrated: int = 0

    @property
    def recipe(self) -> str:
        return self.report.recipe if self.report.outcome == "optimized" else NOTHING

    @property
    def train_step(self) -> Callable[[Any], Any] | None:
        return self.finished.train_step

    @property
    def optimizer(self) -> Any:
        """PyTorch, training: what `train_step` updates with, for schedulers and checkpoints; None elsewhere."""
        return getattr(self.finished.trainer, "optimizer", None)

    @property
    def params(self) -> Any:
        """The parameters that `model` takes as its first argument (JAX functions and linen); None elsewhere."""
        return self.finished.params() if self.finished.params else None

    def settle(self) -> None:
        """Bring the processes' models together, where a recipe lets them differ for some steps; else do nothing.

        Every process calls it: before the model is evaluated or saved in the middle of such steps.
        """
        if self.finished.rounds is not None:
            self.finished.rounds.settle()

    def save(
        self,
        path: str | Path,
        model: Any,
        *,
        example_inputs: Any,
        params: Any = None,
        calibration: Iterable | None = None,
        seed: int = 0,
    ) -> Path:
        """Write what `perfkit.load` makes this model of again, into one file without pickle.

        It holds the original's weights, the recipe, the inputs and calibration data, and the report; and what the
        result computes on the inputs, which a loaded one is checked against: at once here, before the file gets its
        name. So the file is as large as the original's weights and that data, also where the recipe makes them smaller.

        Args:
            path: the file; one that is there is replaced.
            model, example_inputs, params, calibration, seed: as they were passed to `optimize`.

        Returns:
            The path.

        Raises:
            InvalidInputError: what was passed is not what was optimized, or no file can hold it.

        Example:
            >>> result.save("model.perfkit", model, example_inputs=(x,))
        """
        from perfkit._artifact import save

        given = {"example_inputs": example_inputs, "params": params, "calibration": calibration, "seed": seed}
        return save(self, path, model, **given)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.finished.call(*args, **kwargs)


def run(chain: Chain, work: Workload, settings: Settings) -> Result:
    """Apply, check, measure and report one chain on a workload that holds a copy of the caller's model."""
    if settings.measure:
        settings.progress("running the original")
        original = ready(work, NOTHING)
    else:
        original = idle(work, work.backend.finish(work), UNASKED)
    settings.progress(f"applying {chain}")
    applied = apply(chain, work)
    result = ready(applied.works[-1] if applied.works else work.backend.copy(work), str(chain))
    applied = observed(applied, result.log)
    if not settings.measure:
        result = replace(result, call=None, unmeasured=UNASKED)
    if idlers := _without_effect(applied):
        if settings.strict:
            raise NoEffectError(f"strict=True, and these touched nothing: {idlers}")
        if not settings.measure:
            warnings.warn(f"these touched nothing: {idlers}", PerfkitWarning, stacklevel=4)
    if not work.trains and original.measurable and repairable(applied):
        missed = _judge(original, settings)
        if (miss := missed(result, chain)).by > 0:
            repair = repaired(work, applied, missed, settings.progress)
            if repair.applied is None:
                return _irreparable(original, chain, f"{chain}: {miss.told}; {repair.explanation}", settings)
            applied, result = repair.applied, repair.variant
    return concluded(original, result, applied, settings)


def concluded(original: Variant, result: Variant, applied: Applied, settings: Settings) -> Result:
    """Prove one result against the original, and hand it out or refuse it.

    Raises:
        FidelityError: outputs or losses are too far off, or the caller's metric dropped too much.
        SlowerError: slower, or a recipe for memory that saves none, and `on_slower="raise"`.
    """
    report = _proof.prove(original, result, applied, settings)
    if report.fidelity and not report.fidelity.ok:
        known = "; ".join(why for step in report.steps for why in step.effect.apart)
        raise FidelityError(
            f"{report.recipe} on {report.model}: {report.fidelity.reason}{f' ({known})' if known else ''}. The report "
            "is this error's `.report`; a larger `tolerance=` accepts it",
            report,
        )
    if report.metric and not report.metric.ok:
        raise FidelityError(
            f"{report.recipe} on {report.model}: evaluate() fell from {report.metric.before:g} to "
            f"{report.metric.after:g}, which is more than max_drop={report.metric.max_drop:g}",
            report,
        )
    if message := report.failing:
        if settings.on_slower == "raise":
            raise SlowerError(message, report)
        if settings.on_slower == "revert":
            report = replace(report, outcome="original returned", explanation=f"{message}; so the original is returned")
            return Result(original.finished.model, report, original.finished)
        warnings.warn(message, PerfkitWarning, stacklevel=4)
    return Result(result.finished.model, report, result.finished)


def _judge(original: Variant, settings: Settings) -> Callable[[Variant, Chain], Missed]:
    """A function that says by how much a variant misses the caller's metric, or else the fidelity asked of it."""
    before = None if settings.evaluate is None else _proof.evaluated(original, settings)

    def missed(variant: Variant, chain: Chain) -> Missed:
        close, _ = check_numbers(original, variant, chain, settings)
        if before is None or not close.ok:
            by = close.relative_error - close.limit
            return Missed(by if close.ok or by > 0 else math.inf, f"the relative error is {close.relative_error:.3g}")
        drop = before - _proof.evaluated(variant, settings)
        return Missed(drop - settings.max_drop, f"evaluate() falls by {drop:.3g}")

    return missed


def _irreparable(original: Variant, chain: Chain, explanation: str, settings: Settings) -> Result:
    result = unchanged(original, (), f"{explanation}; so the original is returned", settings)
    report = replace(result.report, recipe=str(chain))
    if settings.strict:
        raise FidelityError(f"strict=True, and {explanation}", report)
    return replace(result, report=report)


def unchanged(original: Variant, candidates: tuple[Candidate, ...], explanation: str, settings: Settings) -> Result:
    """The original as the result, where nothing that was tried is better."""
    report = _proof.identity(original, settings)
    report = replace(report, outcome="original returned", explanation=explanation, candidates=candidates)
    return Result(original.finished.model, report, original.finished)


def _without_effect(applied: Applied) -> str:
    """The steps that touched nothing, with the reasons."""
    found = [step for step in applied.steps if step.effect.status == "NO_EFFECT"]
    return "; ".join(f"{step.recipe} ({'; '.join(_reasons(step.effect)) or 'no reason known'})" for step in found)


def _reasons(effect: Effect) -> list[str]:
    return [*effect.notes, *(f"{item.name}: {item.reason}" for item in effect.skipped)]
