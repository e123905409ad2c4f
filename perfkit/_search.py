"""recipe="auto": try the sensible chains, keep the fastest that is faster and close enough, else the original."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, replace
from typing import Any

from perfkit._chain import NOTHING, Chain
from perfkit._errors import FidelityError, InvalidInputError, PerfkitError, first_line
from perfkit._numbers import check_numbers
from perfkit._pipeline import Result, concluded, unchanged
from perfkit._quantity import Comparison, Verdict, rounded
from perfkit._recipe import Recipe, Stage, ask, refusal
from perfkit._recipe_files import names, recipe_class
from perfkit._report import Candidate
from perfkit._search_order import SIMPLER_WITHIN, Agenda
from perfkit._settings import Settings
from perfkit._variant import Applied, Variant, apply, compared, glanced, observed, ready
from perfkit._workload import Workload

QUICK_BUDGET_S = 1.0
FINAL_SHARE = 0.2
AROUND_SHARE = 0.1
"""Of the budget, for what is set around the best program, where there is such a recipe."""
KEPT = 2
"""Of those that were faster, the best so many stay as they were made; another is made again if it is its turn."""

BEHIND = 1.5
"""A chain whose quickest call takes so many times that of the best so far is not timed.

Both were called in turns, so what is left between two quickest calls is far less than this.
"""


def search(work: Workload, settings: Settings) -> Result:
    """Try chains within the budget, one at least, re-time the best one afresh, and return it only if it still wins.

    Each is timed in turns with the best so far, which is quicker than the original and, unlike two ratios to that, was
    under the same conditions; what keeps up with it is timed against the original too.

    What is set around a program (Stage.RUNTIME) depends on what runs, and is tried once, on the best of them.

    The ratio that a candidate was chosen by is biased upwards (the luckiest of many), so it is never the one reported.

    Raises:
        InvalidInputError: there are no example inputs to try anything on.
    """
    if work.inputs is None:
        raise InvalidInputError("recipe='auto' measures what it tries: pass example_inputs")
    chains, log = sensible(work)
    settings.progress("running the original")
    trials = _Trials(ready(work, NOTHING), settings, len(chains))
    around = list(filter(_around, chains))
    agenda = Agenda(chain for chain in chains if chain not in around)
    share = 1 - FINAL_SHARE - (AROUND_SHARE if around else 0.0)
    began = time.perf_counter()  # kernels that are built once, and the first call, are not the search
    while agenda.waiting and not (trials.log and time.perf_counter() - began > settings.budget_s * share):
        chain = agenda.next()
        tried = trials.run(chain)
        agenda.tried(chain, tried.candidate, tried.strength)
    for chain in around:
        trials.run(trials.ranked[0].chain | chain if trials.ranked else chain)
    late = f"the budget of {settings.budget_s:g} s was used up"
    log = [*log, *trials.log, *(Candidate(str(chain), "not tried", late) for chain in agenda.waiting)]
    return _best(trials, log, len(agenda.waiting))


@dataclass(frozen=True)
class _Tried:
    """A chain that was tried.

    Args:
        strength: about its ratio to the original, known through the best so far; None where nothing was timed.
        made: what it was made into, if it may be the one; kept for the best of them.
    """

    chain: Chain
    candidate: Candidate
    strength: float | None = None
    made: tuple[Applied, Variant] | None = None


class _Trials:
    """The chains that were tried.

    Args:
        log: what became of each, in order.
        ranked: those that were faster, best first.
    """

    def __init__(self, original: Variant, settings: Settings, number: int):
        self.original, self.settings, self.number = original, settings, number
        self.log: list[Candidate] = []
        self.ranked: list[_Tried] = []

    def run(self, chain: Chain) -> _Tried:
        self.settings.progress(f"trying {chain} ({len(self.log) + 1} of {self.number})")
        tried = _tried(self.original, chain, self.settings, self.ranked[0] if self.ranked else None)
        self.log.append(tried.candidate)
        if tried.made:
            ranked = _ranked([*self.ranked, tried])
            if ranked[0].made is None:  # a simpler one, up from below, since what was simpler still fell behind
                ranked[0] = replace(ranked[0], made=_made(ranked[0].chain, self.original.work))
            self.ranked = [*ranked[:KEPT], *(replace(each, made=None) for each in ranked[KEPT:])]
        return tried


def _best(trials: _Trials, log: list[Candidate], left: int) -> Result:
    """The first of those that were faster that still is, timed afresh, and holds; else the original."""
    budget_s = trials.settings.budget_s
    final = replace(trials.settings, budget_s=max(budget_s * FINAL_SHARE, 2.0), on_slower="revert")
    for chain, candidate, made in ((each.chain, each.candidate, each.made) for each in trials.ranked):
        try:
            applied, variant = made or _made(chain, trials.original.work)
            close, _ = check_numbers(trials.original, variant, chain, final)
            if not close.ok:
                log = _noted(log, candidate, reason=close.reason, fidelity=close)
                continue
            result = concluded(trials.original, variant, applied, final)
        except FidelityError as error:  # the caller's metric, which the quick trial did not ask
            log = _noted(log, candidate, reason=first_line(error))
            continue
        if result.report.speedup.verdict == Verdict.FASTER:
            return replace(result, report=replace(result.report, candidates=_told(log, candidate, result)))
        reason = "timed afresh, it was not faster any more"
        log = _noted(log, candidate, reason=reason, speedup=result.report.speedup)
    untried = f", and for {left} more the budget of {budget_s:g} s was too short" if left else ""
    explanation = f"none of {len(trials.log)} chains is faster than the original{untried}; so the original is returned"
    return unchanged(trials.original, tuple(log), explanation, final)


def sensible(work: Workload) -> tuple[list[Chain], list[Candidate]]:
    """The chains worth trying on this model and machine, shortest first, and why other recipes are not.

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
    return [*sorted(filter(len, chains), key=lambda chain: (len(chain), str(chain))), *last], left_out


def _around(chain: Chain) -> bool:
    """Whether it only sets something around a program."""
    return all(recipe.stage == Stage.RUNTIME for recipe in chain)


def _idle(recipe: Recipe, work: Workload) -> str:
    try:
        step = apply(Chain((recipe,)), work).steps[0]
    except PerfkitError as error:
        return first_line(error)
    return "" if step.effect.touched else "; ".join(step.effect.notes) or "it touches nothing in this model"


def _made(chain: Chain, work: Workload) -> tuple[Applied, Variant]:
    applied = apply(chain, work)
    variant = ready(applied.works[-1], str(chain))
    return observed(applied, variant.log), variant


def _tried(original: Variant, chain: Chain, settings: Settings, best: _Tried | None) -> _Tried:
    """What became of a chain, beside the best so far if there is one."""
    began, gave_up = time.perf_counter(), ""

    def lost(reason: str, speedup: Comparison | None = None, close=None, outcome="lost", **known) -> _Tried:
        reason, seconds = "; ".join(filter(None, (reason, gave_up))), time.perf_counter() - began
        return _Tried(chain, Candidate(str(chain), outcome, reason, speedup, close, seconds), **known)

    try:
        made = applied, variant = _made(chain, original.work)
        gave_up = variant.log.gave_up
        idle = [step for step in applied.steps if step.effect.status == "NO_EFFECT"]
        if idle:
            names = " and ".join(step.recipe for step in idle)
            why = "; ".join(note for step in idle for note in step.effect.notes)
            return lost(f"{names} had no effect" + (f": {why}" if why else ""))
        if best and (behind := glanced(best.made[1], variant)) > BEHIND:
            reason = f"not timed: its quickest call takes {behind:.1f} times that of {best.chain}"
            return lost(reason, strength=best.strength / behind)
        strength = None
        if best:
            direct = compared(best.made[1], variant, (str(best.chain), str(chain)), QUICK_BUDGET_S)[2]
            strength = best.strength * direct.ratio
            if direct.ratio < SIMPLER_WITHIN:
                low, middle, high = map(rounded, (direct.low, direct.ratio, direct.high))
                reason = f"{middle}× [{low}, {high}] the speed of {best.chain}"
                return lost(reason, strength=strength, made=made if strength > 1 else None)
        close = None
        if not original.work.trains:  # there it takes many steps, and is asked of the best at the end
            close, _ = check_numbers(original, variant, chain, settings)
            if not close.ok:
                return lost(close.reason, close=close)
        speedup = compared(original, variant, ("original", str(chain)), QUICK_BUDGET_S)[2]
    except PerfkitError as error:
        return lost(first_line(error), outcome="failed")
    strength = strength or speedup.ratio
    if speedup.verdict != Verdict.FASTER:
        return lost(f"it is not faster: {speedup.verdict}", speedup, close, strength=strength)
    return lost("", speedup, close, strength=strength, made=made)


def _ranked(entries: list[_Tried]) -> list[_Tried]:
    """Fastest first, but a shorter chain before a longer one that is hardly faster."""
    entries = sorted(entries, key=lambda entry: entry.strength, reverse=True)
    near = [entry for entry in entries if entry.strength >= SIMPLER_WITHIN * entries[0].strength]
    simplest = min(near, key=lambda entry: len(entry.chain))
    return [simplest, *(entry for entry in entries if entry is not simplest)]


def _told(log: list[Candidate], winner: Candidate, result: Result) -> tuple[Candidate, ...]:
    """The log where it is known who won."""
    report = result.report
    for item in log:
        if item.outcome == "lost" and not item.reason and item is not winner:
            log = _noted(log, item, reason="the winner is faster, or as fast with fewer recipes")
    return tuple(_noted(log, winner, outcome="won", reason="", speedup=report.speedup, fidelity=report.fidelity))


def _noted(log: list[Candidate], candidate: Candidate, **changes: Any) -> list[Candidate]:
    return [replace(item, **changes) if item is candidate else item for item in log]
