"""A workload with a chain applied to it, in usable form and called once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from perfkit._chain import NOTHING, Chain
from perfkit._errors import InvalidInputError, UnsupportedError, first_line
from perfkit._numbers import Numbers
from perfkit._quantity import Comparison, Latency, Quantity
from perfkit._recipe import ask
from perfkit._report import Step
from perfkit._workload import Workload
from perfkit.backends.adapter import CompileLog, Finished
from perfkit.measure import timing
from perfkit.measure.calls import first_call, quickest_s, warm_up

GLANCES = 2
NO_INPUTS = "no example_inputs were given to run the model on"


@dataclass(frozen=True)
class Variant:
    """A workload in usable form, called once.

    Args:
        call: what is measured; None where nothing is.
        unmeasured: why nothing is; empty where there is a `call`.
    """

    work: Workload
    finished: Finished
    call: Callable[[], Any] | None
    first_call_s: Quantity
    log: CompileLog
    unmeasured: str = ""

    @property
    def measurable(self) -> bool:
        return self.call is not None

    @cached_property
    def numbers(self) -> Numbers:
        return Numbers(self.work, self.finished)


@dataclass(frozen=True)
class Applied:
    """A chain applied: the workload after each step, the last one being the result."""

    chain: Chain
    works: tuple[Workload, ...]
    steps: tuple[Step, ...]

    @property
    def seconds(self) -> float:
        return sum(step.apply_s for step in self.steps)


def apply(chain: Chain, work: Workload) -> Applied:
    """Apply each step to a copy of the last one's result.

    Raises:
        UnsupportedError: a step cannot be applied, or touched nothing under a recipe that must.
    """
    works, steps = [], []
    for recipe in chain:
        start = time.perf_counter()
        try:
            work, effect = getattr(recipe, work.framework)(work.backend.copy(work))
        except (InvalidInputError, UnsupportedError):
            raise
        except Exception as error:
            raise UnsupportedError(
                f"recipe {str(recipe)!r} failed on {work.backend.model_name(work)}: {type(error).__name__}: {error}"
            ) from error
        if not (effect.touched or effect.skipped or effect.notes):
            effect = replace(effect, notes=("it found nothing in this model that it works on",))
        works.append(work)
        steps.append(Step(str(recipe), recipe.stage.name, effect, time.perf_counter() - start))
    return Applied(chain, tuple(works), tuple(steps))


def ready(work: Workload, name: str) -> Variant:
    """Bring a workload into usable form and make its first call.

    Raises:
        UnsupportedError: it does not run.
    """
    backend = work.backend
    try:
        finished = backend.finish(work)
        if work.inputs is None:
            return idle(work, finished, NO_INPUTS)
        call = backend.caller(work, finished)
        with backend.watching_compiles() as log, finished.keeping_state():
            backend.seed(work.seed)
            seconds, _ = first_call(call)
            return Variant(work, finished, call, Quantity(seconds, "s"), log())
    except UnsupportedError:
        raise
    except Exception as error:
        model, does = backend.model_name(work), "train" if work.trains else "run"
        told = f"{model} itself does not {does}" if name == NOTHING else None
        told = told or f"{name} was applied to {model}, but the result does not {does}"
        raise UnsupportedError(f"{told}: {type(error).__name__}: {first_line(error)}") from error


def idle(work: Workload, finished: Finished, reason: str) -> Variant:
    """A workload in usable form that nothing is measured on."""
    return Variant(work, finished, None, Quantity.missing("s", reason), CompileLog(), reason)


def observed(applied: Applied, log: CompileLog) -> Applied:
    """The steps' effects, completed from what was compiled on the first call."""

    def complete(recipe, step):
        effect = ask(recipe, "observed", step.effect, log)
        return step if effect is None else replace(step, effect=effect)

    if not applied.works or applied.works[-1].inputs is None:
        return applied
    return replace(applied, steps=tuple(map(complete, applied.chain, applied.steps)))


def compared(
    baseline: Variant, variant: Variant, names: tuple[str, str], budget_s: float
) -> tuple[Latency, Latency, Comparison]:
    """Time two variants interleaved, and leave both in the state they are in."""
    steps = math.lcm(baseline.work.period, variant.work.period)
    with baseline.finished.keeping_state(), variant.finished.keeping_state():
        return timing.paired(
            _repeated(baseline.call, steps // baseline.work.period),
            _repeated(variant.call, steps // variant.work.period),
            baseline=names[0],
            variant_name=names[1],
            budget_s=budget_s,
            seed=baseline.work.seed,
            world=baseline.work.world,
            steps=steps,
        )


def glanced(best: Variant, variant: Variant) -> float:
    """How many times as long as a step of `best` one of the variant takes, by the quickest of a few calls in turns."""
    pair, world = (best, variant), variant.work.world
    with best.finished.keeping_state(), variant.finished.keeping_state():
        for each in pair:
            warm_up(each.call, budget_s=0.0, world=world)
        turns = [[quickest_s(each.call, world) / each.work.period for each in pair] for _ in range(GLANCES)]
    quickest, others = map(min, zip(*turns, strict=True))
    return world.agree(others / quickest)


def _repeated(call: Callable[[], Any], times: int) -> Callable[[], Any]:
    """The call, made so often in one."""
    if times == 1:
        return call

    def repeated():
        for _ in range(times):
            call()

    return repeated
