"""What costs time or memory in a profile, why, and what addresses it: rules, each a pure function of the profile.

What the whole step gains is Amdahl's law: a part with share s that gets f times faster makes the step
1 / (1 - s + s / f) times faster. Where f is from, the prediction says; `python -m bench.advice` holds it against what
the recipe then gave. Nothing is found where nothing is wrong.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable

from perfkit._recipe_files import names
from perfkit.profiling import (
    advice_calls,
    advice_compile,
    advice_kernels,
    advice_memory,
    advice_precision,
    advice_training,
)
from perfkit.profiling._profile import Finding, Profile
from perfkit.profiling.facts import Facts

Rule = Callable[[Facts], Iterable[Finding]]

RULES: tuple[Rule, ...] = (
    *advice_compile.RULES,
    *advice_kernels.RULES,
    *advice_precision.RULES,
    *advice_calls.RULES,
    *advice_training.RULES,
    *advice_memory.RULES,
)

LEAST_GAIN = 1.05
"""A recipe that promises less than 5 % is not worth a sentence."""
DISTURBED = 2.0


def findings(profile: Profile) -> tuple[Finding, ...]:
    """What there is to say of a profile, the costliest first.

    Example:
        >>> [finding.kind for finding in findings(perfkit.profile(model, example_inputs=(x,)))]
        ['convolution, then pool', 'products in float32']
    """
    facts = Facts(profile)
    if profile.time is None or not profile.time.ops:
        found = [finding for rule in advice_memory.RULES for finding in rule(facts)]
    else:
        found = [_disturbed(finding, facts) for rule in RULES for finding in rule(facts)]
    found = [_appliable(finding, facts) for finding in found]
    worth = [finding for finding in found if _worth(finding) and not _has(facts, finding.recipe)]
    return tuple(sorted(worth, key=lambda finding: _cost(finding, facts), reverse=True))


def names_in(recipe: str) -> set[str]:
    """The recipes of a chain, by name."""
    return {re.split(r"[(]", part.strip())[0] for part in re.split(r"\+(?![^(]*\))", recipe) if part.strip()}


def _appliable(finding: Finding, facts: Facts) -> Finding:
    """The finding without a recipe that cannot work here; its advice stays."""
    if finding.recipe and facts.read_at:
        advice = f"{finding.advice}; recipes need a model in which no value is read in Python"
        return dataclasses.replace(finding, recipe="", advice=advice)
    return finding if names_in(finding.recipe) <= set(names()) else dataclasses.replace(finding, recipe="")


def _disturbed(finding: Finding, facts: Facts) -> Finding:
    """Says of a prediction where the profiled steps were much longer than those that nobody watched."""
    overhead = facts.profile.time.overhead.value or 1.0
    if overhead < DISTURBED or finding.resource != "time" or finding.predicted.value is None:
        return finding
    method = f"{finding.predicted.method}; uncertain: the profiled steps took {overhead:.1f} times longer than others"
    return dataclasses.replace(finding, predicted=dataclasses.replace(finding.predicted, method=method))


def _worth(finding: Finding) -> bool:
    """What is wrong in the caller's own code is told however little it costs; a recipe has to pay."""
    return not finding.recipe or finding.predicted.value is None or finding.predicted.value >= LEAST_GAIN


def _has(facts: Facts, recipe: str) -> bool:
    """Whether the profile already is of a model with all of it applied."""
    return bool(recipe) and names_in(recipe) <= facts.applied


def _cost(finding: Finding, facts: Facts) -> tuple[float, float]:
    """The part of the step that is lost; memory counts the more, the more of the machine's the peak takes."""
    gain = finding.predicted.value
    lost = finding.share if gain is None else 1 - 1 / gain
    return lost * (1.0 if finding.resource == "time" else facts.memory_pressure), finding.share
