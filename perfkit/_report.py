"""What was measured, as plain data: no framework, no behaviour beyond showing itself.

Units stand in the field names. A number that could not be measured is a `Quantity` without a value and with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from perfkit._environment import Environment
from perfkit._quantity import Comparison, Latency, Quantity, Verdict
from perfkit._showing import AsJson, AsPage, InTerminal, written

SCHEMA_VERSION = 1
WORTH_SAVING = 1.02
"""Ratio of memory before to after from which on it is called a saving."""

NO_OPTIMIZER = Quantity.missing("B", "there is no optimizer in inference")


@dataclass(frozen=True)
class Measurement:
    """One variant of the model, measured.

    Args:
        latency: None where nothing was timed.
        throughput: items per second: batch size / median latency.
        first_call_s: the first call in this process, compilation and lazy set-up included.
        compile_s: what of it was compilation.
        tensor_peak_bytes: high-water mark of tensor memory during one call, as the framework accounts for it.
        process_high_water_bytes: how far the process' resident memory rose during one call.
        model_bytes: parameters and buffers, tied ones once.
        parameters: number of parameters, tied ones once.
        optimizer_state_bytes: what the optimizer holds on the device between two steps.
    """

    name: str
    latency: Latency | None
    throughput: Quantity
    first_call_s: Quantity
    compile_s: Quantity
    tensor_peak_bytes: Quantity
    process_high_water_bytes: Quantity
    model_bytes: int
    parameters: int
    optimizer_state_bytes: Quantity = NO_OPTIMIZER


@dataclass(frozen=True)
class Saving:
    """Memory that a result does without.

    Args:
        what: "tensor peak" or "optimizer state".
        before, after: bytes.
    """

    what: str
    before: float
    after: float

    @property
    def ratio(self) -> float:
        """3.0 where a third is left."""
        return self.before / max(self.after, 1.0)


@dataclass(frozen=True)
class Fidelity:
    """How close the result's numbers are to the original's.

    `ok` is `relative_error <= factor * original_error + tolerance`, and everything finite that the original has finite.

    Args:
        relative_error: ‖result − reference‖ / ‖reference‖, the worst output. For training: the loss curves' distance.
        original_error: the same for the original as it stands.
        reference: what both were compared with.
        sqnr_db: signal-to-quantization-noise ratio of the result.
        top1_agreement: share of rows with the same largest entry, where outputs look like logits.
        reason: why it is not ok; empty where it is.
    """

    ok: bool
    relative_error: float
    original_error: float
    factor: float
    tolerance: float
    reference: str
    max_abs_error: float
    sqnr_db: Quantity
    top1_agreement: Quantity
    reason: str = ""

    @property
    def limit(self) -> float:
        """The largest relative error that would pass."""
        return self.factor * self.original_error + self.tolerance


@dataclass(frozen=True)
class LossCurves:
    """Training losses, step by step, of the original and of the result from the same start on the same batch."""

    before: tuple[float, ...]
    after: tuple[float, ...]


@dataclass(frozen=True)
class Skipped:
    """A part of the model that a recipe left alone, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Effect:
    """What a recipe did to the model.

    Args:
        touched: names of the modules or operations it changed, as the framework names them.
        skipped: those it left alone, with the reason.
        notes: what else the caller should know.
        apart: those of the notes that tell why the result's numbers differ from the original's by more than rounding.
        simulated: True where the speed of real low-precision or sparse kernels is not had.
    """

    touched: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()
    simulated: bool = False
    apart: tuple[str, ...] = ()

    @property
    def status(self) -> str:
        return "applied" if self.touched else "NO_EFFECT"


@dataclass(frozen=True)
class Step:
    """One recipe of the chain, as applied.

    Args:
        recipe: the recipe as it would be written: "bf16" or "compile(mode='max-autotune')".
        speedup: the original against the model after this step; None where it was not measured.
    """

    recipe: str
    stage: str
    effect: Effect
    apply_s: float
    speedup: Comparison | None = None


@dataclass(frozen=True)
class Candidate:
    """One chain that recipe="auto" considered, and what became of it.

    Args:
        outcome: "won", "lost", "refused", "failed" or "not tried".
        reason: why it did not win; empty for the winner.
        speedup: over the original; None where it was not timed against that, being slower than another candidate.
    """

    recipe: str
    outcome: str
    reason: str = ""
    speedup: Comparison | None = None
    fidelity: Fidelity | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Metric:
    """The caller's own `evaluate(model)` before and after; `ok` is `before - after <= max_drop`."""

    before: float
    after: float
    max_drop: float
    ok: bool


@dataclass(frozen=True)
class Parallel:
    """What spreading a model over several devices gave, and what it cost.

    Args:
        layout: the mesh, "data 2 × tensor 2".
        devices, processes: how many work together.
        parts: what is spread along which axis, one line each.
        efficiency: speed-up against one process with the whole batch, divided by the number of devices.
        sent_bytes: what one device exchanges in one call or step; `method` tells how it is counted.
        communicating: share of a step's time in which such were under way, hidden behind computations or not.
        rank_peak_bytes: tensor memory's high-water mark during a step, by process.
        rank_model_bytes: parameters and buffers held, by process.
        balance: share of the work of each pipeline stage; empty without a pipeline.
        bubble: share of a pipeline's time in which its stages wait for each other, by its schedule.
    """

    layout: str
    devices: int
    processes: int
    parts: tuple[str, ...]
    efficiency: Quantity
    sent_bytes: Quantity
    communicating: Quantity
    rank_peak_bytes: tuple[Quantity, ...]
    rank_model_bytes: tuple[int, ...]
    balance: tuple[float, ...] = ()
    bubble: float = 0.0


@dataclass(frozen=True)
class Report(AsJson, InTerminal, AsPage):
    """The proof: everything `optimize` measured and decided.

    Args:
        outcome: "optimized" or "original returned".
        explanation: one sentence a person can act on.
        speedup: original against result (with `on_slower="revert"`, against the result that was refused); None where
            nothing was measured, and then `not_measured` says why.
        against_compiled: the framework's plain compiler against result (JAX: `jax.jit` of the original);
            None where it was not measured.
        parallel: what several devices gave and cost; None where one process has the whole model.
        payback_calls: after how many calls the cost of optimizing is earned back.
        aim: "memory" where a recipe of the chain is for it, and more time is its price; else "speed".
        optimizing_s: seconds spent applying recipes and compiling, measurements not included.
    """

    _terminal, _page, _indent = "terminal", "html", 2

    model: str
    framework: str
    mode: str
    device: str
    recipe: str
    inputs: str
    outcome: str
    explanation: str
    environment: Environment
    before: Measurement
    after: Measurement
    speedup: Comparison | None
    fidelity: Fidelity | None
    steps: tuple[Step, ...]
    optimizing_s: float
    payback_calls: Quantity
    against_compiled: Comparison | None = None
    losses: LossCurves | None = None
    metric: Metric | None = None
    candidates: tuple[Candidate, ...] = ()
    parallel: Parallel | None = None
    notes: tuple[str, ...] = ()
    not_measured: str = ""
    created: str = ""
    perfkit_version: str = ""
    aim: str = "speed"
    schema_version: int = field(default=SCHEMA_VERSION)

    @property
    def savings(self) -> tuple[Saving, ...]:
        """Where the aim is memory: what it did without, the largest ratio first; empty where that is nothing."""
        if self.aim != "memory":
            return ()
        kinds = {"tensor peak": "tensor_peak_bytes", "optimizer state": "optimizer_state_bytes"}
        sides = {what: (getattr(self.before, name), getattr(self.after, name)) for what, name in kinds.items()}
        found = [Saving(what, a.value, b.value) for what, (a, b) in sides.items() if a.value and b.value is not None]
        saved = [item for item in found if item.ratio >= WORTH_SAVING]
        return tuple(sorted(saved, key=lambda item: -item.ratio))

    @property
    def failing(self) -> str:
        """Why the result is no gain: slower, or, where the aim is memory, saving none. Empty where it is one."""
        if self.speedup is None or self.savings:
            return ""
        if self.aim == "memory":
            peaks = self.before.tensor_peak_bytes, self.after.tensor_peak_bytes
            unknown = next((peak.unavailable for peak in peaks if peak.unavailable), None)
            told = "none of it was measured" if unknown else f"a step peaks at {peaks[1].value / 1e6:.3g} MB, as before"
            more = f" ({unknown})" if unknown else ""
            return f"{self.recipe} saves no memory on {self.model} here: {told}{more}"
        if self.speedup.verdict == Verdict.SLOWER:
            return f"{self.recipe} makes {self.model} slower here: {self.speedup}"
        return ""

    def to_markdown(self, path: str | Path | None = None) -> str:
        """The report as Markdown, short enough for a pull request."""
        from perfkit.reporting import markdown

        return written(markdown.render(self), path)
