"""Finding what is fastest for a problem on this device: candidates timed in turns, those that fall behind dropped."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perfkit._errors import InvalidInputError
from perfkit.kernels import _autotune
from perfkit.kernels._autotune import Configuration
from perfkit.kernels._clock import block_ms, calls_per_block

Candidate = tuple[str, Configuration]
"""An implementation's name, and a configuration of it; an empty one for its own rule."""

ROUNDS = 7
BEHIND = 1.25
"""After its first two blocks a candidate is dropped whose quickest is so many times the quickest of all."""


@dataclass
class Trial:
    """What came of one candidate.

    Args:
        block_medians_ms: the median call of each of its blocks, in ms, in the order taken.
        wrong: what `verify` said of its first result.
        refused: why else it was not timed.
    """

    block_medians_ms: list[float] = field(default_factory=list)
    wrong: str = ""
    refused: str = ""

    @property
    def ms(self) -> float:
        """Its score: the median of its blocks, infinite where there are none."""
        return statistics.median(self.block_medians_ms) if self.block_medians_ms else math.inf


def tune(
    op: str,
    problem: Any,
    candidates: Sequence[Candidate],
    run: Callable[[str], Any],
    *,
    budget_s: float,
    verify: Callable[[str, Any], str] | None = None,
    folder: Path | None = None,
    **about: Any,
) -> dict[Candidate, Trial]:
    """Time `candidates` in turns and record the fastest of them for `problem`.

    A round times one block of each that is left, in an order drawn anew, so that drift of the device hits all alike.
    The score is the median of a candidate's blocks. First calls, in which kernels are compiled, are made in the order
    given until half of the budget is spent: what comes after that is not tried, and its trial says so.

    Args:
        op, problem: as `_autotune.record` takes them.
        candidates: the ones thought best first.
        run: one whole call by the implementation of that name, as users make it; the candidate's configuration is in
            force in it.
        budget_s: seconds for all of it.
        verify: what is wrong with the result of an implementation's first call, for people; empty where nothing is.
            What is wrong is dropped.
        folder, about: as `_autotune.record` takes them.

    Returns:
        What came of each.

    Raises:
        InvalidInputError: none could be timed. Nothing is recorded then.

    Example:
        >>> tune("conv2d", problem, [("triton", ()), ("library", ())], lambda name: conv2d(x, w, implementation=name),
        ...      budget_s=10)
    """
    trials = {candidate: Trial() for candidate in candidates}
    began, draw = time.monotonic(), random.Random(0)
    calls: dict[Candidate, int] = {}
    for candidate, trial in trials.items():
        if calls and time.monotonic() - began > budget_s / 2:
            trial.refused = f"half of the budget of {budget_s:g} s was spent before"
            continue
        try:
            with _autotune.assume(op, problem, *candidate):
                result = run(candidate[0])
                trial.wrong = verify(candidate[0], result) if verify else ""
                if not trial.wrong:
                    calls[candidate] = calls_per_block(lambda name=candidate[0]: run(name), problem.device)
        except Exception as error:  # a configuration that a device cannot run is no reason to stop
            trial.refused = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    if not calls:
        told = (
            "; ".join(f"{name}: {trial.wrong or trial.refused}" for (name, _), trial in trials.items())
            or "there was none"
        )
        raise InvalidInputError(f"no candidate for {op} could be timed ({told})")
    alive = list(calls)
    for _ in range(ROUNDS):
        draw.shuffle(alive)
        for candidate in alive:
            with _autotune.assume(op, problem, *candidate):
                run(candidate[0])  # picks anew, and finds the caches as the last one left them
                times = block_ms(lambda name=candidate[0]: run(name), calls[candidate], problem.device)
            trials[candidate].block_medians_ms.append(statistics.median(times))
        best = min(min(trials[candidate].block_medians_ms) for candidate in alive)
        if len(trials[alive[0]].block_medians_ms) > 1:
            alive = [candidate for candidate in alive if min(trials[candidate].block_medians_ms) <= BEHIND * best]
        if time.monotonic() - began > budget_s:
            break
    _autotune.record(op, problem, {candidate: trials[candidate].ms for candidate in calls}, folder, **about)
    return trials
