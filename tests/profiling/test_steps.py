"""`perfkit.profiling.steps`: what a loop's steps take, by a clock that the test moves; in one process and in two."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from perfkit import InvalidInputError, Quantity
from perfkit.profiling import Steps, _steps, merged, steps

WORKER = Path(__file__).with_name("steps_worker.py")


@pytest.fixture
def clock(monkeypatch):
    """Time passes when the test says so."""
    now = SimpleNamespace(s=0.0)
    monkeypatch.setattr(_steps, "time", SimpleNamespace(perf_counter=lambda: now.s))
    return now


def looped(clock, count=20, data_s=0.030, compute_s=0.010, sync_s=0.0, **options):
    """A loop whose parts take what is asked for."""
    profiler = steps(**options)

    def loader():
        for _ in range(count):
            clock.s += data_s
            yield SimpleNamespace(shape=(8, 3))

    with profiler:
        profiler._rest = lambda outputs: setattr(clock, "s", clock.s + sync_s if outputs is not None else clock.s)
        for _ in profiler.batches(loader()):
            clock.s += compute_s
            profiler.step("loss")
    return profiler


def test_a_slow_loader_is_found(clock):
    found = looped(clock).report
    assert found.counted == 17
    assert found.data_ms.value == pytest.approx(30)
    assert found.compute_ms.value == pytest.approx(10)
    assert found.data_share.value == pytest.approx(0.75)
    assert found.throughput.value == pytest.approx(8 / 0.040)
    assert found.step.median_ms == pytest.approx(40)
    (finding,) = [one for one in found.findings if one.kind == "waiting for data"]
    assert finding.share == pytest.approx(0.75)
    assert finding.predicted.value == pytest.approx(4)
    assert "75.0%" in finding.told
    assert "Load ahead" in str(found)


def test_a_quick_loader_is_no_finding(clock):
    assert looped(clock, data_s=0.0001).report.findings == ()


def test_a_report_is_read_back_and_merged_from_files(clock, tmp_path):
    paths = [tmp_path / f"steps.rank{rank}.json" for rank in (0, 1)]
    quick = looped(clock, data_s=0, sync_s=0.005, every=5).report
    for rank, path in enumerate(paths):
        dataclasses.replace(quick, rank=rank, processes=2).to_json(path)
    assert Steps.from_json(paths[0]) == dataclasses.replace(quick, processes=2)
    found = merged(paths)
    assert found.throughput.value == pytest.approx(2 * quick.throughput.value)
    for wrong, told in (
        ([], "at least one"),
        ([paths[0], paths[0]], r"the ranks \[0, 0\]"),
        ([tmp_path / "none.json"], "cannot read"),
        (['{"schema_version": 1}'], "no report of one process"),
    ):
        with pytest.raises(InvalidInputError, match=told):
            merged(wrong)


def test_numbers_are_shown_with_their_units(clock):
    found = looped(clock, data_s=0, sync_s=0.005, every=5).report
    known = dataclasses.replace(found, resident_growth=Quantity(20480.0, "B"), throughput=Quantity(27400.0, "items/s"))
    assert "27,400 items/s" in str(known)
    assert "process 20.0 KiB" in str(known)
    assert "e+0" not in str(known)


def test_waiting_for_the_device_is_told_of_the_steps_that_are_watched(clock):
    found = looped(clock, data_s=0, sync_s=0.005, every=5).report
    assert found.sync_ms.value == pytest.approx(5)
    assert [row.index for row in found.timeline if row.sync_ms is not None] == [5, 10, 15]
    assert found.overhead.value == pytest.approx(3 * 0.005 / (17 * 0.010 + 3 * 0.005))


def test_warmup_does_not_count(clock):
    found = looped(clock, count=3, warmup=5).report
    assert (found.counted, found.step) == (0, None)
    assert found.data_ms.unavailable == "no step was counted"
    assert "warm-up of 5" in str(found)
    json.loads(found.to_json())


def test_without_batches_waiting_is_not_known(clock):
    with steps(warmup=0) as profiler:
        for _ in range(4):
            clock.s += 0.002
            profiler.step(items=16)
    found = profiler.report
    assert found.data_ms.unavailable == found.data_share.unavailable == "batches() was not used"
    assert found.throughput.value == pytest.approx(16 / 0.002)


def test_a_torch_loop_that_recompiles_and_keeps_its_outputs():
    torch = pytest.importorskip("torch")
    model = torch.nn.Linear(4, 4)
    shifted = torch.compile(lambda x, shift: model(x) + shift, backend="eager", dynamic=False)
    with steps(warmup=2, every=1) as profiler:
        for number, x in enumerate(profiler.batches([torch.ones(2, 4)] * 7)):
            profiler.step(shifted(x, max(number, 4)))
    found = profiler.report
    assert found.recompiles == 2  # at 5 and 6; 0 to 4 are one program
    assert [finding.kind for finding in found.findings if finding.kind == "recompilation"]
    assert found.resident_growth.value is not None
    assert found.timeline[0].items == 2


def test_a_jax_loop_that_keeps_its_outputs():
    jax = pytest.importorskip("jax")
    kept = []
    double = jax.jit(lambda x: 2 * x)
    batch = jax.numpy.ones((4, 256))
    with steps(warmup=2, every=1) as profiler:
        for x in profiler.batches([batch] * 12):
            kept.append(double(x))
            profiler.step(kept[-1])
    found = profiler.report
    assert found.device_growth.value == 4 * 256 * 4
    assert [finding.resource for finding in found.findings if finding.kind == "memory grows"]
    assert found.recompiles == 0


@pytest.mark.parametrize(("error", "outcome"), [(KeyboardInterrupt(), "interrupted"), (ValueError("tired"), "failed")])
def test_a_loop_that_ends_early_leaves_its_report(tmp_path, error, outcome):
    path = tmp_path / "steps.json"
    profiler = steps(path, warmup=0)

    def loop():
        with profiler:
            profiler.step()
            raise error

    with pytest.raises(type(error)):
        loop()
    assert profiler.report.outcome == outcome
    assert profiler.report.explanation.startswith("the loop ended at step 1")
    assert json.loads(path.read_text())["counted"] == 1


@pytest.mark.parametrize(
    ("options", "told"),
    [({"every": 0}, "at least 1"), ({"warmup": -1}, "at least 0"), ({"warmup": "3"}, "whole number")],
)
def test_bad_input_is_refused(options, told):
    with pytest.raises(InvalidInputError, match=told):
        steps(**options)


def test_a_folder_that_is_not_there_is_refused_before_the_loop(tmp_path):
    with pytest.raises(InvalidInputError, match="no folder"):
        steps(tmp_path / "missing" / "steps.json")


def test_several_reports_are_one(clock):
    quick, slow = looped(clock).report, looped(clock, compute_s=0.030).report
    found = merged([dataclasses.replace(slow, rank=1), quick])
    assert [steps.rank for steps in found.ranks] == [0, 1]
    assert found.slowest_rank == 1
    assert found.imbalance.value == pytest.approx(30 / 20)
    assert found.throughput.value == pytest.approx(8 / 0.040 + 8 / 0.060)
    assert "rank 1 computes longest" in str(found)


def test_two_processes_under_torchrun(tmp_path):
    pytest.importorskip("torch")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(WORKER)]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"steps.json", "steps.rank0.json", "steps.rank1.json"}
    ranks = [json.loads((tmp_path / f"steps.rank{rank}.json").read_text()) for rank in (0, 1)]
    assert [(one["rank"], one["processes"], one["counted"]) for one in ranks] == [(0, 2, 4), (1, 2, 4)]
    both = json.loads((tmp_path / "steps.json").read_text())
    assert [one["rank"] for one in both["ranks"]] == [0, 1]
    assert both["throughput"]["value"] == pytest.approx(sum(one["throughput"]["value"] for one in ranks))
