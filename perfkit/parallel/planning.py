"""Which layout of several devices makes a training step shortest: a model of its time, from measured parts.

docs/planning.md has the formulas. Nothing here measures; `torch_costs` and `torch_link` do.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from perfkit._errors import InvalidInputError
from perfkit.parallel.links import Link

BACKWARD = 2 / 3
"""Share of a forward and backward pass that is backward: behind it gradients can be sent."""

FIRST_BUCKET, BUCKET = 1 << 20, 25 << 20
"""Bytes of DistributedDataParallel's messages."""

MICRO_BATCHES = 4
"""Of a pipeline, for each of its devices."""

COPIES = 4
"""Weights, gradients and two moments."""


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
class Costs:
    """What a training step costs on one device.

    Args:
        rows: of the whole batch.
        pass_s: seconds of forward and backward by rows, on as many devices at a time as there will be.
        update_s: of the optimizer's step.
        units: in the order of their calls.
        splits: by number of devices along "tensor".
        bytes, tensors: of all parameters that are trained, and how many they are.
    """

    rows: int
    pass_s: Mapping[int, float]
    update_s: float
    units: tuple[Unit, ...]
    splits: Mapping[int, tuple[Split, ...]]
    bytes: int
    tensors: int

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
    """

    devices: int
    link: Link
    overlaps: bool = True
    overheads: Overheads = field(default_factory=Overheads)


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


def ranked(costs: Costs, cluster: Cluster) -> list[Prediction]:
    """Every way to spread the model over all devices, the quickest first.

    Raises:
        InvalidInputError: there is none: the batch cannot be divided, and no layer can be split.
    """
    found = [predict(costs, way, cluster) for way in ways(costs, cluster.devices)]
    if not found:
        raise InvalidInputError(
            f"{costs.rows} rows and {len(costs.units)} unit(s) cannot be shared by {cluster.devices} devices: "
            "take a batch that the number of devices divides"
        )
    return sorted(found, key=lambda prediction: prediction.step_s)


def ways(costs: Costs, devices: int) -> Iterator[Way]:
    """The layouts that perfkit's recipes can make of so many devices."""
    divisors = [number for number in range(1, devices + 1) if devices % number == 0]
    for pipeline, tensor in itertools.product(divisors, divisors):
        data, over = divmod(devices, pipeline * tensor)
        if over or costs.rows % data or (pipeline > 1 and (tensor > 1 or pipeline > len(costs.units))):
            continue
        if tensor > 1 and not costs.splits.get(tensor):
            continue
        micro_batches = _micro_batches(costs.rows // data, pipeline)
        if pipeline > 1 and not micro_batches:
            continue
        for shard in (False, True) if data > 1 and pipeline == 1 else (False,):
            if tensor == 1 or shard or data == 1:  # DistributedDataParallel does not take the parts of tensor_parallel
                yield Way(data, tensor, pipeline, shard, micro_batches if pipeline > 1 else 1)


def predict(costs: Costs, way: Way, cluster: Cluster) -> Prediction:
    """What a step takes when the model is spread in that way."""
    rows = costs.rows / way.data
    share = 1 / way.data  # of the batch, and so of activations
    splits = costs.splits.get(way.tensor, ()) if way.tensor > 1 else ()
    total_s = sum(unit.seconds for unit in costs.units) or 1.0
    kept = 1 - min(sum(split.seconds * (1 - split.left) for split in splits) / total_s, 1.0)
    held = costs.bytes - sum(split.bytes for split in splits) * (1 - 1 / way.tensor)
    stages = stages_of(costs.units, way.pipeline)
    longest = max(sum(unit.seconds for unit in stage) for stage in stages) / total_s if way.pipeline > 1 else 1.0
    if way.pipeline > 1:
        held = max(sum(unit.bytes for unit in stage) for stage in stages)
    one_s = costs.passing_s(rows / way.micro_batches) * kept * longest
    computing_s, waiting_s = one_s * way.micro_batches, one_s * (way.pipeline - 1)
    update_s = costs.update_s * held / (costs.bytes or 1) / (way.data if way.shard else 1)

    sent = [(kind, size * share, way.tensor) for split in splits for kind, size in split.sends]
    sending_s = sum(cluster.link.seconds(kind, size, ranks) for kind, size, ranks in sent)
    if way.pipeline > 1:
        cut = max(stage[-1].output_bytes for stage in stages[:-1]) * share / way.micro_batches
        rounds = 2 * (way.micro_batches + way.pipeline - 1)
        sending_s += rounds * cluster.link.seconds("send", cut, 2) * (0.5 if cluster.overlaps else 1.0)
        sent += [("send", cut, 2)] * 2 * way.micro_batches
    messages = list(_gradients(costs, way, held))
    sending_s += _exposed(messages, computing_s, way, cluster)
    if way.data > 1 or way.pipeline > 1:
        messages.append(("all_reduce", 4.0, max(way.data, 2)))  # the loss
        sending_s += cluster.link.seconds(*messages[-1])
    return Prediction(
        way=way,
        computing_s=computing_s + update_s,
        sending_s=sending_s,
        waiting_s=waiting_s,
        overhead_s=_overhead(costs, way, splits, cluster.overheads),
        held_bytes=COPIES * held / (way.data if way.shard else 1),
        sent_bytes=sum(size for _, size, _ in [*sent, *messages]),
    )


def stages_of(units: Sequence[Unit], count: int) -> list[Sequence[Unit]]:
    """The units in `count` stages, of which the longest is the shortest possible."""
    choices = itertools.combinations(range(1, len(units)), count - 1)
    cut = lambda cuts: [units[start:end] for start, end in itertools.pairwise((0, *cuts, len(units)))]  # noqa: E731
    return min(map(cut, choices), key=lambda stages: max(sum(unit.seconds for unit in stage) for stage in stages))


def _micro_batches(rows: int, pipeline: int) -> int:
    """The largest number of equal parts up to `MICRO_BATCHES` for each device; 0 where there is none."""
    return max((n for n in range(pipeline, MICRO_BATCHES * pipeline + 1) if rows % n == 0), default=0)


def _gradients(costs: Costs, way: Way, held: float) -> Iterator[tuple[str, float, int]]:
    """The messages along "data" in one step, the last one of the backward pass at the end."""
    if way.data == 1:
        return
    if way.shard:
        part = held / (costs.bytes or 1)
        for unit in costs.units:
            for kind in ("all_gather", "all_gather", "reduce_scatter"):
                if unit.bytes:
                    yield kind, unit.bytes * part, way.data
        return
    rest = held
    while rest > 0:
        size = min(rest, BUCKET if rest > FIRST_BUCKET + BUCKET or rest <= BUCKET else rest - FIRST_BUCKET)
        yield "all_reduce", size, way.data
        rest -= size


def _exposed(messages: Sequence[tuple[str, float, int]], computing_s: float, way: Way, cluster: Cluster) -> float:
    """What of the messages along "data" is not hidden behind computations."""
    if not messages:
        return 0.0
    each = [cluster.link.seconds(*message) for message in messages]
    if not cluster.overlaps:
        return sum(each)
    behind_s = computing_s if way.shard else computing_s * BACKWARD
    return max(sum(each) - behind_s, each[-1])


def _overhead(costs: Costs, way: Way, splits: Sequence[Split], overheads: Overheads) -> float:
    found = overheads.split * len(splits)
    if way.data > 1:
        units = sum(unit.bytes > 0 for unit in costs.units)
        found += overheads.unit * units + overheads.tensor * costs.tensors if way.shard else overheads.step
    if way.pipeline > 1:
        found += overheads.micro_batch * (way.micro_batches + way.pipeline - 1)
    return found
