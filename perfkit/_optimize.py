"""`optimize`, `apply` and `plan`: the way in."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from perfkit import _pipeline, _search, _variant, backends
from perfkit._chain import Chain, chain_of, check
from perfkit._errors import InvalidInputError, UnsupportedError
from perfkit._pipeline import Result
from perfkit._recipe import Recipe, ask, refusal
from perfkit._report import Candidate, Effect
from perfkit._settings import Settings
from perfkit._showing import InTerminal
from perfkit._workload import Workload, calibrated, check_mode
from perfkit.parallel.gathering import gathered

AUTO = "auto"
SEARCH_BUDGET_S, CHAIN_BUDGET_S = 90.0, 6.0
ON_SLOWER = ("warn", "revert", "raise")


def optimize(
    model: Any,
    recipe: str | Recipe | Chain | list = AUTO,
    *,
    example_inputs: Any = None,
    params: Any = None,
    mode: str = "inference",
    loss: Callable[[Any, Any], Any] | None = None,
    targets: Any = None,
    optimizer: Any = None,
    calibration: Iterable | None = None,
    tolerance: float | None = None,
    evaluate: Callable[[Any], float] | None = None,
    max_drop: float | None = None,
    budget_s: float | None = None,
    strict: bool = False,
    on_slower: str = "warn",
    seed: int = 0,
    progress: Callable[[str], Any] | None = None,
) -> Result:
    """Make a model faster, and measure it: original and result interleaved in one run.

    The model passed in is never changed: recipes are applied to a copy.

    Args:
        model: a torch `nn.Module`; a flax nnx module; a flax linen module with `params=variables`; or a JAX function,
            with `params=` if its first argument is a parameter pytree.
        recipe: `"auto"` searches; else names joined by `+` (`"channels_last+bf16+compile(mode='max-autotune')"`),
            a recipe, or a list. `perfkit.recipes()` lists them.
        example_inputs: what the model is run on. A tuple is passed as positional arguments, a dict as keyword arguments
            where its keys are the model's parameters (and linen's `rngs`), anything else as the only argument. Without
            them the recipe is applied and nothing is measured.
        params: parameters of a JAX function, or variables of a linen module.
        mode: "inference" (gradients off, eval mode) or "training".
        loss: training: `loss(outputs, targets)`, a scalar.
        targets: training: tensors or arrays for the example inputs.
        optimizer: training: torch: an optimizer over the model's parameters, or a function of the parameters that makes
            one; JAX: an optax transformation.
        calibration: batches as the model will see them, each as `example_inputs`: the recipes that need ranges of
            activations read them from here (256 batches at most), by default from the example inputs alone.
        tolerance: relative error that the result may add, unitless; by default what the recipes declare. In training:
            distance of the loss curves as a share of the original's range, by default 0.05.
        evaluate: `evaluate(model) -> float`, larger is better, called on original and result. A recipe that compresses
            layers is then held to it, and no longer to the tolerance it declares.
        max_drop: by how much `evaluate` may fall; by default 0.
        budget_s: seconds to spend measuring (a chain, by default 6) or searching ("auto", by default 90).
        strict: a recipe that touches nothing is an error.
        on_slower: "warn", "revert" (return the original) or "raise". With a recipe whose aim is memory, time is the
            price that the report tells, and this is about a result that saves no memory.
        seed: for every run of the model and for the order of the measurements.
        progress: called with a line of text as the work goes on.

    Returns:
        The optimized model and its report; for training also `train_step((inputs, targets)) -> loss`.

    Raises:
        InvalidInputError: something passed cannot be used; nothing was done yet.
        UnsupportedError: a recipe cannot work on this model or machine.
        FidelityError: the result's numbers are too far from the original's.
        NoEffectError: `strict` and a recipe touched nothing.
        SlowerError: `on_slower="raise"` and the result is slower, or saves no memory where that is the aim.

    Example:
        >>> result = perfkit.optimize(model, recipe="bf16+compile", example_inputs=(x,))
        >>> print(result.report.speedup)
        >>> y = result.model(x)
    """
    chain = None if recipe == AUTO else chain_of(recipe)
    settings = _settings(chain, tolerance, evaluate, max_drop, budget_s, strict, on_slower, progress)
    check_mode(mode, loss, targets, optimizer, example_inputs)
    backend = backends.of(model, example_inputs)
    with backend.preserved():
        work = backend.bind(
            model, params, example_inputs, mode=mode, loss=loss, targets=targets, optimizer=optimizer, seed=seed
        )
        work = calibrated(work, calibration)
        if chain is None:
            result = _search.search(work, settings)
        else:
            work = gathered(work, chain)
            check(chain, work)
            result = _pipeline.run(chain, work, settings)
    result = replace(result, calibrated=len(work.calibration))
    if result.report.outcome == "original returned" and mode == "inference":
        return replace(result, model=model)
    return result


def apply(
    model: Any,
    recipe: str | Recipe | Chain | list,
    *,
    example_inputs: Any = None,
    params: Any = None,
    mode: str = "inference",
    loss: Callable[[Any, Any], Any] | None = None,
    targets: Any = None,
    optimizer: Any = None,
    calibration: Iterable | None = None,
    strict: bool = False,
    seed: int = 0,
    progress: Callable[[str], Any] | None = None,
) -> Result:
    """Make of a model what `optimize` made of it elsewhere, and measure nothing.

    For a deployment: `optimize` proves a chain once, and `result.recipe` names it. The same chain on the same model,
    inputs and calibration gives the same model; with example inputs it is called once, so that it is compiled. A recipe
    that touches nothing on this machine is a warning.

    Args:
        recipe: as for `optimize`, but not "auto": `result.recipe` of what was measured.
        model, example_inputs, …: as for `optimize`.

    Returns:
        The optimized model, with a report of what was touched.

    Raises:
        InvalidInputError, UnsupportedError, NoEffectError: as `optimize`. Numbers are compared with nothing.

    Example:
        >>> fast = perfkit.apply(model, "bf16+compile", example_inputs=(x,)).model
    """
    if recipe == AUTO:
        raise InvalidInputError(
            "recipe='auto' measures what it tries: optimize with it once, and apply its result.recipe"
        )
    chain = chain_of(recipe)
    check_mode(mode, loss, targets, optimizer, example_inputs)
    settings = _settings(chain, None, None, None, None, strict, "warn", progress)
    backend = backends.of(model, example_inputs)
    with backend.preserved():
        work = backend.bind(
            model, params, example_inputs, mode=mode, loss=loss, targets=targets, optimizer=optimizer, seed=seed
        )
        work = gathered(calibrated(work, calibration), chain)
        check(chain, work)
        result = _pipeline.run(chain, work, replace(settings, measure=False))
        return replace(result, calibrated=len(work.calibration))


@dataclass(frozen=True)
class PlannedStep:
    """What a recipe would do.

    Args:
        effect: what it would touch and skip; None where it is refused.
        refusal: why it cannot be applied; empty where it can.
        caution: why it can hardly pay on this machine; empty where it may.
    """

    recipe: str
    stage: str
    effect: Effect | None = None
    refusal: str = ""
    caution: str = ""


@dataclass(frozen=True)
class Plan(InTerminal):
    """What `optimize` would do, in order. `candidates` are the chains that recipe="auto" would try or leave out."""

    _terminal = "plan"

    model: str
    framework: str
    mode: str
    device: str
    steps: tuple[PlannedStep, ...] = ()
    candidates: tuple[Candidate, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether no step is refused."""
        return not any(step.refusal for step in self.steps)


def plan(
    model: Any,
    recipe: str | Recipe | Chain | list = AUTO,
    *,
    example_inputs: Any = None,
    params: Any = None,
    mode: str = "inference",
    loss: Callable[[Any, Any], Any] | None = None,
    targets: Any = None,
    optimizer: Any = None,
    calibration: Iterable | None = None,
    seed: int = 0,
) -> Plan:
    """What `optimize` would apply where, in which order, and what it would refuse and why. The model is not changed.

    Timed is only what a recipe must know to say what it does: where to cut a pipeline, how many threads to take.

    Args:
        model, recipe, …: as for `optimize`.

    Raises:
        InvalidInputError: something passed cannot be used. A refused recipe is no error here: the plan says so.

    Example:
        >>> print(perfkit.plan(model, "channels_last+bf16+compile", example_inputs=(x,)))
    """
    chain = None if recipe == AUTO else chain_of(recipe)
    check_mode(mode, loss, targets, optimizer, example_inputs)
    backend = backends.of(model, example_inputs)
    with backend.preserved():
        work = backend.bind(
            model, params, example_inputs, mode=mode, loss=loss, targets=targets, optimizer=optimizer, seed=seed
        )
        work = calibrated(work, calibration)
        about = (backend.model_name(work), work.framework, mode, work.device)
        if chain is None:
            chains, left_out = _search.sensible(work)
            tried = [Candidate(str(chain), "to be tried") for chain in chains]
            return Plan(*about, candidates=(*tried, *left_out))
        return Plan(*about, steps=tuple(_planned(chain, gathered(work, chain))))


def _planned(chain: Chain, work: Workload) -> list[PlannedStep]:
    steps = []
    for recipe in chain:
        reason = refusal(recipe, work)
        effect = None
        if not reason:
            try:
                applied = _variant.apply(Chain((recipe,)), work)
                work, effect = applied.works[0], applied.steps[0].effect
            except UnsupportedError as error:
                reason = str(error)
        caution = ask(recipe, "unprofitable", work.framework, work.device) or ""
        steps.append(PlannedStep(str(recipe), recipe.stage.name, effect, reason or "", caution))
    return steps


def _settings(chain, tolerance, evaluate, max_drop, budget_s, strict, on_slower, progress) -> Settings:
    if budget_s is None:
        budget_s = SEARCH_BUDGET_S if chain is None else CHAIN_BUDGET_S
    for name, value, least in (("budget_s", budget_s, "above 0"), ("tolerance", tolerance, "of at least 0")):
        wrong = (
            not isinstance(value, numbers.Real) or value != value or value < 0 or (value == 0 and name == "budget_s")
        )
        if value is not None and wrong:
            raise InvalidInputError(f"{name}={value!r}: expected a number {least}")
    if on_slower not in ON_SLOWER:
        raise InvalidInputError(f"on_slower={on_slower!r}: expected one of {', '.join(map(repr, ON_SLOWER))}")
    if max_drop is not None and evaluate is None:
        raise InvalidInputError("max_drop is about evaluate(model): pass evaluate= as well")
    for name, value in (("evaluate", evaluate), ("progress", progress)):
        if value is not None and not callable(value):
            raise InvalidInputError(f"{name}={value!r}: expected a function")
    return Settings(
        budget_s=budget_s,
        tolerance=tolerance,
        evaluate=evaluate,
        max_drop=max_drop or 0.0,
        strict=strict,
        on_slower=on_slower,
        progress=progress or str,
    )
