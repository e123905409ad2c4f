"""What a pipeline's options come to on a workload: stages, schedule, micro-batches. Imports no framework."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from perfkit._batch import other_dim
from perfkit._workload import Workload
from perfkit.parallel.balance import bubble
from perfkit.parallel.batch import length

if TYPE_CHECKING:
    from perfkit.recipes.pipeline_parallel import PipelineParallel

MICRO_BATCHES = 4
"""For each device, where the caller sets no number: the bubble is below a fifth then."""


@dataclass(frozen=True)
class Plan:
    """How a batch goes through the stages.

    Args:
        devices: along the pipeline.
        stages: how many; several of each device where they are interleaved.
        schedule: "1f1b", "gpipe" or "interleaved".
        micro_batches: into how many parts the rows of one process are divided; of several passes, those of one pass.
        rows: of one micro-batch.
        parts: how many micro-batches there are in the whole example batch, along "data" and of all passes.
    """

    devices: int
    stages: int
    schedule: str
    micro_batches: int
    rows: int
    parts: int

    @property
    def bubble(self) -> float:
        return bubble(self.devices, self.micro_batches, self.stages)

    def told(self, layers: Sequence[Sequence[str]], sent_bytes: int) -> str:
        """One line: "pipeline: 2 stages (conv1; conv2, fc1, fc2), 1f1b with 8 micro-batches of 8 rows, …"."""
        listed = "; ".join(_few(names) for names in layers)
        return (
            f"pipeline: {self.stages} stages ({listed}), {self.schedule} with {self.micro_batches} micro-batches "
            f"of {self.rows} row{'s' if self.rows > 1 else ''}, each sends {sent_bytes / 1e3:.3g} kB onwards"
        )


def planned(work: Workload, recipe: PipelineParallel) -> Plan | str:
    """What the options come to; or why they cannot be."""
    devices, data = work.layout.size("pipeline"), work.layout.size("data")
    stages = recipe.stages or devices * (2 if recipe.schedule == "interleaved" else 1)
    schedule = recipe.schedule or ("interleaved" if stages > devices else "1f1b")
    if stages % devices or (stages > devices) != (schedule == "interleaved"):
        return (
            f"{stages} stages by {schedule!r} on {devices} devices: each device has one stage, or with 'interleaved' "
            "the same number of two or more"
        )
    if recipe.split_at and len(recipe.split_at) != stages - 1:
        return f"split_at names {len(recipe.split_at)} layer(s) to cut at, and {stages} stages need {stages - 1}"
    if reason := _cannot_accumulate(work, recipe, schedule) or other_dim(work.samples, recipe.batch_dim):
        return reason
    rows = length(work, recipe.batch_dim)
    if rows is None:
        return f"no input has a dimension {recipe.batch_dim} to divide: set batch_dim="
    passes = work.training.micro_batches if work.training else 1
    if rows % (data * passes):
        shared = f" in {passes} parts by accumulate" if passes > 1 else ""
        return (
            f"a batch of {rows} rows (dimension {recipe.batch_dim}) cannot be shared by {data} devices evenly{shared}"
        )
    each = rows // data // passes
    count = recipe.micro_batches or _micro_batches(each, devices, schedule)
    if count is None or each % count:
        told = f"{count} micro-batches" if count else f"{devices} or more micro-batches, one for each device,"
        whose = "process" if passes == 1 else "process in each part of accumulate"
        return f"{each} rows of a {whose} cannot be divided into {told} evenly: set micro_batches="
    scheduled = count if work.framework == "jax" else count * passes
    for number in (count, scheduled):
        if not _suits(number, devices, schedule):
            return f"{number} micro-batches are too few or too odd for {schedule!r}: take a multiple of {devices}"
    return Plan(devices, stages, schedule, scheduled, each // count, data * count * passes)


def _cannot_accumulate(work: Workload, recipe: PipelineParallel, schedule: str) -> str | None:
    """Why the parts that `accumulate` makes cannot go through the stages; None where they can."""
    if work.training is None or work.training.micro_batches == 1:
        return None
    if work.training.batch_dim != recipe.batch_dim:
        return (
            f"accumulate cuts the batch along dimension {work.training.batch_dim}, and pipeline_parallel along "
            f"{recipe.batch_dim}: give both the same batch_dim="
        )
    if work.framework == "torch" and schedule == "gpipe":
        return (
            "schedule='gpipe' keeps the activations of all micro-batches until the last one, so accumulate would save "
            "nothing: leave schedule out, and 1f1b keeps those of few"
        )
    return None


def _micro_batches(rows: int, devices: int, schedule: str) -> int | None:
    """The largest number of equal parts that is not too large; None where there is none."""
    fitting = [
        count
        for count in range(devices, MICRO_BATCHES * devices + 1)
        if rows % count == 0 and _suits(count, devices, schedule)
    ]
    return max(fitting, default=None)


def _suits(count: int, devices: int, schedule: str) -> bool:
    """What torch's schedules ask of a number of micro-batches."""
    return {
        "1f1b": count >= devices,
        "gpipe": True,
        "interleaved": count >= devices and count % (count // devices) == 0,
    }[schedule]


def _few(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
