"""The planner's model of a step: its formulas, the layouts that there are, and what it is told."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from perfkit import InvalidInputError, UnsupportedError, cli
from perfkit._chain import chain_of
from perfkit.parallel.links import Measured, Ring
from perfkit.parallel.planning import balanced_units, candidates, predict, ranked, ways
from perfkit.parallel.planning_messages import BUCKET, FIRST_BUCKET, buckets
from perfkit.parallel.planning_parts import Cluster, Costs, Overheads, Program, Split, Stages, Unit, Way
from perfkit.parallel.planning_programs import passing_s, turn_s
from perfkit.parallel.planning_timing import MOST, in_turn, needed_passes, within
from perfkit.parallel.world import Alone

ROOT = Path(__file__).parents[2]
MB = 1_000_000
SLOW = Ring(1e-3, 1e9)
UNITS = tuple(Unit(name, seconds, 10 * MB, 2, MB) for name, seconds in zip("abcd", (0.1, 0.2, 0.1, 0.1), strict=True))
SPLIT = Split("b", 0.2, 0.5, 10 * MB, (("all_reduce", MB), ("gather_inside", MB)))
COSTS = Costs(
    rows=64,
    pass_s={4: 0.1, 8: 0.15, 32: 0.45, 64: 0.85},
    update_s=0.02,
    forward_s=0.6,
    units=UNITS,
    splits={2: (SPLIT,)},
    gradients=(5 * MB,) * 8,
)


def cluster(devices=2, link=SLOW, overlaps=False, **overheads):
    return Cluster(devices, link, overlaps, Overheads(**overheads))


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


def test_a_compiled_program_tells_what_is_sent():
    sends = (("all_reduce", 40 * MB, 2, 1), ("send", MB, 2, 18))
    way = Way(pipeline=2, micro_batches=8)
    stages = (0.6, 10 * MB), (0.4, 30 * MB)
    program = Program(sends, kept=0.5, bytes=10 * MB, stages=stages)
    known = dataclasses.replace(COSTS, programs={way: program}, again=1.25, adding_s=0.008)
    found = predict(known, way, cluster())
    rest = 0.15 * 0.5 * 1.25 - 0.008
    first, second = rest * 0.6 + 0.002, rest * 0.4 + 0.006
    assert found.computing_s == pytest.approx(8 * first + 0.02 / 4)
    assert found.waiting_s == pytest.approx(second), "the last turn is the second stage's"
    assert found.overhead_s == pytest.approx(2 * 0.008 / 4)
    assert found.sending_s == pytest.approx(SLOW.seconds("all_reduce", 40 * MB, 2) + 18 * SLOW.seconds("send", MB, 2))
    assert (found.held_bytes, found.sent_bytes) == (4 * 10 * MB, 58 * MB)
    assert [item.way for item in ranked(known, cluster())] == [way], "what was compiled, and no other"
    plain = Way(data=2)
    known = dataclasses.replace(COSTS, programs={plain: Program((), kept=1.0, bytes=40 * MB)})
    assert predict(known, plain, cluster()).step_s == pytest.approx(0.45 + 0.02)


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


class Counting(Alone):
    """A world that counts how often its processes meet; another process takes a second longer."""

    met = 0

    def barrier(self):
        self.met += 1

    def gather(self, value):
        return [value, value + 1.0]


def test_calls_are_timed_in_turn():
    made: list[str] = []
    calls = {name: lambda name=name: made.append(name) for name in "ab"}
    world = Counting()
    times = in_turn(calls, range(2), world)
    assert {name: len(found) for name, found in times.items()} == {"a": 2, "b": 2}
    assert world.met == 2 * (1 + 2)
    assert made == list("ab" * 4), "the slowest process' call is long enough by itself"
    made.clear()
    in_turn(calls, range(1))
    assert made == [*"abab", *"a" * MOST, *"b" * MOST], "a short one is made several times in a row"
    assert len(list(within(0.0))) == 3


def test_batch_sizes_that_layouts_lead_to():
    assert needed_passes(64, 4) == {4: 16, 8: 8, 16: 1, 32: 1, 64: 1}
    assert needed_passes(12, 3) == {1: 12, 4: 1, 12: 1}
    assert needed_passes(64, 8)[8] == 1, "the data axis needs it too"


def test_layouts_of_a_model():
    torch = pytest.importorskip("torch")
    from perfkit.parallel.planning_layouts import layouts

    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 8))
    before = [p.detach().clone() for p in model.parameters()]
    given = {"example_inputs": (torch.randn(8, 16),), "targets": torch.randn(8, 8), "loss": torch.nn.MSELoss()}
    given |= {"optimizer": torch.optim.SGD, "devices": 2, "budget_s": 0.01}
    found = layouts(model, link_gbps=10, **given)
    assert {str(item.way) for item in found.predictions} == {"data 2", "data 2, sharded", "tensor 2", "pipeline 2 of 8"}
    steps = [item.step_s for item in found.predictions]
    assert steps == sorted(steps)
    tensor = next(item for item in found.predictions if item.way.tensor == 2)
    assert tensor.sent_bytes == 8 * 8 * 4, "a pair of layers, of which the first one's inputs do not learn"
    assert found.best.way.recipe in str(found)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    with pytest.raises(UnsupportedError, match=r"1 process\(es\) for 2 devices"):
        layouts(model, **given)
    with pytest.raises(InvalidInputError, match="link_gbps=-1"):
        layouts(model, link_gbps=-1, **given)


def test_attention_is_planned_by_heads():
    """Its output, its bias' gradient and that of its inputs where they learn; and a pair of linear layers."""
    torch = pytest.importorskip("torch")
    from perfkit.parallel.planning_layouts import layouts

    x = torch.randn(8, 5, 16)
    layer = torch.nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    norm = torch.nn.LayerNorm(16)
    for model, learning in ((layer, 0), (torch.nn.Sequential(norm, layer), x.nbytes)):
        found = layouts(
            model, link_gbps=10, devices=2, budget_s=0.01, example_inputs=(x,), targets=x, loss=torch.nn.MSELoss(),
            optimizer=torch.optim.SGD,
        )  # fmt: skip
        tensor = next(item for item in found.predictions if item.way.tensor == 2)
        attention = x.nbytes + 3 * 16 * 4 + learning
        assert tensor.sent_bytes == attention + 2 * x.nbytes
        held = sum(p.nbytes for p in model.parameters())
        assert held / 2 < tensor.held_bytes / 4 < held * 0.6, (
            "weights, gradients and two moments, of half of the layers"
        )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--devices", "2"], "--devices: about several devices, add --parallel"),
        (["--parallel"], "say how many --devices"),
    ],
)
def test_the_command_line_says_what_is_missing(arguments, said):
    done = CliRunner().invoke(cli.main, ["plan", "cnn", *arguments])
    assert done.exit_code == 2
    assert said in done.output


FACTORY = """
import functools, torch

def make():
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 8))
    adam = functools.partial(torch.optim.Adam, lr=1e-3)
    x, y = torch.randn(8, 16), torch.randn(8, 8)
    return {"model": model, "example_inputs": (x,), "targets": y, "loss": torch.nn.MSELoss(), "optimizer": adam}

if __name__ == "__main__":
    from perfkit import cli
    from perfkit.parallel import planning_layouts

    planning_layouts.ROUNDS = 1
    cli.main(["plan", "planned_here:make", "--parallel", "--devices", "2"])
"""


def test_two_processes_measure_what_lies_between_them(tmp_path):
    pytest.importorskip("torch")
    (tmp_path / "planned_here.py").write_text(FACTORY)
    command = [sys.executable, "-m", "perfkit.cli", "launch", "--nproc", "2", "planned_here.py"]
    about = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | about, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "computing, link and framework, by 2 processes" in " ".join(done.stdout.split())
    for layout in ("data 2", "data 2, sharded", "tensor 2", "pipeline 2 of 8"):
        assert layout in done.stdout
    assert "FutureWarning" not in done.stderr


def test_the_example_of_the_page_runs(capsys):
    pytest.importorskip("torch")
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "planning.md").read_text(), re.DOTALL)
    exec(compile(code, "planning.md", "exec"), {})
    assert "the quickest as a recipe: " in capsys.readouterr().out


def test_the_pages_show_what_was_recorded():
    from bench import pages, plan_pages

    expected = {plan_pages.PLANNING: (plan_pages.PREDICTIONS, plan_pages.predictions())}
    expected |= {page: (plan_pages.SCALING, plan_pages.scaling(name)) for name, page in plan_pages.SPREAD.items()}
    for page, (marks, lines) in expected.items():
        shown = pages.between(page, marks)
        assert shown.strip() == "\n".join(lines).strip(), "run python -m bench.plan --page"


def launched(predicted_ms, steps_ms, one_ms):
    about = {"framework": "torch", "model": "m", "processes": 2, "layout": "data 2", "recipe": "data_parallel(2)"}
    predicted = {"predicted_ms": predicted_ms, "parts_ms": {"computing": predicted_ms}}
    return about | predicted | {"steps_ms": [steps_ms] * 8, "one_ms": [one_ms] * 8, "all_cores_ms": []}


def test_launches_are_summed_up_by_their_medians():
    from bench import plan, plan_pages

    described = {"sent_bytes": 1e3, "communicating": None, "held_bytes": 2048, "peak_bytes": None}
    (found,) = plan.summed_up(
        [launched(10.0, 10.0, 15.0) | described, launched(12.0, 10.0, 15.0), launched(9.0, 12.0, 18.0)]
    )
    assert (found["predicted_ms"], found["measured_ms"], found["launches"]) == (10.0, 10.0, 3)
    assert (found["ratio"], found["lowest"], found["highest"]) == (1.0, 0.75, 1.2)
    assert found["scaling"]["one"] == pytest.approx({"ratio": 1.5, "low": 1.5, "high": 1.5, "pairs": 24})
    assert found["scaling"]["all_cores"] is None
    assert json.dumps(found)
    cells = [cell.strip() for cell in plan_pages.scaling_line(found).split("|")[1:-1]]
    assert cells[3:7] == ["15.0 → 10.0 ms", "1.50× [1.50, 1.50]", "75%", "–"]
    assert cells[-2:] == ["unavailable", "2.00 KiB, unavailable"]


def test_no_launch_begins_that_would_end_too_late(monkeypatch, capsys):
    from bench import plan

    made, clock = [], iter(range(0, 600, 60))  # each look at the clock is a minute later
    monkeypatch.setattr(plan.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(plan, "launched", lambda *about, **_: made.append(about[1]) or [launched(1.0, 1.0, 1.0)])
    options = plan._parser().parse_args(["--quick", "--minutes", "7", "--repeats", "9", "--processes", "2"])
    plan.record("torch", options)
    assert made == [2, 2]
    assert "7 minutes are nearly over after 2 launches" in capsys.readouterr().out
