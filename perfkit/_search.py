"""recipe="auto": try the sensible chains, keep the fastest that is faster and close enough, else the original."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

from perfkit._chain import NOTHING, Chain
from perfkit._errors import FidelityError, InvalidInputError, PerfkitError
from perfkit._pipeline import Result, concluded, unchanged
from perfkit._proof import Settings, check_numbers
from perfkit._quantity import Comparison, Verdict
from perfkit._recipe import Recipe, Stage, ask, refusal
from perfkit._recipe_files import names, recipe_class
from perfkit._report import Candidate
from perfkit._variant import Applied, Variant, apply, compared, first_line, observed, ready
from perfkit._workload import Workload

QUICK_BUDGET_S = 1.0
FINAL_SHARE = 0.2
AROUND_SHARE = 0.1
"""Of the budget, for what is set around the best program, where there is such a recipe."""
SIMPLER_WITHIN = 0.98
"""A shorter chain is kept if it reaches this share of the best ratio: the difference is not worth a recipe."""


def search(work: Workload, settings: Settings) -> Result:
    """Try chains within the budget, one at least, re-time the best one afresh, and return it only if it still wins.

    What is set around a program (Stage.RUNTIME) depends on what runs, and is tried once, on the best of them.

    The ratio that a candidate was chosen by is biased upwards (the luckiest of many), so it is never the one reported.

    Raises:
        InvalidInputError: there are no example inputs to try anything on.
    """
    if work.inputs is None:
        raise InvalidInputError("recipe='auto' measures what it tries: pass example_inputs")
    chains, log = sensible(work)
    last = [chain for chain in chains if _around(chain)]
    until_s = settings.budget_s * (1 - FINAL_SHARE - (AROUND_SHARE if last else 0.0))
    settings.progress("running the original")
    original = ready(work, NOTHING)
    began = time.perf_counter()  # kernels that are built once, and the first call, are not the search
    best: list[tuple[Candidate, Applied, Variant]] = []
    left = 0
    for number, chain in enumerate(chains, 1):
        if chain in last:
            chain = best[0][1].chain | chain if best else chain
        elif number > 1 and time.perf_counter() - began > until_s:
            left += 1
            log.append(Candidate(str(chain), "not tried", f"the budget of {settings.budget_s:g} s was used up"))
            continue
        settings.progress(f"trying {chain} ({number} of {len(chains)})")
        candidate, applied, variant = _tried(original, chain, settings)
        log.append(candidate)
        if not candidate.reason:
            best = _ranked([*best, (candidate, applied, variant)])[:2]
    final = replace(settings, budget_s=max(settings.budget_s * FINAL_SHARE, 2.0), on_slower="revert")
    for candidate, applied, variant in best:
        try:
            result = concluded(original, variant, applied, final)
        except FidelityError as error:  # the caller's metric, which the quick trial did not ask
            log = [replace(item, reason=first_line(error)) if item is candidate else item for item in log]
            continue
        if result.report.speedup.verdict == Verdict.FASTER:
            return replace(result, report=replace(result.report, candidates=_told(log, candidate, result)))
        log = [_lost_afresh(item, result) if item is candidate else item for item in log]
    untried = f", and for {left} more the budget of {settings.budget_s:g} s was too short" if left else ""
    tried = len(chains) - left
    explanation = f"none of {tried} chains is faster than the original{untried}; so the original is returned"
    return unchanged(original, tuple(log), explanation, final)


def sensible(work: Workload) -> tuple[list[Chain], list[Candidate]]:
    """The chains worth trying on this model and machine, most promising first, and why other recipes are not.

    One setting at most of each kind (precision, layout, compiler, …), in every combination; at the end, each by itself,
    what is to be tried on the best of those.
    """
    kinds: dict[str, list[Recipe | None]] = {}
    last, left_out = [], []
    for name in names():
        try:
            recipe = recipe_class(name)()
        except Exception as error:  # whatever a file of the user's own may raise; it shall hurt no other
            left_out.append(Candidate(name, "not tried", f"it cannot be made: {type(error).__name__}: {error}"))
            continue
        if reason := refusal(recipe, work):
            left_out.append(Candidate(name, "refused", reason))
        elif recipe.aim != "speed":
            left_out.append(Candidate(name, "not tried", f"its aim is {recipe.aim}: choose it by name"))
        elif (reason := ask(recipe, "unsought", work)) or (
            reason := ask(recipe, "unprofitable", work.framework, work.device)
        ):
            left_out.append(Candidate(name, "not tried", reason))
        elif recipe.stage == Stage.RUNTIME:
            last.append(Chain((recipe,)))
        elif reason := _idle(recipe, work):
            left_out.append(Candidate(name, "not tried", reason))
        else:
            variants = ask(recipe, "variants", work) or (recipe,)
            kinds.setdefault(recipe.provides or name, [None]).extend(variants)
    chains = [Chain(tuple(filter(None, choice))) for choice in itertools.product(*kinds.values())]
    return [*sorted(filter(len, chains), key=_promise), *last], left_out


def _around(chain: Chain) -> bool:
    """Whether it only sets something around a program."""
    return all(recipe.stage == Stage.RUNTIME for recipe in chain)


def _promise(chain: Chain) -> tuple:
    compiled = any(recipe.stage == Stage.COMPILE for recipe in chain)
    return not compiled, -len(chain), str(chain)


def _idle(recipe: Recipe, work: Workload) -> str:
    try:
        step = apply(Chain((recipe,)), work).steps[0]
    except PerfkitError as error:
        return first_line(error)
    return "" if step.effect.touched else "; ".join(step.effect.notes) or "it touches nothing in this model"


def _tried(original: Variant, chain: Chain, settings: Settings) -> tuple[Candidate, Applied | None, Variant | None]:
    began = time.perf_counter()

    def candidate(outcome: str, reason: str, speedup: Comparison | None = None, close=None) -> Candidate:
        return Candidate(str(chain), outcome, reason, speedup, close, time.perf_counter() - began)

    try:
        applied = apply(chain, original.work)
        variant = ready(applied.works[-1], str(chain))
        applied = observed(applied, variant.log)
        idle = [step for step in applied.steps if step.effect.status == "NO_EFFECT"]
        if idle:
            names = " and ".join(step.recipe for step in idle)
            why = "; ".join(note for step in idle for note in step.effect.notes)
            return candidate("lost", f"{names} had no effect" + (f": {why}" if why else "")), None, None
        close, _ = check_numbers(original, variant, chain, settings)
        if not close.ok:
            return candidate("lost", close.reason, close=close), None, None
        speedup = compared(original, variant, ("original", str(chain)), QUICK_BUDGET_S)[2]
    except PerfkitError as error:
        return candidate("failed", first_line(error)), None, None
    if speedup.verdict != Verdict.FASTER:
        return candidate("lost", f"it is not faster: {speedup.verdict}", speedup, close), None, None
    return candidate("lost", "", speedup, close), applied, variant


def _ranked(entries: list) -> list:
    """Fastest first, but a shorter chain before a longer one that is hardly faster."""
    entries = sorted(entries, key=lambda entry: -entry[0].speedup.ratio)
    near = [e for e in entries if e[0].speedup.ratio >= SIMPLER_WITHIN * entries[0][0].speedup.ratio]
    simplest = min(near, key=lambda entry: len(entry[1].chain))
    return [simplest, *(entry for entry in entries if entry is not simplest)]


def _told(log: list[Candidate], winner: Candidate, result: Result) -> tuple[Candidate, ...]:
    report = result.report

    def told(item: Candidate) -> Candidate:
        if item is winner:
            return replace(item, outcome="won", speedup=report.speedup, fidelity=report.fidelity)
        if item.speedup and item.outcome == "lost" and not item.reason:
            faster = item.speedup.ratio > report.speedup.ratio
            why = "no faster than the winner beyond what one more recipe is worth" if faster else "the winner is faster"
            return replace(item, reason=why)
        return item

    return tuple(map(told, log))


def _lost_afresh(item: Candidate, result: Result) -> Candidate:
    return replace(item, speedup=result.report.speedup, reason="timed afresh, it was not faster any more")
