"""Two profiles laid side by side: which operations and modules came, went and changed, and what that gave.

The times of operations are scaled to the step as it is without the profiler, so that they and what is outside of all
operations add up to the difference between the two steps.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from perfkit._errors import InvalidInputError
from perfkit._showing import AsJson, AsPage, InTerminal
from perfkit.measure.statistics import order_statistic_interval
from perfkit.profiling import _reading, _views
from perfkit.profiling._align import Change, Part, aligned, ranked, status
from perfkit.profiling._memory_data import Memory
from perfkit.profiling._profile import Profile
from perfkit.profiling._time_data import Module

SCHEMA_VERSION = 1
CONFIDENCE = 0.99


@dataclass(frozen=True)
class Side:
    """One of the two profiles."""

    model: str
    framework: str
    mode: str
    device: str
    inputs: str
    fingerprint: str
    created: str
    step_ms: float
    samples: int
    peak_bytes: float | None


@dataclass(frozen=True)
class ProfileDiff(AsJson, InTerminal, AsPage):
    """What changed between two profiles.

    Args:
        ratio: step time before / after, so 2.0 means twice as fast.
        low, high: interval of the ratio, if the machine was the same and in the same state both times.
        ops: every operation, the largest effect on time first.
        outside: what no operation accounts for; `ops` and this add up to the difference of the steps.
        modules: every module, the largest effect of its own operations first; these are among `ops` already.
        categories: memory at the peak by category; adds up to the difference of the peaks. Empty where one is unknown.
        cautions: why the two may not be comparable.
    """

    _terminal, _page = "profile_diff", "profile_diff_html"

    before: Side
    after: Side
    ratio: float
    low: float
    high: float
    confidence: float
    ops: tuple[Change, ...]
    outside: Change
    modules: tuple[Change, ...]
    categories: tuple[Change, ...]
    cautions: tuple[str, ...] = ()
    schema_version: int = field(default=SCHEMA_VERSION)

    @property
    def saved_ms(self) -> float:
        return self.before.step_ms - self.after.step_ms


def diff(before: Profile | Mapping | str | Path, after: Profile | Mapping | str | Path) -> ProfileDiff:
    """Align two profiles operation by operation and say what changed.

    Args:
        before, after: profiles, or what `to_dict` returned, or the path of what `to_json` wrote.

    Raises:
        InvalidInputError: one is no profile, or has no time to compare.

    Example:
        >>> print(diff("before.json", "after.json"))
    """
    old, new = _profile(before, "before"), _profile(after, "after")
    ops = ranked(aligned(_ops(old), _ops(new)))
    outside = [
        profile.time.step.median_ms - math.fsum(getattr(op, f"{side}_ms") for op in ops)
        for profile, side in ((old, "before"), (new, "after"))
    ]
    low, high = _interval(old, new)
    return ProfileDiff(
        before=_side(old),
        after=_side(new),
        ratio=old.time.step.median_ms / new.time.step.median_ms,
        low=low,
        high=high,
        confidence=CONFIDENCE,
        ops=ops,
        outside=Change("outside of operations", "", "", "", status(*outside), *outside),
        modules=ranked(aligned(_modules(old), _modules(new))),
        categories=_categories(old.memory, new.memory),
        cautions=_cautions(old, new),
    )


def _profile(given: Profile | Mapping | str | Path, name: str) -> Profile:
    if isinstance(given, Mapping):
        given = _reading.from_dict(given, name)
    elif isinstance(given, (str, Path)):
        name, given = str(given), _reading.from_json(given)
    if not isinstance(given, Profile):
        raise InvalidInputError(f"{name} is a {type(given).__name__}: expected a Profile, its dict, or the path of one")
    if given.time is None:
        raise InvalidInputError(f"{name} has no times to compare: it is {given.outcome}: {given.explanation}")
    return given


def _ops(profile: Profile) -> list[Part]:
    """The operations, those alike together, in ms of a step without the profiler."""
    grouped: dict[tuple, list] = defaultdict(list)
    for op in _views.hottest(profile.time):
        grouped[op.name, op.module, op.phase].append(op)
    scale = profile.time.step.median_ms
    return [
        Part(
            name,
            module,
            phase,
            ms=math.fsum(_views.share(op.self_ms, profile.time) * scale for op in ops),
            bytes=sum(op.moved_bytes for op in ops),
            calls=sum(op.calls for op in ops),
            flops=sum(op.flops for op in ops),
        )
        for (name, module, phase), ops in grouped.items()
    ]


def _modules(profile: Profile) -> list[Part]:
    trains, scale = profile.mode == "training", profile.time.step.median_ms

    def part(module: Module) -> Part:
        kept = module.saved_bytes if trains else module.output_bytes
        ms = _views.share(module.self_ms, profile.time) * scale
        return Part(module.kind, module.path, "", ms, kept, module.calls, module.flops)

    return [part(module) for module in profile.time.modules]


def _categories(before: Memory | None, after: Memory | None) -> tuple[Change, ...]:
    if before is None or after is None:
        return ()
    names = [*before.by_category, *(name for name in after.by_category if name not in before.by_category)]
    pairs = [(name, before.by_category.get(name, 0.0), after.by_category.get(name, 0.0)) for name in names]
    found = [Change(name, "", "", "", status(*held), 0.0, 0.0, *held) for name, *held in pairs if any(held)]
    return tuple(sorted(found, key=lambda change: (-abs(change.saved_bytes), change.name)))


def _side(profile: Profile) -> Side:
    return Side(
        profile.model,
        profile.framework,
        profile.mode,
        profile.device,
        profile.inputs,
        profile.environment.fingerprint,
        profile.created,
        profile.time.step.median_ms,
        len(profile.time.step.samples_ms),
        profile.memory.peak.value if profile.memory else None,
    )


def _interval(old: Profile, new: Profile) -> tuple[float, float]:
    """Interval of the ratio of the medians: each median within its own, at half the error each."""
    sides = [
        order_statistic_interval(np.log(profile.time.step.samples_ms), 1 - (1 - CONFIDENCE) / 2)
        for profile in (old, new)
    ]
    (old_low, old_high), (new_low, new_high) = sides
    return math.exp(old_low - new_high), math.exp(old_high - new_low)


def _cautions(old: Profile, new: Profile) -> tuple[str, ...]:
    found = []
    if old.environment.fingerprint != new.environment.fingerprint:
        found.append("different machines or libraries (the fingerprints differ): times say little about the model")
    for name in ("model", "framework", "mode", "device", "inputs"):
        one, other = getattr(old, name), getattr(new, name)
        if one != other:
            found.append(f"different {name}: {one} before, {other} after")
    for name, profile in (("before", old), ("after", new)):
        if profile.outcome != "complete":
            found.append(f"the profile {name} is {profile.outcome}: {profile.explanation}")
    if _views.on_device(old.time) != _views.on_device(new.time):
        found.append("one profile is of a device's kernels, the other of the host's operations")
    return tuple(found)
