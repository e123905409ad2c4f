"""What a training loop's steps took, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from perfkit._environment import Environment
from perfkit._quantity import Latency, Quantity
from perfkit._showing import AsJson
from perfkit.profiling._profile import Finding
from perfkit.reporting._format import counted, format_ms, format_quantity

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class StepTime:
    """One step.

    Args:
        index: its number in the loop, from 0.
        data_ms: waiting for its batch.
        compute_ms: from the batch to the end of the step on the host. Where the step was watched, with the device at
            rest before: all that the host does, which is launching where there is a device, and computing where not.
        sync_ms: waiting for the device after that; None where the step was not watched.
        items: in its batch; None where that is not known.
    """

    index: int
    data_ms: float
    compute_ms: float
    sync_ms: float | None
    items: int | None


@dataclass(frozen=True)
class Steps(AsJson):
    """The steps of one process' training loop, after warm-up.

    Args:
        outcome: "complete", or "interrupted" or "failed" where the loop ended by raising.
        counted: how many steps stand behind the numbers.
        step: a whole step, data included; None where none was counted.
        data_ms, compute_ms: medians.
        sync_ms: median of the steps that were watched.
        data_share: of the whole time, that which was spent waiting for batches.
        throughput: items per second over the whole time.
        resident_growth: of the process' resident memory, per step.
        device_growth: of the framework's memory on its devices, per step.
        recompiles: after warm-up.
        overhead: share of the time that watching took, waits for the device included.
        slowest: the slowest steps, slowest first.
        timeline: all steps; thinned to some hundreds.
        findings: what there is to do, the costliest first.
    """

    rank: int
    processes: int
    outcome: str
    explanation: str
    warmup: int
    every: int
    counted: int
    step: Latency | None
    data_ms: Quantity
    compute_ms: Quantity
    sync_ms: Quantity
    data_share: Quantity
    throughput: Quantity
    resident_growth: Quantity
    device_growth: Quantity
    recompiles: int
    overhead: Quantity
    slowest: tuple[StepTime, ...]
    timeline: tuple[StepTime, ...]
    findings: tuple[Finding, ...]
    environment: Environment
    created: str
    perfkit_version: str
    schema_version: int = field(default=SCHEMA_VERSION)

    @classmethod
    def from_json(cls, source: str | Path) -> Steps:
        """The report of one process that was written, from its path or its text.

        Raises:
            InvalidInputError: it is no such report, or one of another version.
        """
        from perfkit.profiling import _reading

        return _reading.steps_from_json(source)

    def __str__(self) -> str:
        head = f"rank {self.rank} of {self.processes}: " if self.processes > 1 else ""
        if self.step is None:
            return f"{head}no step was counted: {self.explanation or f'all belonged to the warm-up of {self.warmup}'}"
        told = [
            f"{head}{counted(self.counted, 'step')}, {format_ms(self.step.median_ms)} each (median)",
            f"  data {_shown(self.data_ms)}, compute {_shown(self.compute_ms)}, waiting for the device "
            f"{_shown(self.sync_ms)}",
            f"  waiting for batches {_shown(self.data_share)} of the time, {_shown(self.throughput)}, "
            f"{counted(self.recompiles, 'recompilation')}; watching took {_shown(self.overhead)}",
            f"  memory per step: process {_shown(self.resident_growth)}, device {_shown(self.device_growth)}",
        ]
        return "\n".join([*told, *(f"  {finding.told} {finding.advice}" for finding in self.findings)])


@dataclass(frozen=True)
class MergedSteps(AsJson):
    """The steps of all processes of one loop.

    Args:
        throughput: of all together.
        slowest_rank: the one whose median step computes longest; the others wait for it where they exchange gradients.
        imbalance: its time computing / the mean of all.
    """

    ranks: tuple[Steps, ...]
    throughput: Quantity
    slowest_rank: int
    imbalance: Quantity
    schema_version: int = field(default=SCHEMA_VERSION)

    def __str__(self) -> str:
        about = f"{len(self.ranks)} processes, {_shown(self.throughput)}"
        slow = f"rank {self.slowest_rank} computes longest, {_shown(self.imbalance)} of the mean"
        return "\n".join([f"{about}; {slow}", *map(str, self.ranks)])


def _shown(quantity: Quantity) -> str:
    if quantity.value is None:
        return f"not known ({quantity.unavailable})"
    return format_quantity(quantity)
