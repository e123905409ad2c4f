"""The proof: are the numbers close enough, what does each side cost, which step gave what."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import perfkit
from perfkit._chain import Chain
from perfkit._errors import UnsupportedError, first_line
from perfkit._measurement import measurement, parallel, payback
from perfkit._numbers import check_numbers
from perfkit._quantity import Comparison, Verdict, rounded
from perfkit._report import Metric, Report, Step
from perfkit._settings import Settings
from perfkit._variant import Applied, Variant, compared, ready
from perfkit.backends.adapter import CompileLog
from perfkit.measure.environment import environment
from perfkit.measure.timing import CONTENDED


def prove(original: Variant, result: Variant, applied: Applied, settings: Settings) -> Report:
    """Compare the outputs, then time original and result interleaved, and report both."""
    work, chain = original.work, applied.chain
    if not original.measurable:
        return _assembled(
            original,
            result,
            applied,
            not_measured=original.unmeasured,
            steps=applied.steps,
        )
    settings.progress("comparing the outputs")
    close, curves = check_numbers(original, result, chain, settings)
    settings.progress(f"timing {chain} against the original")
    share = 0.5 if len(chain) > 1 else 0.75
    with work.backend.watching_compiles() as log:
        *latencies, speedup = compared(original, result, ("original", str(chain)), settings.budget_s * share)
        notes = _recompiled(log())
    against_compiled, more = _against_compiled(original, result, str(chain), settings)
    return _assembled(
        original,
        result,
        applied,
        latencies=latencies,
        speedup=speedup,
        fidelity=close,
        losses=curves,
        metric=_evaluated(original, result, settings),
        steps=_attributed(original, applied, speedup, settings),
        against_compiled=against_compiled,
        notes=(*notes, *more),
    )


def identity(original: Variant, settings: Settings) -> Report:
    """The report on the original as its own result: equal by identity, so nothing stands behind its ratio of 1."""
    settings.progress("measuring the original")
    latency, _, itself = compared(original, original, ("original", "original"), settings.budget_s)
    speedup = Comparison("original", "original", 1.0, 1.0, 1.0, 1.0, Verdict.SAME, 0, 0.0, itself.waited)
    report = _assembled(original, original, Applied(Chain(()), (), ()), latencies=(latency, latency), speedup=speedup)
    return replace(
        report, after=report.before, recipe="auto", fidelity=check_numbers(original, original, Chain(()), settings)[0]
    )


def _evaluated(original: Variant, result: Variant, settings: Settings) -> Metric | None:
    if settings.evaluate is None:
        return None
    settings.progress("evaluating")
    before, after = (evaluated(variant, settings) for variant in (original, result))
    return Metric(before, after, settings.max_drop, ok=before - after <= settings.max_drop)


def evaluated(variant: Variant, settings: Settings) -> float:
    """The caller's metric of a variant, which is left in the state it is in."""
    with variant.finished.keeping_state():
        model = variant.finished.call if variant.finished.params else variant.finished.model
        return variant.work.world.agree(float(settings.evaluate(model)))


def _attributed(original: Variant, applied: Applied, last: Comparison, settings: Settings) -> tuple[Step, ...]:
    """Each step with the speed-up of the chain up to it: the intermediate ones timed briefly, the last one known."""
    steps = list(applied.steps)
    share = settings.budget_s / 4 / max(len(steps) - 1, 1)
    for index in range(len(steps) - 1):
        name = "+".join(step.recipe for step in steps[: index + 1])
        settings.progress(f"timing {name} for the waterfall")
        try:
            variant = ready(applied.works[index], name)
        except UnsupportedError as error:
            effect = steps[index].effect
            note = f"without the next recipe it does not run, so its share was not measured: {first_line(error)}"
            steps[index] = replace(steps[index], effect=replace(effect, notes=(*effect.notes, note)))
            continue
        speedup = compared(original, variant, ("original", name), share)[2]
        steps[index] = replace(steps[index], speedup=speedup)
    if steps:
        steps[-1] = replace(steps[-1], speedup=last)
    return tuple(steps)


def _against_compiled(
    original: Variant, result: Variant, name: str, settings: Settings
) -> tuple[Comparison | None, tuple[str, ...]]:
    """The result's speed against the framework's plain compiler; without it why it cannot be told, if it is wanted."""
    baseline = original.work.backend.compiled_baseline(original.work)
    if baseline is None:
        return None, ()
    settings.progress("timing against the framework's plain compiler")
    try:
        compiled = ready(baseline, "the framework's plain compiler")
    except UnsupportedError as error:
        return None, (f"there is no plain compiled original to compare with: {first_line(error)}",)
    return compared(compiled, result, ("compiled original", name), settings.budget_s / 4)[2], ()


def _recompiled(log: CompileLog) -> tuple[str, ...]:
    again = f"{log.graphs} program(s) were compiled while the clock ran, though the inputs' shapes never changed"
    return tuple(filter(None, (again if log.graphs else "", log.gave_up)))


def _assembled(
    original: Variant,
    result: Variant,
    applied: Applied,
    *,
    latencies=(None, None),
    speedup=None,
    fidelity=None,
    **found,
) -> Report:
    work, chain = original.work, str(applied.chain)
    before, after = (
        measurement(name, variant, latency, anew=applied.chain.aim == "memory")
        for name, variant, latency in zip(("original", chain), (original, result), latencies, strict=True)
    )
    spread = parallel(result, speedup)
    told = (_about_load(speedup), _about_memory(original, result, applied.chain) if result.measurable else "")
    optimizing_s = sum(step.apply_s for step in applied.steps) + (result.first_call_s.value or 0.0)
    report = Report(
        model=work.backend.model_name(work),
        framework=work.framework,
        mode=work.mode,
        device=work.device,
        recipe=chain,
        inputs=work.backend.describe(work.inputs),
        outcome="optimized",
        explanation="",
        environment=environment(),
        before=before,
        after=after,
        speedup=speedup,
        fidelity=fidelity,
        steps=found.pop("steps", ()),
        optimizing_s=optimizing_s,
        payback_calls=payback(optimizing_s, before, after, speedup),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        perfkit_version=perfkit.__version__,
        parallel=spread,
        aim=applied.chain.aim,
        notes=(*found.pop("notes", ()), *filter(None, told)),
        **found,
    )
    return work.world.agree(replace(report, explanation=_explained(report)))


def _about_load(speedup: Comparison | None) -> str:
    """Where something else computed beside the timing."""
    if speedup is None or (speedup.waited or 0.0) <= CONTENDED:
        return ""
    return (
        f"in each second of the timing this process' threads waited {speedup.waited:.1f} s for a processor, together: "
        "something else computed here, or they were more than the processors. What computes with several threads loses "
        "most by that: measure again where nothing else runs"
    )


def _about_memory(original: Variant, result: Variant, chain: Chain) -> str:
    """What keeping memory may give the result; or the original, since that is no gain of the recipe's then."""
    if any(recipe.keeps_memory for recipe in chain):
        return ""
    advice = original.work.backend.memory_advice
    if (told := advice(result.work, result.finished)) or result is original:
        return told
    told = advice(original.work, original.finished)
    return f"part of the gain may be memory: of the original {told}" if told else ""


def _explained(report: Report) -> str:
    recipe, model, speedup = report.recipe, report.model, report.speedup
    if speedup is None:
        return f"{recipe} was applied to {model}; nothing was measured"
    if report.savings:
        saved = "; ".join(
            f"{rounded(item.ratio)}× less in {item.what} ({item.before / 1e6:.3g} MB → {item.after / 1e6:.3g} MB)"
            for item in report.savings
        )
        interval = f"{speedup.confidence:.0%} interval {rounded(1 / speedup.high)} to {rounded(1 / speedup.low)}"
        return f"{recipe} trains {model} with {saved}, at {rounded(1 / speedup.ratio)}× the time ({interval})"
    if report.aim == "memory":
        return report.failing
    interval = f"{speedup.confidence:.0%} interval {rounded(speedup.low)} to {rounded(speedup.high)}"
    return {
        Verdict.FASTER: f"{recipe} makes {model} {rounded(speedup.ratio)}× faster ({interval})",
        Verdict.SLOWER: f"{recipe} makes {model} slower: {rounded(speedup.ratio)}× ({interval})",
        Verdict.NOISY: f"this machine is too noisy to tell what {recipe} does to {model}'s speed ({interval})",
        Verdict.SAME: f"{recipe} changes {model}'s speed by no more than the interval shows ({interval})",
    }[speedup.verdict]
