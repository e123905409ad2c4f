"""Which layout of several devices makes a training step shortest: a model of its time, from measured parts.

docs/planning.md has the formulas. Nothing here measures: `torch_costs` and `torch_calibration` do, or `jax_costs`,
`jax_link` and `jax_programs`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from perfkit._errors import InvalidInputError
from perfkit.parallel.pipeline_plan import MICRO_BATCHES
from perfkit.parallel.planning_messages import exposed_s, gradients
from perfkit.parallel.planning_parts import Cluster, Costs, Overheads, Prediction, Stages, Unit, Way
from perfkit.parallel.planning_programs import COPIES, of_program


def ranked(costs: Costs, cluster: Cluster) -> list[Prediction]:
    """Every way to spread the model over all devices, the quickest first.

    Raises:
        InvalidInputError: there is none: the batch cannot be divided, and no layer can be split.
    """
    found = [predict(costs, way, cluster) for way in costs.programs or ways(costs, cluster.devices)]
    if not found:
        raise InvalidInputError(
            f"{costs.rows} rows and {len(costs.units)} unit(s) cannot be shared by {cluster.devices} devices: "
            "take a batch that the number of devices divides"
        )
    return sorted(found, key=lambda prediction: prediction.step_s)


def candidates(rows: int, devices: int) -> Iterator[Way]:
    """The layouts of so many devices by which a batch can be divided."""
    divisors = [number for number in range(1, devices + 1) if devices % number == 0]
    for pipeline, tensor in itertools.product(divisors, divisors):
        data, over = divmod(devices, pipeline * tensor)
        if over or rows % data:
            continue
        micro_batches = _micro_batches(rows // data, pipeline) if pipeline > 1 else 1
        for shard in (False, True) if data > 1 else (False,):
            if micro_batches:
                yield Way(data, tensor, pipeline, shard, micro_batches)


def ways(costs: Costs, devices: int) -> Iterator[Way]:
    """The layouts that perfkit's recipes can make of a torch model."""
    for way in candidates(costs.rows, devices):
        if way.pipeline > len(costs.units) and way.pipeline not in costs.stages:
            continue
        if way.tensor > 1 and not costs.splits.get(way.tensor):
            continue
        if way.tensor == 1 or way.shard or way.data == 1:  # DistributedDataParallel takes no parts of tensor_parallel
            yield way


def predict(costs: Costs, way: Way, cluster: Cluster) -> Prediction:
    """What a step takes when the model is spread in that way."""
    if way in costs.programs:
        return of_program(costs, way, costs.programs[way], cluster)
    share = 1 / way.data  # of the batch, and so of activations
    splits = costs.splits.get(way.tensor, ()) if way.tensor > 1 else ()
    kept = 1 - min(sum(split.seconds * (1 - split.left) for split in splits) / costs.forward_s, 1.0)
    stages = stages_of(costs, way.pipeline)
    held = stages.bytes * (1 - sum(split.bytes for split in splits) * (1 - 1 / way.tensor) / (costs.bytes or 1))
    one_s = costs.passing_s(costs.rows * share / way.micro_batches) * kept
    computing_s, waiting_s = _turns(one_s, stages.longest, way, cluster)
    updated = held / (costs.bytes or 1) / (way.data if way.shard else 1)
    if way.pipeline > 1:  # stages that hold less are done sooner
        updated = max(updated / cluster.crowding, 1 / way.pipeline)

    turns = way.micro_batches + way.pipeline - 1
    sent = [(kind, size * share / way.micro_batches, way.tensor) for split in splits for kind, size in split.sends]
    sending_s = sum(cluster.link.seconds(*message) for message in sent) * turns * stages.longest
    sent_bytes = sum(size for _, size, _ in sent) * way.micro_batches * stages.longest
    if way.pipeline > 1:
        cut = stages.cut_bytes * share / way.micro_batches
        sending_s += 2 * turns * cluster.link.seconds("send", cut, 2) * (0.5 if cluster.overlaps else 1.0)
        sent_bytes += 2 * way.micro_batches * cut
    messages = gradients(costs, way, held)
    sending_s += exposed_s(messages, computing_s, way, cluster)
    if way.data > 1 or way.pipeline > 1:
        messages.append(("all_reduce", 4.0, max(way.data, 2)))  # the loss
        sending_s += cluster.link.seconds(*messages[-1])
    return Prediction(
        way=way,
        computing_s=computing_s + costs.update_s * updated,
        sending_s=sending_s,
        waiting_s=waiting_s,
        overhead_s=_overhead(costs, way, len(splits) * stages.longest, cluster.overheads),
        held_bytes=COPIES * held / (way.data if way.shard else 1),
        sent_bytes=sent_bytes + sum(size for _, size, _ in messages),
    )


def _turns(one_s: float, longest: float, way: Way, cluster: Cluster) -> tuple[float, float]:
    """Seconds of computing and of waiting in the passes of a step.

    Args:
        one_s: of a pass of the whole model.
        longest: the longest stage's share of it.
    """
    longest /= cluster.crowding  # a stage that waits leaves its core to those that do not
    return one_s * way.micro_batches * max(longest, 1 / way.pipeline), one_s * longest * (way.pipeline - 1)


def stages_of(costs: Costs, count: int) -> Stages:
    """The stages of a pipeline of so many devices; one stage is the model."""
    if count == 1:
        return Stages(1.0, costs.bytes, 0)
    if count in costs.stages:
        return costs.stages[count]
    stages = balanced_units(costs.units, count)
    total_s = sum(unit.seconds for unit in costs.units) or 1.0
    return Stages(
        longest=max(sum(unit.seconds for unit in stage) for stage in stages) / total_s,
        bytes=max(sum(unit.bytes for unit in stage) for stage in stages),
        cut_bytes=max(stage[-1].output_bytes for stage in stages[:-1]),
    )


def balanced_units(units: Sequence[Unit], count: int) -> list[Sequence[Unit]]:
    """The units in `count` stages, of which the longest is the shortest possible."""
    choices = (
        [units[start:end] for start, end in itertools.pairwise((0, *cuts, len(units)))]
        for cuts in itertools.combinations(range(1, len(units)), count - 1)
    )
    return min(choices, key=lambda stages: max(sum(unit.seconds for unit in stage) for stage in stages))


def _micro_batches(rows: int, pipeline: int) -> int:
    """The largest number of equal parts up to `MICRO_BATCHES` for each device; 0 where there is none."""
    return max((n for n in range(pipeline, MICRO_BATCHES * pipeline + 1) if rows % n == 0), default=0)


def _overhead(costs: Costs, way: Way, splits: float, overheads: Overheads) -> float:
    """What the framework adds.

    Args:
        splits: how many layers of a stage are split.
    """
    turns = way.micro_batches + way.pipeline - 1
    found = overheads.split * splits * turns
    if way.data > 1:
        units = 1 if way.pipeline > 1 else sum(unit.bytes > 0 for unit in costs.units)
        tensors = len(costs.gradients) / way.pipeline
        found += overheads.unit * units + overheads.tensor * tensors if way.shard else overheads.step
    if way.pipeline > 1:
        found += overheads.micro_batch * turns
    return found
