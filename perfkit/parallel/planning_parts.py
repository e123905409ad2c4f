"""What `planning` reads and writes: plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from perfkit.parallel.links import Link


@dataclass(frozen=True)
class Unit:
    """One of the model's parts that are called one after the other.

    Args:
        seconds: of a forward call on the whole batch.
        bytes, tensors: of its parameters, and how many they are.
        output_bytes: of the whole batch.
    """

    name: str
    seconds: float
    bytes: int
    tensors: int
    output_bytes: int


@dataclass(frozen=True)
class Split:
    """A layer that `tensor_parallel` splits.

    Args:
        seconds: of a forward call on the whole batch.
        left: share of its time that one device's part of it takes, 1 / devices at best.
        bytes: of its parameters.
        sends: what a step sends for it, of the whole batch: pairs of the kind of operation and bytes.
    """

    name: str
    seconds: float
    left: float
    bytes: int
    sends: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Stages:
    """How a pipeline cuts the model.

    Args:
        longest: the longest stage's share of a pass.
        bytes: of the parameters of the stage that holds most.
        cut_bytes: what is sent at the largest cut, of the whole batch.
    """

    longest: float
    bytes: int
    cut_bytes: int


@dataclass(frozen=True)
class Program:
    """What the compiled program of one layout does on one device in a step.

    Args:
        sends: what it sends: kind of operation, bytes, devices that take part, and how often.
        kept: share of a pass that is left for one device where layers are split.
        bytes: of the parameters that the device holds.
        stages: of a pipeline: of each stage the share of a pass, and bytes of its parameters.
        temporary: bytes of memory that the program takes while it runs.
        handed: of a pipeline: bytes of what a stage hands on in each turn, forwards and as much backwards.
        filled: bytes that it fills while devices wait for each other in a first collective operation.
    """

    sends: tuple[tuple[str, float, int, int], ...]
    kept: float
    bytes: int
    stages: tuple[tuple[float, int], ...] = ()
    temporary: int = 0
    handed: int = 0
    filled: int = 0


@dataclass(frozen=True)
class Costs:
    """What a training step costs on one device.

    Args:
        rows: of the whole batch.
        pass_s: seconds of forward and backward by rows, on as many devices at a time as there will be; what `fresh_s`
            tells of it left out.
        update_s: of the optimizer's step.
        forward_s: of a forward call on the whole batch, with what belongs to no unit.
        units: in the order of their calls.
        splits: by number of devices along "tensor".
        gradients: bytes of each parameter that is trained, in the order in which its gradient comes.
        stages: by number of devices along "pipeline", where it is known; elsewhere cuts are between units.
        programs: JAX: by layout. Then there are no others, and `units`, `splits` and `stages` are not asked for.
        again: how many times as long a pass takes whose backward computes activations again, as JAX's pipelines do.
        adding_s: of adding gradients of all parameters to others.
        temporary: bytes of memory that a step of the whole batch on one device takes while it runs.
        fresh_s: of the first touch of a byte of memory that comes from the system anew, as `kept_memory.fresh` has it.
        filling_s: of writing a byte of memory that was touched before.
    """

    rows: int
    pass_s: Mapping[int, float]
    update_s: float
    forward_s: float
    units: tuple[Unit, ...]
    splits: Mapping[int, tuple[Split, ...]]
    gradients: tuple[int, ...]
    stages: Mapping[int, Stages] = field(default_factory=dict)
    programs: Mapping[Way, Program] = field(default_factory=dict)
    again: float = 1.0
    adding_s: float = 0.0
    temporary: int = 0
    fresh_s: float = 0.0
    filling_s: float = 0.0

    @property
    def bytes(self) -> int:
        """Of all parameters that are trained."""
        return sum(self.gradients)

    def passing_s(self, rows: float) -> float:
        """Forward and backward of so many rows: measured, or on a line between measured ones."""
        known = sorted(self.pass_s)
        if len(known) == 1:
            return self.pass_s[known[0]] * rows / known[0]
        above = next((index for index, other in enumerate(known) if other >= rows), len(known) - 1)
        low, high = known[max(above, 1) - 1], known[max(above, 1)]
        slope = (self.pass_s[high] - self.pass_s[low]) / (high - low)
        return max(self.pass_s[low] + slope * (rows - low), min(self.pass_s.values()) * min(1, rows / known[0]))


@dataclass(frozen=True)
class Overheads:
    """Seconds that the framework adds, whatever is computed or sent.

    Args:
        step: DistributedDataParallel, a step.
        unit, tensor: FSDP2, for each unit and for each parameter in a step.
        split: tensor_parallel, for each split layer in a step.
        micro_batch: a pipeline, for each micro-batch on each device.
    """

    step: float = 0.0
    unit: float = 0.0
    tensor: float = 0.0
    split: float = 0.0
    micro_batch: float = 0.0


@dataclass(frozen=True)
class Cluster:
    """What a model may be spread over.

    Args:
        devices: how many.
        link: between them.
        overlaps: whether a device computes while it sends. Processes that share their cores with the sending do not.
        overheads: of the framework.
        crowding: threads that want each core while all devices compute; 1 where each device has cores of its own. JAX:
            how many times as long a step takes then as while the others wait for it.
        turns: JAX: seconds of a pipeline's turn whose stages do next to nothing, by bytes that they hand on, forwards
            and backwards; empty where the link was given.
    """

    devices: int
    link: Link
    overlaps: bool = True
    overheads: Overheads = field(default_factory=Overheads)
    crowding: float = 1.0
    turns: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Way:
    """One way to spread a model.

    Args:
        data, tensor, pipeline: devices along each axis.
        shard: whether parameters are sharded along "data".
        micro_batches: of the pipeline.
    """

    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    shard: bool = False
    micro_batches: int = 1

    def __str__(self) -> str:
        """In a few words: "data 4, sharded × tensor 2"."""
        parts = []
        if self.pipeline > 1:
            parts.append(f"pipeline {self.pipeline} of {self.micro_batches}")
        if self.data > 1:
            parts.append(f"data {self.data}{', sharded' if self.shard else ''}")
        if self.tensor > 1:
            parts.append(f"tensor {self.tensor}")
        return " × ".join(parts) or "one device"

    @property
    def recipe(self) -> str:
        """As a recipe, in the order of a chain; empty for one device."""
        parts = []
        if self.pipeline > 1:
            parts.append(f"pipeline_parallel({self.pipeline}, micro_batches={self.micro_batches})")
        if self.tensor > 1:
            parts.append(f"tensor_parallel({self.tensor})")
        if self.data > 1:
            parts.append(f"data_parallel({self.data}{', shard=True' if self.shard else ''})")
        return "+".join(parts)


@dataclass(frozen=True)
class Prediction:
    """What a step is expected to take.

    Args:
        computing_s: waiting in a pipeline left out.
        sending_s: what of it is not hidden behind computations.
        waiting_s: in a pipeline, for the first micro-batch to come and the last one to go.
        overhead_s: the framework's.
        held_bytes: weights, gradients and two moments on one device; activations are not counted.
        sent_bytes: that a device gives to its operations.
    """

    way: Way
    computing_s: float
    sending_s: float
    waiting_s: float
    overhead_s: float
    held_bytes: float
    sent_bytes: float

    @property
    def step_s(self) -> float:
        return self.computing_s + self.sending_s + self.waiting_s + self.overhead_s
