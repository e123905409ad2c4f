"""What a profile says, as words and numbers ready to lay out: the same in the terminal and in HTML.

Nothing here is escaped or shortened: each renderer does that in its own way, at its own edge.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from perfkit._quantity import Latency, Quantity
from perfkit.profiling._memory_data import Memory
from perfkit.profiling._profile import Finding, Profile
from perfkit.profiling._time_data import Time
from perfkit.reporting._format import (
    counted,
    format_flops,
    format_ms,
    format_number,
    format_percent,
    format_quantity,
    listing,
)

UNAVAILABLE = "unavailable"
# Above this the shares say more about the profiler than about the model; below that, too little is accounted for.
HIGH_OVERHEAD, LOW_ATTRIBUTION = 1.5, 0.7
# A profiled step that is so much shorter than those timed before: the machine was not the same.
LOW_OVERHEAD = 0.8


@dataclass(frozen=True)
class Headline:
    """The first thing a reader sees: the time of a step, and what it rests on; or that there is none."""

    figure: str
    about: str
    evidence: str


@dataclass(frozen=True)
class Figure:
    """One of the few numbers that stand beside the headline."""

    label: str
    value: str
    detail: str


@dataclass(frozen=True)
class FindingFacts:
    """One finding in words.

    Args:
        share: "38% of the step, in conv1".
        gain: "1.31× faster, predicted"; where not `predicted`, why there is no prediction.
        command: what to type or to call for it; empty where no recipe addresses it.
    """

    kind: str
    told: str
    share: str
    gain: str
    predicted: bool
    advice: str
    command: str


def per(profile: Profile) -> str:
    """What one repetition is called."""
    return "step" if profile.mode == "training" else "call"


def headline(profile: Profile) -> Headline:
    if profile.time is None:
        return Headline("No time measured", "", "")
    step = profile.time.step
    return Headline(format_ms(step.median_ms), f"per {per(profile)}", evidence(step, per(profile)))


def evidence(step: Latency, name: str) -> str:
    """What a median rests on, with the percentiles that the sample supports."""
    tails = [
        f"{label} {format_quantity(value)}"
        for label, value in (("p90", step.p90_ms), ("p99", step.p99_ms))
        if value.value is not None
    ]
    return ", ".join([f"median of {counted(len(step.samples_ms), name)} without the profiler", *tails])


def alarms(profile: Profile) -> tuple[str, ...]:
    """What a reader must know before believing the rest."""
    found = []
    if profile.outcome != "complete":
        found.append(f"{profile.outcome.capitalize()}: {profile.explanation}")
    if (time := profile.time) is not None:
        if time.recompiles:
            found.append(f"Compiled {counted(time.recompiles, 'time')} more during steps that should need none.")
        if (time.overhead.value or 0) > HIGH_OVERHEAD:
            found.append(
                f"The profiler makes a {per(profile)} {format_number(time.overhead.value)} times as long: "
                "shares lean towards what calls many small operations."
            )
        if 0 < (time.overhead.value or 0) < LOW_OVERHEAD:
            found.append(
                f"A profiled {per(profile)} took {format_number(time.overhead.value)} times as long as those timed "
                "before: the machine was busy with something else then, and the headline is too long."
            )
        if time.attributed.value is not None and time.attributed.value < LOW_ATTRIBUTION:
            share = format_percent(time.attributed.value)
            found.append(f"Only {share} of the profiled {per(profile)} is accounted for by operations.")
    return tuple(found)


def figures(profile: Profile) -> tuple[Figure, ...]:
    """The numbers beside the headline, those that could not be measured with the reason."""
    found = []
    if (time := profile.time) is not None:
        found += [
            _arithmetic(time, per(profile)),
            _figure("utilization", time.utilization, time.utilization.method or ""),
            _busy(time),
            _first_call(time),
        ]
    if (memory := profile.memory) is not None:
        found.append(_figure("peak memory", memory.peak, _largest_categories(memory)))
    if (energy := profile.energy) is not None:
        about = f"{format_quantity(energy.mean_w)} while working; {energy.source}"
        found.append(_figure(f"energy per {per(profile)}", energy.step_j, about))
    return tuple(found)


def _figure(label: str, quantity: Quantity, detail: str) -> Figure:
    if quantity.value is None:
        return Figure(label, UNAVAILABLE, quantity.unavailable)
    return Figure(label, format_quantity(quantity), detail)


def _arithmetic(time: Time, name: str) -> Figure:
    if time.flops.value is None:
        return Figure("arithmetic", UNAVAILABLE, time.flops.unavailable)
    rate = format_flops(time.flops.value / time.step.median_ms * 1e3)
    return Figure(f"arithmetic per {name}", format_flops(time.flops.value), f"{rate}/s reached")


def _busy(time: Time) -> Figure:
    parts = []
    if time.idle_ms:
        parts.append(f"longest gap {format_ms(time.idle_ms[0])}")
    if time.waiting.value is not None:
        parts.append(f"the host waits {format_percent(time.waiting.value)}")
    return _figure("device busy", time.busy, "; ".join(parts) or (time.busy.method or ""))


def _first_call(time: Time) -> Figure:
    compiled = time.compile_s
    about = f"of it compilation {format_quantity(compiled)}" if compiled.value else "nothing was compiled"
    if compiled.value is None:
        about = f"compilation: {compiled.unavailable}"
    return _figure("first call", time.first_call_s, about)


def _largest_categories(memory: Memory) -> str:
    total = sum(memory.by_category.values())
    ranked = sorted(memory.by_category.items(), key=lambda item: -item[1])[:2]
    return ", ".join(f"{name} {format_percent(held / total)}" for name, held in ranked if held and total)


def finding_facts(finding: Finding, profile: Profile) -> FindingFacts:
    whole = f"the {per(profile)}" if finding.resource == "time" else "the peak"
    if finding.predicted.value is None:
        gain = f"gain not predicted: {finding.predicted.unavailable}"
    else:
        better = "faster" if finding.resource == "time" else "smaller peak"
        gain = f"{format_number(finding.predicted.value)}× {better}, predicted"
    where = f", in {listing(finding.where, 4)}" if finding.where else ""
    return FindingFacts(
        _capital(finding.kind, finding),
        _sentence(finding.told, finding),
        f"{format_percent(finding.share)} of {whole}{where}",
        gain,
        finding.predicted.value is not None,
        _sentence(finding.advice, finding),
        command(profile, finding.recipe),
    )


def _sentence(text: str, finding: Finding) -> str:
    return _capital(text, finding) + ("" if text.rstrip().endswith((".", "!", "?")) else ".")


def _capital(text: str, finding: Finding) -> str:
    """`text` with a capital, unless it begins with a name: of a module, a function, an option."""
    first = text.partition(" ")[0].rstrip(",:")
    return text[:1].upper() + text[1:] if first.isalpha() and first not in finding.where else text


def command(profile: Profile, recipe: str) -> str:
    """What addresses a finding: typed, where the model was named on the command line, else called."""
    if not recipe:
        return ""
    if profile.command:
        return f"{profile.command} --recipe {shlex.quote(recipe)}"
    mode = "" if profile.mode == "inference" else f', mode="{profile.mode}"'
    return f'perfkit.optimize(model, recipe="{recipe}"{mode}, …)'
