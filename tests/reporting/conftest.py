"""Reports of every kind that `optimize` can produce, built by hand: no framework, no timing."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from sample_profile_parts import MIB, environment

from perfkit._quantity import Comparison, Latency, Quantity, Verdict
from perfkit._report import (
    Candidate,
    Effect,
    Fidelity,
    LossCurves,
    Measurement,
    Metric,
    Report,
    Skipped,
    Step,
)

INFINITE, NAN = float("inf"), float("nan")
HOSTILE = "<script>alert('x')</script>|`a`*b*[bold red]\"&amp;\x1b[31m\n# @octocat ]]>"


def comparison(ratio: float, spread: float = 0.02, verdict: Verdict | None = None, **changes) -> Comparison:
    low, high = ratio * (1 - spread), ratio * (1 + spread)
    if verdict is None:
        verdict = Verdict.FASTER if low > 1 else Verdict.SLOWER if high < 1 else Verdict.SAME
    found = Comparison("original", "result", ratio, low, high, 0.99, verdict, 200, 0.011)
    return dataclasses.replace(found, **changes)


def latency(median_ms: float, count: int = 200, seed: int = 0) -> Latency:
    source = random.Random(seed)
    samples = [median_ms * (0.97 + source.gammavariate(2, 0.015)) for _ in range(count)]
    if count > 50:
        samples[17] *= 6  # one preempted call: an axis must survive it
    ranked = sorted(samples)

    def percentile(share: float, needed: int) -> Quantity:
        if count < needed:
            return Quantity.missing("ms", f"needs {needed} samples, {count} were taken")
        return Quantity(ranked[int(share * count)], "ms")

    return Latency(
        tuple(samples), ranked[count // 2], percentile(0.9, 64), percentile(0.95, 130), percentile(0.99, 662)
    )


def measurement(
    name: str, median_ms: float = 12.3, peak: float = 31.2, size: int = 1_201_192, **changes
) -> Measurement:
    found = Measurement(
        name=name,
        latency=latency(median_ms, seed=int(100 * median_ms)),
        throughput=Quantity(64_000 / median_ms, "items/s", method="batch size / median latency"),
        first_call_s=Quantity(0.0451, "s"),
        compile_s=Quantity(0.0, "s"),
        tensor_peak_bytes=Quantity(peak * MIB, "B", method="allocations traced during one call"),
        process_high_water_bytes=Quantity(1.6 * peak * MIB, "B", method="resident memory, median of 3 calls"),
        model_bytes=size,
        parameters=300_298,
    )
    return dataclasses.replace(found, **changes)


def fidelity(ok: bool = True, **changes) -> Fidelity:
    found = Fidelity(
        ok=ok,
        relative_error=3.14e-3,
        original_error=1.2e-7,
        factor=2.0,
        tolerance=1e-2,
        reference="the original in float64",
        max_abs_error=0.0123,
        sqnr_db=Quantity(50.1, "dB"),
        top1_agreement=Quantity(0.9984, "ratio"),
    )
    return dataclasses.replace(found, **changes)


def step(recipe: str, ratio: float | None, stage: str = "PRECISION", touched: int = 4, skipped=(), **effect) -> Step:
    names = tuple(f"layer{index}.conv" for index in range(touched))
    return Step(recipe, stage, Effect(names, tuple(skipped), **effect), 0.04, comparison(ratio) if ratio else None)


def fast(**changes) -> Report:
    """A chain of three steps, one of which did nothing, that won."""
    found = Report(
        model="MnistCNN",
        framework="torch",
        mode="inference",
        device="cpu",
        recipe="channels_last+bf16+prune+compile",
        inputs="float32 (64, 1, 28, 28)",
        outcome="optimized",
        explanation="Use result.model in place of the original: it is 1.84 times as fast and its outputs agree.",
        environment=environment(),
        before=measurement("original"),
        after=measurement(
            "result", 6.68, 16.1, 601_004, first_call_s=Quantity(8.21, "s"), compile_s=Quantity(8.0, "s")
        ),
        speedup=comparison(1.84),
        fidelity=fidelity(),
        steps=(
            step("channels_last", 1.06, "STRUCTURE", touched=2, skipped=[Skipped("fc1", "no convolution")] * 2),
            step("bf16", 1.49, skipped=[Skipped("fc2.softmax", "sensitive: kept in float32")], notes=("autocast",)),
            step("prune(amount=0.3)", 1.48, "STRUCTURE", 0, [Skipped("conv1", "fewer than 8 channels would be left")]),
            step("compile(mode='max-autotune')", 1.84, "COMPILE", touched=1),
        ),
        optimizing_s=9.4,
        payback_calls=Quantity(1673.2, "calls"),
        against_compiled=comparison(1.21, baseline="torch.compile"),
        notes=("Timed with 2 threads.",),
        created="2025-11-23T10:00:00Z",
        perfkit_version="0.1.0",
    )
    return dataclasses.replace(found, **changes)


def original_returned() -> Report:
    return fast(
        outcome="original returned",
        explanation="bf16 is slower on this processor, which has no bfloat16 units; keep the model or try 'compile'.",
        recipe="bf16",
        speedup=comparison(0.71),
        steps=(step("bf16", 0.71),),
        after=measurement("result", 12.3),
        payback_calls=Quantity.missing("calls", "the result is not faster"),
        against_compiled=None,
    )


def not_measured() -> Report:
    why = "no example_inputs were given"
    unknown = {"throughput": "items/s", "first_call_s": "s", "compile_s": "s"}
    unknown |= {"tensor_peak_bytes": "B", "process_high_water_bytes": "B"}
    nothing = {name: Quantity.missing(unit, why) for name, unit in unknown.items()}
    return fast(
        speedup=None,
        fidelity=None,
        against_compiled=None,
        not_measured=why,
        explanation="The recipe was applied; pass example_inputs=(x,) to have it measured.",
        before=measurement("original", latency=None, **nothing),
        after=measurement("result", latency=None, **nothing),
        steps=(step("bf16", None),),
        payback_calls=Quantity.missing("calls", why),
    )


def training() -> Report:
    source = random.Random(7)
    curve = [2.31 * 0.985**index + 0.04 * source.random() for index in range(400)]
    return fast(
        mode="training",
        recipe="bf16+accumulate(steps=4)",
        losses=LossCurves(tuple(curve), tuple(value * (1 + 0.004 * source.gauss(0, 1)) for value in curve)),
        metric=Metric(before=0.981, after=0.979, max_drop=0.01, ok=True),
    )


def auto() -> Report:
    lost = [
        ("int8_dynamic", 1.31, "slower than the winner"),
        ("compile", 1.52, "slower than the winner"),
        ("bf16", 1.02, "no significant change"),
        ("channels_last+bf16", 0.93, "slower than the original"),
    ]
    return fast(
        recipe="auto",
        candidates=(
            Candidate(
                "int8", "lost", "relative error 0.2, at most 0.01 allowed", comparison(2.2), fidelity(False), 12.2
            ),
            *(Candidate(name, "lost", why, comparison(ratio), fidelity(), 3.1) for name, ratio, why in lost),
            Candidate("channels_last+bf16+prune+compile", "won", "", comparison(1.84), fidelity(), 11.0),
            Candidate("fp8", "refused", "needs a GPU of compute capability 8.9 or newer; this device is a CPU"),
            Candidate("fused_kernels", "failed", "RuntimeError: no kernel for stride 3", seconds=0.2),
            Candidate("qat", "not tried", "the budget of 60 s was spent"),
        ),
    )


def failed_fidelity() -> Report:
    broken = fidelity(
        False,
        relative_error=INFINITE,
        max_abs_error=NAN,
        sqnr_db=Quantity.missing("dB", "the error is not finite"),
        top1_agreement=Quantity.missing("ratio", "outputs are not logits"),
        reason="output 0 holds inf where the original is finite",
    )
    return fast(
        recipe="fp16",
        outcome="original returned",
        fidelity=broken,
        explanation="fp16 overflows in this model; use bf16.",
        steps=(step("fp16", 1.7), step("int4_weight_only", 1.9, simulated=True)),
        losses=LossCurves((1.0, 0.5, 0.25), (1.0, INFINITE, NAN)),
        metric=Metric(before=0.98, after=NAN, max_drop=0.01, ok=False),
    )


def unavailable() -> Report:
    """Nothing could be measured, each for a reason of its own."""
    units = {"throughput": "items/s", "first_call_s": "s", "compile_s": "s"}
    units |= {"tensor_peak_bytes": "B", "process_high_water_bytes": "B"}

    def side(name: str) -> Measurement:
        gaps = {field: Quantity.missing(unit, f"no {field} on {name}") for field, unit in units.items()}
        return measurement(name, latency=None, **gaps)

    return fast(
        before=side("before"),
        after=side("after"),
        speedup=None,
        fidelity=None,
        against_compiled=None,
        steps=(),
        notes=(),
        not_measured="the clock of this machine is not monotonic",
        payback_calls=Quantity.missing("calls", "nothing was timed"),
        environment=environment(
            memory_bytes=Quantity.missing("B", "not permitted"), libraries={}, threads={}, settings={}
        ),
        created="",
        perfkit_version="",
    )


def single_step() -> Report:
    return fast(
        recipe="compile",
        steps=(step("compile", 1.012, "COMPILE", 1),),
        speedup=comparison(1.004, 0.003, Verdict.SAME),
        before=measurement("original", latency=latency(12.3, 20)),
        after=measurement("result", latency=latency(12.25, 20, seed=3)),
    )


def twelve_steps() -> Report:
    names = ("channels_last", "tf32", "bf16", "prune", "fused_kernels", "checkpoint", "offload", "accumulate")
    names += ("compile", "data_parallel", "tensor_parallel", "pipeline_parallel")
    ratios = (1.05, 1.05, 1.9, 2.3, 4.1, 3.2, 2.9, 3.0, 6.8, 11.2, 14.0, 15.1)
    steps = tuple(step(name, ratio) for name, ratio in zip(names, ratios, strict=True))
    return fast(steps=steps, speedup=comparison(15.1, 0.1), after=measurement("result", 12.3 / 15.1, 0.0))


def huge_names() -> Report:
    name = "mixture_of_experts." + "very_long_module_name." * 20
    skips = [Skipped(f"{name}{index}", f"reason {index}: " + "it was left alone " * 12) for index in range(300)]
    return fast(
        model=name,
        recipe="+".join(f"recipe_number_{index}(option={index})" for index in range(12)),
        inputs="float32 " + str(tuple(range(60))),
        explanation="word " * 120,
        steps=(step(name, 1.4, skipped=skips), step("compile", 1.84)),
        candidates=tuple(Candidate(f"{name}{index}", "lost", "slower " * 80, comparison(1.2)) for index in range(80)),
        notes=tuple("note " * 50 for _ in range(30)),
    )


def unicode_names() -> Report:
    return fast(
        model="模型 🚀 Ünïcode‮evil‬ \ud800\x00",
        device="cuda:0 «H100»",
        recipe="量化+コンパイル",
        steps=(step("量化", 1.2), step("コンパイル", 1.84)),
    )


def hostile() -> Report:
    """Every free text is markup for someone: HTML, SVG, Markdown, rich, the terminal."""
    skipped = [Skipped(HOSTILE, HOSTILE)]
    return fast(
        model=HOSTILE,
        framework=HOSTILE,
        device=HOSTILE,
        recipe=HOSTILE,
        inputs=HOSTILE,
        explanation=HOSTILE,
        speedup=comparison(1.84, baseline=HOSTILE, variant=HOSTILE),
        against_compiled=comparison(1.2, baseline=HOSTILE),
        before=measurement(HOSTILE, process_high_water_bytes=Quantity.missing("B", HOSTILE)),
        fidelity=fidelity(False, reference=HOSTILE, reason=HOSTILE),
        steps=(
            Step(HOSTILE, HOSTILE, Effect((HOSTILE,), tuple(skipped), (HOSTILE,)), 0.1, comparison(1.5)),
            Step(HOSTILE, HOSTILE, Effect((), tuple(skipped), (HOSTILE,), simulated=True), 0.1, comparison(1.84)),
        ),
        candidates=(Candidate(HOSTILE, "lost", HOSTILE, comparison(1.1), fidelity()),),
        losses=LossCurves((2.0, 1.0), (2.0, 1.1)),
        notes=(HOSTILE,),
        payback_calls=Quantity.missing("calls", HOSTILE),
        environment=environment(cpu=HOSTILE, accelerators=(HOSTILE,), libraries={HOSTILE: HOSTILE}),
        created=HOSTILE,
        perfkit_version=HOSTILE,
    )


FACTORIES: dict[str, Callable[[], Report]] = {
    made.__name__: made
    for made in (
        fast,
        original_returned,
        not_measured,
        training,
        auto,
        failed_fidelity,
        unavailable,
        single_step,
        twelve_steps,
        huge_names,
        unicode_names,
        hostile,
    )
}


@pytest.fixture
def make() -> SimpleNamespace:
    """The builders that reports are made of."""
    return SimpleNamespace(
        comparison=comparison, fidelity=fidelity, latency=latency, measurement=measurement, step=step, report=fast
    )


@pytest.fixture
def hostile_text() -> str:
    """Text that is markup in every format."""
    return HOSTILE


@pytest.fixture
def reports() -> dict[str, Report]:
    """One report of each kind, by name."""
    return {name: made() for name, made in FACTORIES.items()}


@pytest.fixture(params=FACTORIES)
def report(request: pytest.FixtureRequest) -> Report:
    """Each kind of report in turn."""
    return FACTORIES[request.param]()
