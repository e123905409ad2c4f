"""What a step takes whose program is compiled, as JAX's are: all that it sends is known, and how its stages are cut."""

from __future__ import annotations

from collections.abc import Sequence

from perfkit.measure.kept_memory import fresh
from perfkit.parallel.links import on_a_line
from perfkit.parallel.planning_parts import Cluster, Costs, Prediction, Program, Way

COPIES = 4
"""Weights, gradients and two moments."""

PACKED = 2
"""What taking weights out of a stage's row and putting gradients into one takes: as long as adding its gradients twice.

Adding reads two arrays and writes one. A row is read and its weights written, totals are begun, read and written.
"""


def of_program(costs: Costs, way: Way, program: Program, cluster: Cluster) -> Prediction:
    """What a step takes that runs such a program."""
    one_s = costs.passing_s(costs.rows / way.data / way.micro_batches) * program.kept
    computing_s, waiting_s, overhead_s = one_s, 0.0, costs.fresh_s * fresh(program.temporary)
    if way.pipeline > 1:
        times = stage_times(costs, program, one_s)
        computing_s = way.micro_batches * turn_s(times, way, cluster)
        waiting_s = passing_s(times, way, cluster) - computing_s
        overhead_s += PACKED * costs.adding_s * program.bytes / (costs.bytes or 1)
    return Prediction(
        way=way,
        computing_s=computing_s + costs.update_s * program.bytes / (costs.bytes or 1),
        sending_s=_handing_s(way, program, cluster)
        + sum(cluster.link.seconds(kind, size, ranks) * times for kind, size, ranks, times in program.sends),
        waiting_s=waiting_s + _filling_s(costs, program, cluster),
        overhead_s=overhead_s,
        held_bytes=COPIES * program.bytes,
        sent_bytes=2 * turns_of(way) * program.handed + sum(size * times for _, size, _, times in program.sends),
    )


def _filling_s(costs: Costs, program: Program, cluster: Cluster) -> float:
    """What filling memory takes longer where all other devices' threads wait for the last one, which fills its own.

    Devices that have threads to themselves fill at the same time.
    """
    if cluster.overlaps:
        return 0.0
    together_s = program.filled * (costs.filling_s + (costs.fresh_s if fresh(program.temporary) else 0.0))
    return together_s * (cluster.devices / cluster.crowding - 1)


def turns_of(way: Way) -> int:
    """Turns of a pipeline in one direction, until the last stage has had the last micro-batch."""
    return way.micro_batches + way.pipeline - 1


def _handing_s(way: Way, program: Program, cluster: Cluster) -> float:
    """What handing on takes in all turns: measured with all that belongs to it, or the messages of a link."""
    if way.pipeline == 1:
        return 0.0
    if cluster.turns:
        return turns_of(way) * on_a_line(cluster.turns, program.handed)
    return 2 * turns_of(way) * cluster.link.seconds("send", program.handed, way.pipeline)


def stage_times(costs: Costs, program: Program, one_s: float) -> list[float]:
    """Seconds of each stage's forward and backward of a micro-batch, which computes activations again.

    A pass of the whole model adds the gradients of all weights to those of the micro-batches before, and a stage those
    of its own; the rest of it is shared as operations take.

    Args:
        one_s: of a pass of the whole model.
    """
    adding_s = min(costs.adding_s, one_s)
    rest_s = one_s * costs.again - adding_s
    return [share * rest_s + adding_s * size / (costs.bytes or 1) for share, size in program.stages]


def passing_s(times: Sequence[float], way: Way, cluster: Cluster) -> float:
    """Seconds of all turns of a pipeline.

    Args:
        times: of the stages, while all devices compute.
    """
    working = ([times[stage] for stage in range(way.pipeline) if 0 <= turn - stage < way.micro_batches]
               for turn in range(turns_of(way)))  # fmt: skip
    return sum(turn_s(each, way, cluster) for each in working)


def turn_s(times: Sequence[float], way: Way, cluster: Cluster) -> float:
    """Seconds until every stage that has something to do is done; those that wait leave their cores to the others."""
    total_s, done_s = 0.0, 0.0
    for index, time_s in enumerate(sorted(times)):
        total_s += (time_s - done_s) * _slowed(len(times) - index, way, cluster)
        done_s = time_s
    return total_s


def _slowed(working: int, way: Way, cluster: Cluster) -> float:
    """How long something takes while so many stages work, as a share of how long while all devices do."""
    alone = 1 / cluster.crowding
    return alone + (1 - alone) * (working * way.data - 1) / (cluster.devices - 1)
