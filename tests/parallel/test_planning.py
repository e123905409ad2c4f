"""The planner's model of a step: its formulas, and the layouts that there are."""

import dataclasses

import pytest
from planned import COSTS, MB, SLOW, UNITS, cluster

from perfkit import InvalidInputError
from perfkit._chain import chain_of
from perfkit.parallel.links import Measured, Ring
from perfkit.parallel.planning import balanced_units, candidates, predict, ranked, ways
from perfkit.parallel.planning_messages import BUCKET, FIRST_BUCKET, buckets
from perfkit.parallel.planning_parts import Costs, Stages, Way


def test_a_ring_sends_each_byte_almost_twice():
    assert SLOW.seconds("all_reduce", 4 * MB, 4) == pytest.approx(6 * 1e-3 + 2 * 3 / 4 * 4e-3)
    assert SLOW.seconds("all_gather", 4 * MB, 4) == pytest.approx(3 * 1e-3 + 3 / 4 * 4e-3)
    assert SLOW.seconds("send", 4 * MB, 2) == pytest.approx(1e-3 + 4e-3)
    assert SLOW.seconds("all_reduce", MB, 1) == 0


def test_a_measured_link_is_a_line_between_what_was_measured():
    link = Measured(4, {"all_reduce": [(0, 1e-3), (MB, 2e-3), (2 * MB, 6e-3)], "send": [(4, 1e-3)]})
    assert link.seconds("all_reduce", MB / 2, 4) == pytest.approx(1.5e-3)
    assert link.seconds("all_reduce", 3 * MB, 4) == pytest.approx(10e-3)
    assert link.seconds("all_reduce", MB, 2) == pytest.approx(2e-3 / 3), "a ring of two has a third of the rounds"
    assert link.seconds("send", MB, 2) == 1e-3


def test_passes_between_measured_batch_sizes_are_on_a_line():
    assert COSTS.passing_s(8) == pytest.approx(0.15)
    assert COSTS.passing_s(20) == pytest.approx(0.3)
    assert COSTS.passing_s(128) == pytest.approx(0.85 + 64 * 0.4 / 32)


def test_data_parallel_is_a_part_of_the_batch_and_the_gradients():
    found = predict(COSTS, Way(data=2), cluster(step=0.005))
    sent = sum(SLOW.seconds("all_reduce", size * MB, 2) for size in (5, 30, 5))
    assert found.computing_s == pytest.approx(0.45 + 0.02)
    assert found.sending_s == pytest.approx(sent + SLOW.seconds("all_reduce", 4, 2))
    assert (found.waiting_s, found.overhead_s) == (0, 0.005)
    assert found.held_bytes == 4 * 40 * MB
    assert found.step_s == pytest.approx(found.computing_s + found.sending_s + 0.005)


def test_what_overlaps_hides_all_but_the_last_message():
    slow, quick = (predict(COSTS, Way(data=2), cluster(overlaps=overlaps)) for overlaps in (False, True))
    last = SLOW.seconds("all_reduce", 5 * MB, 2)
    assert quick.sending_s == pytest.approx(last + SLOW.seconds("all_reduce", 4, 2))
    assert quick.sending_s < slow.sending_s
    assert quick.sent_bytes == slow.sent_bytes


def test_gradients_fill_buckets_as_they_come():
    small, large = FIRST_BUCKET // 4, 2 * BUCKET
    assert list(buckets([small] * 6)) == [4 * small, 2 * small], "the first one goes off early"
    assert list(buckets([small, large, small, large])) == [small + large, small + large]
    assert list(buckets([])) == []


def test_torch_fills_its_buckets_so():
    torch = pytest.importorskip("torch")
    sizes = (FIRST_BUCKET // 4,) * 6
    tensors = [torch.empty(size // 4) for size in sizes]
    groups, _ = torch.distributed._compute_bucket_assignment_by_size(tensors, [FIRST_BUCKET, BUCKET])
    assert [sum(sizes[index] for index in group) for group in groups] == list(buckets(sizes))


def test_shards_update_their_part_and_gather_each_unit_twice():
    found = predict(COSTS, Way(data=2, shard=True), cluster(unit=1e-3, tensor=1e-4))
    gathered = SLOW.seconds("all_gather", 10 * MB, 2)
    assert found.computing_s == pytest.approx(0.45 + 0.01)
    assert found.sending_s == pytest.approx(12 * gathered + SLOW.seconds("all_reduce", 4, 2))
    assert found.overhead_s == pytest.approx(4 * 1e-3 + 8 * 1e-4)
    assert found.held_bytes == 4 * 20 * MB


def test_split_layers_take_what_their_parts_take_and_send_for_the_whole_batch():
    found = predict(COSTS, Way(tensor=2), cluster(split=1e-3))
    assert found.computing_s == pytest.approx(0.85 * (1 - 0.2 / 0.6 * 0.5) + 0.02 * 35 / 40)
    assert found.sending_s == pytest.approx(sum(SLOW.seconds(kind, MB, 2) for kind in ("all_reduce", "all_gather")))
    assert found.overhead_s == 1e-3
    both = predict(COSTS, Way(data=2, tensor=2, shard=True), cluster(4))
    assert both.computing_s == pytest.approx(0.45 * (1 - 0.1 / 0.6) + 0.02 * 35 / 40 / 2)


def test_a_pipeline_waits_for_its_first_and_last_micro_batch():
    found = predict(COSTS, Way(pipeline=2, micro_batches=8), cluster(micro_batch=1e-3))
    one = 0.15 * 0.3 / 0.5  # units a and b, of four
    assert found.computing_s == pytest.approx(8 * one + 0.02 / 2)
    assert found.waiting_s == pytest.approx(one)
    assert found.sending_s == pytest.approx(2 * 9 * SLOW.seconds("send", MB / 8, 2) + SLOW.seconds("all_reduce", 4, 2))
    assert found.overhead_s == pytest.approx(9e-3)


def test_stages_split_once_more_send_for_each_micro_batch():
    found = predict(COSTS, Way(tensor=2, pipeline=2, micro_batches=8), cluster(4, split=1e-3))
    plain = predict(COSTS, Way(pipeline=2, micro_batches=8), cluster(4))
    kept, longest = 1 - 0.2 / 0.6 * 0.5, 0.3 / 0.5
    assert found.waiting_s == pytest.approx(plain.waiting_s * kept)
    each = sum(SLOW.seconds(kind, MB / 8, 2) for kind in ("all_reduce", "all_gather"))
    assert found.sending_s - plain.sending_s == pytest.approx(9 * longest * each), "the longest stage has most layers"
    assert found.overhead_s == pytest.approx(9 * longest * 1e-3)
    assert found.sent_bytes - plain.sent_bytes == pytest.approx(longest * 2 * MB)
    assert found.held_bytes == pytest.approx(plain.held_bytes * 35 / 40)


def test_shards_of_a_stage_are_gathered_once():
    shared = Way(data=2, shard=True, pipeline=2, micro_batches=8)
    found = predict(COSTS, shared, cluster(4, unit=1e-3, tensor=1e-4))
    plain = predict(COSTS, Way(pipeline=2, micro_batches=8), cluster(4))
    gathered = sum(SLOW.seconds(kind, 20 * MB, 2) for kind in ("all_gather", "reduce_scatter"))
    halved = 18 * (SLOW.seconds("send", MB / 8, 2) - SLOW.seconds("send", MB / 16, 2))  # rows of a process
    assert found.sending_s == pytest.approx(plain.sending_s - halved + gathered)
    assert found.overhead_s == pytest.approx(1e-3 + 8 / 2 * 1e-4)
    assert found.held_bytes == plain.held_bytes / 2


def test_stages_are_balanced():
    assert [len(stage) for stage in balanced_units(UNITS, 2)] == [2, 2]
    assert [[unit.name for unit in stage] for stage in balanced_units(UNITS, 3)] == [["a"], ["b"], ["c", "d"]]


def test_stages_that_are_known_are_taken():
    known = dataclasses.replace(COSTS, stages={2: Stages(0.5, 15 * MB, 3 * MB)})
    found = predict(known, Way(pipeline=2, micro_batches=8), cluster())
    assert found.waiting_s == pytest.approx(0.15 * 0.5)
    assert found.held_bytes == 4 * 15 * MB
    assert found.sent_bytes == 16 * 3 * MB / 8 + 4


def test_the_layouts_are_those_that_recipes_can_make():
    found = set(map(str, ways(COSTS, 4)))
    assert found == {
        "data 4",
        "data 4, sharded",
        "data 2, sharded × tensor 2",  # DistributedDataParallel does not take the parts of tensor_parallel
        "pipeline 2 of 8 × data 2",
        "pipeline 2 of 8 × data 2, sharded",
        "pipeline 2 of 8 × tensor 2",
        "pipeline 4 of 16",
    }
    for way in ways(COSTS, 4):
        assert all(recipe.size for recipe in chain_of(way.recipe))
    with pytest.raises(InvalidInputError, match="64 rows and 1 unit"):
        ranked(Costs(64, {64: 1.0}, 0.1, 0.3, UNITS[:1], {}, (MB,)), cluster(3))


def test_a_quick_link_is_used_and_a_slow_one_avoided():
    first = {speed: ranked(COSTS, cluster(4, Ring(1e-6, speed), overlaps=True))[0].way for speed in (1e6, 1e11)}
    assert first[1e11].data == 4
    assert first[1e6].data < 4


def test_a_stage_that_waits_leaves_its_core_to_others():
    known = dataclasses.replace(COSTS, stages={4: Stages(0.4, 10 * MB, MB)})
    way = Way(pipeline=4, micro_batches=16)
    alone, crowded = (
        predict(known, way, dataclasses.replace(cluster(4), crowding=crowding)) for crowding in (1.0, 2.0)
    )
    assert alone.waiting_s == pytest.approx(3 * 0.4 * 0.1)
    assert crowded.waiting_s == pytest.approx(alone.waiting_s / 2)
    update_s = COSTS.update_s / 4
    assert alone.computing_s == pytest.approx(16 * 0.1 * 0.4 + update_s)
    assert crowded.computing_s == pytest.approx(16 * 0.1 / 4 + update_s), "no sooner than the cores have done the work"
    heavy = dataclasses.replace(known, stages={4: Stages(0.4, 32 * MB, MB)})
    alone, crowded = (
        predict(heavy, way, dataclasses.replace(cluster(4), crowding=crowding)) for crowding in (1.0, 2.0)
    )
    assert alone.computing_s - 16 * 0.1 * 0.4 == pytest.approx(COSTS.update_s * 32 / 40)
    assert crowded.computing_s - 16 * 0.1 / 4 == pytest.approx(COSTS.update_s * 32 / 40 / 2), "others have updated less"


def test_layouts_by_which_a_batch_can_be_divided():
    found = set(map(str, candidates(12, 4)))
    assert found == {
        "data 4",
        "data 4, sharded",
        "tensor 4",
        "data 2 × tensor 2",
        "data 2, sharded × tensor 2",
        "pipeline 2 of 6 × data 2",
        "pipeline 2 of 6 × data 2, sharded",
        "pipeline 2 of 6 × tensor 2",
        "pipeline 4 of 12",
    }
    assert set(map(str, candidates(7, 2))) == {"tensor 2", "pipeline 2 of 7"}
