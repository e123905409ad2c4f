"""What a profile holds, as plain data: no framework, no behaviour beyond showing itself.

Times are of one call (inference) or one training step, in milliseconds from its start. Sizes are in bytes. A number
that could not be measured is a `Quantity` without a value and with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from perfkit._environment import Environment
from perfkit._quantity import Quantity
from perfkit._showing import AsJson, AsPage, InTerminal, written
from perfkit.profiling._memory_data import Memory
from perfkit.profiling._time_data import Time

if TYPE_CHECKING:
    from perfkit.profiling.diff import ProfileDiff

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches at best, measured just now: the roofs of the roofline.

    Args:
        gflops: of a large matrix product, by dtype: "float32", "bfloat16", "int8".
        bandwidth_gb_s: of a stream that is larger than the caches (triad: two reads and a write).
    """

    gflops: dict[str, Quantity]
    bandwidth_gb_s: Quantity


@dataclass(frozen=True)
class Series:
    """One reading of a device over time."""

    name: str
    unit: str
    at_s: tuple[float, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class DeviceState:
    """One card, or the processor, during the run.

    Args:
        name: "NVIDIA H100 80GB HBM3 (0)"; "CPU package 0".
        readings: by name, each with its unit or why it is not supported: "temperature", "power", "sm clock", …
        reasons: why the clock was held down, if it was.
        processes: others that compute on the card.
        series: readings over time.
    """

    name: str
    readings: dict[str, Quantity]
    reasons: tuple[str, ...] = ()
    processes: tuple[str, ...] = ()
    series: tuple[Series, ...] = ()


@dataclass(frozen=True)
class Energy:
    """Energy of a step.

    Args:
        step_j: above idle, per step, all devices.
        mean_w, idle_w: power while working and before.
        window_s: how long was measured, in whole ticks of the counter.
        source: the counter: "NVML energy counter, 1 card", "RAPL package-0".
    """

    step_j: Quantity
    mean_w: Quantity
    idle_w: Quantity
    window_s: float
    source: str


@dataclass(frozen=True)
class Finding:
    """Something that costs time or memory, why, and what addresses it.

    Args:
        kind: in two or three words: "launch-bound", "activations dominate".
        told: one sentence with the number.
        where: modules or operations; empty for the whole step.
        share: of the step's time or of the peak that is at stake.
        resource: "time" or "memory".
        recipe: a chain for `optimize` that addresses it; empty where the cause is in the caller's code.
        advice: what to do, in a sentence.
        predicted: by how much the whole step gets faster, or the peak smaller (2.0: half), if it is addressed.
    """

    kind: str
    told: str
    where: tuple[str, ...]
    share: float
    resource: str
    recipe: str
    advice: str
    predicted: Quantity


@dataclass(frozen=True)
class Profile(AsJson, InTerminal, AsPage):
    """Where the time, the memory and the energy of a model go.

    Args:
        outcome: "complete", "interrupted" or "failed": what was collected until then is here all the same.
        explanation: why it is not complete; empty where it is.
        time, memory: None where the run ended before they were measured.
        ceilings: None where they were not measured.
        devices: what the cards said of themselves; empty where there is none.
        findings: the costliest first.
        command: what optimizes the same model, but for the recipe: "perfkit optimize cnn --mode training"; empty where
            the model was not named on the command line.
    """

    _terminal, _page = "profile_terminal", "profile_html"

    model: str
    framework: str
    mode: str
    device: str
    inputs: str
    environment: Environment
    outcome: str
    explanation: str
    time: Time | None
    memory: Memory | None
    ceilings: Ceilings | None
    energy: Energy | None
    devices: tuple[DeviceState, ...] = ()
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()
    command: str = ""
    created: str = ""
    perfkit_version: str = ""
    schema_version: int = field(default=SCHEMA_VERSION)

    @classmethod
    def from_json(cls, source: str | Path) -> Profile:
        """The profile that `to_json` wrote, from its path or its text.

        Raises:
            InvalidInputError: it is no profile, or one of another version.
        """
        from perfkit.profiling import _reading

        return _reading.from_json(source)

    def diff(self, after: Profile) -> ProfileDiff:
        """What changed from this profile to `after`, operation by operation.

        Raises:
            InvalidInputError: one of them has no times to compare.
        """
        from perfkit.profiling import diff

        return diff.diff(self, after)

    def to_trace(self, path: str | Path | None = None) -> str:
        """The profiled step as a Chrome trace, which ui.perfetto.dev and chrome://tracing open."""
        from perfkit.profiling import trace

        return written(trace.render(self), path)
