"""The planner's model of a step whose program is compiled."""

import dataclasses

import pytest
from planned import COSTS, MB, SLOW, cluster

from perfkit.measure.kept_memory import KEPT_BYTES
from perfkit.parallel.planning import predict, ranked
from perfkit.parallel.planning_parts import Program, Way
from perfkit.parallel.planning_programs import passing_s, turn_s


def test_a_compiled_program_tells_what_is_sent():
    sends = (("all_reduce", 40 * MB, 2, 1),)
    way = Way(pipeline=2, micro_batches=8)
    stages = (0.6, 10 * MB), (0.4, 30 * MB)
    program = Program(sends, kept=0.5, bytes=10 * MB, stages=stages, handed=MB)
    known = dataclasses.replace(COSTS, programs={way: program}, again=1.25, adding_s=0.008)
    found = predict(known, way, cluster())
    rest = 0.15 * 0.5 * 1.25 - 0.008
    first, second = rest * 0.6 + 0.002, rest * 0.4 + 0.006
    assert found.computing_s == pytest.approx(8 * first + 0.02 / 4)
    assert found.waiting_s == pytest.approx(second), "the last turn is the second stage's"
    assert found.overhead_s == pytest.approx(2 * 0.008 / 4)
    assert found.sending_s == pytest.approx(SLOW.seconds("all_reduce", 40 * MB, 2) + 18 * SLOW.seconds("send", MB, 2))
    assert (found.held_bytes, found.sent_bytes) == (4 * 10 * MB, 58 * MB)
    measured = predict(known, way, dataclasses.replace(cluster(), turns=((0, 0.001), (2 * MB, 0.003))))
    assert measured.sending_s == pytest.approx(SLOW.seconds("all_reduce", 40 * MB, 2) + 9 * 0.002), "all of a turn"
    assert [item.way for item in ranked(known, cluster())] == [way], "what was compiled, and no other"
    plain = Way(data=2)
    known = dataclasses.replace(COSTS, programs={plain: Program((), kept=1.0, bytes=40 * MB)})
    assert predict(known, plain, cluster()).step_s == pytest.approx(0.45 + 0.02)


@pytest.mark.parametrize(("temporary", "pages_s"), [(KEPT_BYTES, 0.0), (KEPT_BYTES + MB, (KEPT_BYTES + MB) * 1e-9)])
def test_a_program_pays_for_memory_that_the_system_gives_anew(temporary, pages_s):
    way = Way(data=2)
    program = Program((), kept=1.0, bytes=40 * MB, temporary=temporary)
    known = dataclasses.replace(COSTS, programs={way: program}, fresh_s=1e-9)
    assert predict(known, way, cluster()).overhead_s == pytest.approx(pages_s)


@pytest.mark.parametrize(
    ("overlaps", "crowding", "times"), [(True, 1.0, 0), (False, 1.0, 1), (False, 2.0, 0), (False, 1.6, 0.25)]
)
def test_devices_that_share_threads_fill_memory_one_after_the_other(overlaps, crowding, times):
    way = Way(data=2, shard=True)
    known = dataclasses.replace(COSTS, fresh_s=1e-9, filling_s=2e-9)
    programs = [Program((), kept=1.0, bytes=40 * MB, temporary=size, filled=MB) for size in (MB, KEPT_BYTES + 1)]
    shared = dataclasses.replace(cluster(2), overlaps=overlaps, crowding=crowding)
    found = [predict(dataclasses.replace(known, programs={way: each}), way, shared).waiting_s for each in programs]
    assert found == pytest.approx([times * MB * 2e-9, times * MB * 3e-9])


def test_stages_that_wait_leave_their_cores_to_the_others():
    way, times = Way(pipeline=2, micro_batches=8), [0.3, 0.1]
    shared = dataclasses.replace(cluster(), crowding=2.0)
    assert turn_s(times, way, cluster()) == pytest.approx(0.3)
    assert passing_s(times, way, cluster()) == pytest.approx(0.3 * 8 + 0.1)
    assert turn_s(times, way, shared) == pytest.approx(0.1 + 0.2 / 2), "both, then the longer one twice as quick"
    assert passing_s(times, way, shared) == pytest.approx(8 * (0.3 + 0.1) / 2), "two devices on one core"
    two = Way(data=2, pipeline=2, micro_batches=8)
    shared = dataclasses.replace(cluster(4), crowding=2.0)
    assert turn_s([0.3], two, shared) == pytest.approx(0.3 * (1 / 2 + 1 / 2 / 3)), "two of four devices"
