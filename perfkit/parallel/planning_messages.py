"""What a torch layout sends along "data" in a step, and what of it computations do not hide."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from perfkit.parallel.planning_parts import Cluster, Costs, Way

BACKWARD = 2 / 3
"""Share of a forward and backward pass that is backward: behind it gradients can be sent."""

FIRST_BUCKET, BUCKET = 1 << 20, 25 << 20
"""Bytes at which DistributedDataParallel closes its first bucket, so that sending begins soon, and any other one."""

Message = tuple[str, float, int]
"""Kind of operation, bytes, devices."""


def buckets(gradients: Iterable[float]) -> Iterator[float]:
    """Bytes of DistributedDataParallel's messages: gradients as they come, until a bucket is full.

    Source: `compute_bucket_assignment_by_size` in torch/csrc/distributed/c10d/reducer.cpp
    """
    size, limit = 0.0, FIRST_BUCKET
    for each in gradients:
        size += each
        if size >= limit:
            yield size
            size, limit = 0.0, BUCKET
    if size:
        yield size


def gradients(costs: Costs, way: Way, held: float) -> list[Message]:
    """The messages along "data" in one step, the last one of the backward pass at the end.

    Args:
        held: bytes of the parameters that one device works on.
    """
    if way.data == 1:
        return []
    part = held / (costs.bytes or 1)
    if not way.shard:
        return [("average", size, way.data) for size in buckets(each * part for each in costs.gradients)]
    if way.pipeline > 1:  # a stage is gathered for the step, and its gradients are sent after the last micro-batch
        return [("all_gather", held, way.data), ("reduce_scatter", held, way.data)]
    kinds = ("all_gather", "all_gather", "reduce_scatter")
    return [(kind, unit.bytes * part, way.data) for unit in costs.units for kind in kinds if unit.bytes]


def exposed_s(messages: Sequence[Message], computing_s: float, way: Way, cluster: Cluster) -> float:
    """What of the messages along "data" is not hidden behind computations."""
    if not messages:
        return 0.0
    each = [cluster.link.seconds(*message) for message in messages]
    if not cluster.overlaps:
        return sum(each)
    behind_s = computing_s if way.shard else computing_s * BACKWARD
    return max(sum(each) - behind_s, each[-1])
