"""What `python -m bench.gpu` does on a GPU, as far as it can be seen without one: the same rows on a CPU's tensors."""

import dataclasses
import json
from types import SimpleNamespace

import pytest

pytest.importorskip("torch")

import planted_gpu_rows
import torch

from bench import gpu, gpu_profile, gpu_results, gpu_rows, gpu_time
from bench.gpu_cases import Conv, Linear, Rnn
from perfkit import InvalidInputError
from perfkit.kernels import _autotune, _clock
from perfkit.kernels.conv2d.cases import Case as ConvCase
from perfkit.kernels.linear_int8.cases import Case as LinearCase
from perfkit.kernels.rnn.cases import Case as RnnCase

SMALL = {
    "packed": lambda: Rnn(RnnCase("LSTM", 5, 3, 4, 6, layers=2, bidirectional=True, ragged="packed"), True, "cpu"),
    "lengths": lambda: Rnn(RnnCase("GRU", 5, 3, 4, 6, ragged="lengths", batch_first=True), True, "cpu"),
    "relu": lambda: Rnn(RnnCase("RNN_RELU", 5, 3, 4, 6, initial=False, bias=False), False, "cpu"),
    "conv": lambda: Conv(
        ConvCase(2, 3, 9, 8, 8, (3, 3), {"activation": "relu", "pool": 2, "padding": "same"}),
        *("bfloat16", True, True, True, "cpu"),
    ),
    "conv of normals": lambda: Conv(
        ConvCase(2, 3, 9, 8, 8, (2, 3), {"pool": 2, "padding": "same"}, bias=False),
        *("float32", False, False, True, "cpu"),
    ),
    "linear": lambda: Linear(LinearCase(5, 33, 7, "float32", activation="relu"), "cpu"),
}


def test_every_row_can_be_shown_without_a_gpu(capsys):
    assert gpu.main(["--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for part in gpu.SHARES:
        assert sum(line.startswith(f"{part} ") for line in lines) >= 4
    assert "time rnn packed: rnn/torch/float32/LSTM-T1024-B32-I256-H256-1x1-packed-infer" in lines
    assert len(set(lines)) == len(lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_what_is_missing(capsys):
    assert gpu.main([]) == 2
    told = capsys.readouterr().err
    assert "bench.gpu cannot run here: PyTorch" in told
    assert "--dry-run" in told


def test_unknown_parts_are_an_error(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--only", "check,tine"])
    assert "tine: expected some of check,compile,stress,tune,time,profile" in capsys.readouterr().err


@pytest.mark.parametrize("name", SMALL)
def test_right_numbers_pass_the_check(name):
    found = gpu_rows.checked(SMALL[name]())
    assert "failed" not in found, found
    refused = "library" if name == "linear" else "triton"  # torch's product of int8 wants larger sizes
    right = {each for each, told in found["outcomes"].items() if told == "right"}
    assert {"library", "reference"} - {refused} <= right
    assert found["outcomes"]["triton"] == "refused: it runs on cuda, and this call is on cpu"


@pytest.mark.parametrize("name", SMALL)
def test_framework_layers_compute_the_same(name):
    subject = SMALL[name]()
    if name != "linear":  # which is in bfloat16 there
        assert subject.wrong("library", subject.complete(subject.native)) == ""


@pytest.mark.parametrize("name", SMALL)
def test_a_planted_error_fails_the_check(name):
    """In one number of the last result, by a hundredth of the largest."""
    subject = SMALL[name]()
    found = [tensor.detach().clone() for tensor in subject.call("reference")]
    compared = found[0] if name == "conv of normals" else found[-1]
    compared.view(-1)[0] += 0.02 * compared.abs().max() + 1e-3
    assert "is off by" in subject.wrong("reference", found)


def test_tuning_writes_a_table(tmp_path):
    row = gpu_rows.tuned(SMALL["conv"](), 2.0, tmp_path)
    assert row["fastest"] in row["ms"]
    assert row["tried"] >= 1
    table = json.loads(next(tmp_path.iterdir()).read_text())
    (key,) = table["entries"]
    assert key.startswith("conv2d/torch/bfloat16/N2-I3-9x8-O8")
    assert table["date"]


def test_every_candidate_is_called_once_before_tuning(monkeypatch):
    subject, called = SMALL["relu"](), []
    planted = [("cpu", ()), ("cpu", (("block", 8),)), ("library", ())]
    monkeypatch.setattr(gpu_rows, "candidates", lambda _subject: planted)

    def call(name):
        called.append((name, _autotune.lookup("rnn", subject.problem).configuration))
        if name == "library":
            raise RuntimeError("too large\nand more")

    monkeypatch.setattr(subject, "call", call)
    dropped = {"library {}": "RuntimeError: too large"}
    assert gpu_rows.compiled(subject, 60.0) == {"compiled": 2, "late": 0, "dropped": dropped}
    assert called == planted
    assert gpu_rows.compiled(subject, 0.0) == {"compiled": 1, "late": 2, "dropped": {}}
    assert [row.name for row in gpu_rows.compile_rows()] == [row.name for row in gpu_rows.tune_rows()]


def test_a_configuration_with_wrong_results_is_never_kept(tmp_path, monkeypatch):
    subject = SMALL["relu"]()
    right = subject.outputs
    monkeypatch.setattr(subject, "outputs", lambda name: [y + (name == "library") for y in right(name)])
    monkeypatch.setattr(subject, "able", lambda: {"library": None, "reference": None, "cpu": "planted"})
    with pytest.raises(InvalidInputError, match="library: y is off by"):
        gpu_rows.tuned(subject, 2.0, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("backward", [False, True])
def test_timing_tells_who_ran_and_how_fast(backward):
    rivals = ("native", "library", "no such implementation")
    row = gpu_time.timed(SMALL["conv"](), rivals, "cpu", 0.3, backward=backward)
    assert row["ran"] in ("cpu", "library")
    assert row["rivals"]["library"]["low"] <= row["rivals"]["library"]["ratio"] <= row["rivals"]["library"]["high"]
    assert row["rivals"]["no such implementation"]["refused"].startswith("InvalidInputError")
    assert row["ms"] > 0
    assert row["device_ms"] > 0
    assert row["rivals"]["library"]["device"]["pairs"] > 0


def test_the_device_waits_where_the_host_is_to_be_ahead(monkeypatch):
    """On a planted device, that tells in which order it is asked for what."""
    asked = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            asked.append("event")

        def elapsed_time(self, other):
            return 1.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: asked.append("end"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: asked.append("wait"))
    monkeypatch.setattr(_clock, "_cache", lambda index: SimpleNamespace(zero_=lambda: asked.append("flush")))
    one = ["event", "call", "event"]
    for queued, before in ((False, ["flush"]), (True, ["flush", "wait"])):
        assert _clock.block_ms(lambda: asked.append("call"), 2, "cuda", queued=queued) == [1.0, 1.0]
        assert asked == [*before, *one, *before, *one, "end"]
        asked.clear()


def test_a_loss_after_dispatch_fails_the_row(monkeypatch):
    slow = dataclasses.replace(gpu_time.statistics.compare([1.0] * 20, [2.0] * 20, baseline="a", variant="b"))
    monkeypatch.setattr(gpu_time, "paired", lambda *_arguments, **_options: (slow, 1.0, 2.0))
    assert gpu_time.timed(SMALL["relu"](), ("native",), "cpu", 0.1)["failed"].startswith("0.50x after dispatch")
    monkeypatch.setattr(
        gpu_time, "paired", lambda *_arguments, **_options: (dataclasses.replace(slow, high=0.96), 1.0, 2.0)
    )
    assert "failed" not in gpu_time.timed(SMALL["relu"](), ("native",), "cpu", 0.1)


def test_jax_is_timed_against_its_own():
    pytest.importorskip("jax")
    row = gpu_time.jax_conv("cpu", 0.3, batch=2)
    assert row["rivals"]["built in"]["pairs"] > 0
    assert "jax runs on cpu here" in gpu_time.jax_lstm("cuda", 0.3, 2, 4)["refused"]


class FullDevice:
    """Stands in for the recurrent subject on a GPU of 132 processors; the third launch for all steps goes wrong."""

    def __init__(self, case, training, device):
        self.problem, self.launches = case.problem("torch", "cpu", training), 0

    def call(self, implementation):
        assert implementation == "triton"
        persistent = dict(_autotune.lookup("rnn", self.problem).configuration)["persistent"]
        self.launches += persistent
        return [torch.zeros(3), torch.tensor([0.0, float(self.launches == 3)])]


def test_a_race_in_the_stress_is_found(monkeypatch):
    pytest.importorskip("triton")
    from perfkit.kernels.rnn import triton_configuration, triton_kernel
    from perfkit.kernels.rnn.triton_configuration import Device

    monkeypatch.setattr(triton_kernel, "candidates", lambda made: list(triton_configuration.candidates(made, Device())))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(gpu_rows, "Rnn", FullDevice)
    told = gpu_rows.stressed("cuda", 5.0, 256, 1, 1, True)
    assert told["failed"] == "result 1 differs in repeat 2"
    monkeypatch.setattr(FullDevice, "call", lambda self, implementation: [torch.zeros(3)])
    for row in list(gpu_rows.stress_rows())[1:]:
        told = row.run("cuda", 5.0)
        assert told["repeats"] == gpu_rows.REPEATS
        assert 0.8 * 132 <= told["programs"] <= 132, told
    assert {row.run("cpu", 1.0)["refused"] for row in gpu_rows.stress_rows()} == {gpu_rows.NO_GRID}


def test_unequal_bits_of_the_kernels_own_stress_fail_the_row(monkeypatch):
    pytest.importorskip("triton")
    from perfkit.kernels.rnn import triton_stress

    found = [triton_stress.Stress(kind, 132, 5000, 3, kind != "GRU") for kind in ("LSTM", "GRU")]
    monkeypatch.setattr(triton_stress, "barrier_stress", lambda device, steps: found)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: SimpleNamespace(multi_processor_count=132))
    assert gpu_rows.stressed_barriers("cuda")["failed"] == "GRU: other bits than step by step"
    found[1] = found[1]._replace(equal=True)
    assert gpu_rows.stressed_barriers("cuda") == {"repeats": 3, "steps": 5000, "programs": 132, "processors": 132}


def test_a_row_that_raises_dies_or_hangs_does_not_end_the_run(monkeypatch):
    monkeypatch.setattr(gpu, "PATIENCE_S", 0.0)
    runner = gpu.Runner(planted_gpu_rows.rows, "cpu", {"PERFKIT_CACHE": "planted"})
    try:
        first = runner.run(0, 30.0)
        assert first["cache"] == "planted"
        assert runner.run(1, 30.0) == {"failed": "ValueError: planted"}
        assert runner.run(0, 30.0) == first
        assert runner.run(2, 30.0) == {"failed": "its process died, with exit code 7"}
        second = runner.run(0, 30.0)
        assert second["process"] != first["process"]
        assert runner.run(3, 0.2) == {"failed": "no answer in 1 s"}
        runner.run(0, 30.0)
        runner._process.kill()  # between two rows, as one whose device is lost may die
        runner._process.join()
        assert runner.run(0, 30.0) == {"failed": "its process died, with exit code -9"}
        assert runner.run(3, 30.0, 0.2) == {"failed": "no answer in 0 s"}
        assert runner.run(0, 30.0)["process"] not in (first["process"], second["process"])
    finally:
        runner.close()


def test_runners_work_at_the_same_time(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "LEAST_S", {"check": 60.0})
    runners = [gpu.Runner(planted_gpu_rows.pair, "cpu", {"PERFKIT_CACHE": str(tmp_path)}) for _ in range(2)]
    found = []
    try:
        gpu.run_part(runners, "check", 60.0, found.append)
    finally:
        for runner in runners:
            runner.close()
    assert sorted(found, key=lambda row: row["name"] != "one") == [
        {"part": "check", "name": name, "outcomes": {}} for name in ("one", "other")
    ]


class Here:
    """A runner in this process, which moves a clock."""

    def __init__(self, clock, takes_s):
        self.rows, self.asked, self.clock, self.takes_s = planted_gpu_rows.rows(), [], clock, takes_s

    def run(self, number, budget_s, most_s):
        self.asked.append((budget_s, most_s))
        self.clock.now += self.takes_s
        return {"outcomes": {"library": "right"}}

    def close(self):
        pass


def test_a_part_keeps_to_its_budget(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "TOGETHER", ())
    clock, found = SimpleNamespace(now=0.0), []
    here = Here(clock, 60.0)
    gpu.run_part([here], "check", 100.0, found.append, lambda: clock.now, ended=130.0)
    assert [("skipped" in row) for row in found] == [False, False, True, True]
    assert here.asked == [(100.0 / 4, 130.0), (40.0 / 3, 70.0)]
    assert "check 1/4 well: library right" in capsys.readouterr().out


def test_what_one_part_takes_too_much_the_later_ones_have_less(monkeypatch):
    asked, clock = {}, SimpleNamespace(now=0.0)

    def part(runners, name, budget_s, keep, _clock, ended):
        asked[name] = budget_s
        assert ended == 460.0 + gpu.GRACE_S
        clock.now += 400.0 if name == "check" else budget_s

    monkeypatch.setattr(gpu, "run_part", part)
    gpu.run_parts([Here(clock, 0.0)], list(gpu.SHARES), 460.0, print, lambda: clock.now)
    assert asked["check"] == pytest.approx(460.0 * gpu.SHARES["check"])
    assert sum(asked.values()) - asked["check"] == pytest.approx(60.0)


def test_rows_are_written_as_they_come_and_old_ones_stay(tmp_path):
    path, about = tmp_path / "device-kernels.json", {"date": "2026-01-31"}
    old = [{"part": "tune", "name": "kept"}, {"part": "check", "name": "one"}, {"part": "check", "name": "two"}]
    new = [{"part": "check", "name": "one", "outcomes": {}}, {"part": "check", "name": "two", "skipped": "late"}]
    for count in (1, 2):
        gpu_results.write(path, about, gpu_results.merged(old, new[:count]))
        assert json.loads(path.read_text()) == about | {"rows": [new[0], old[2], old[0]]}
    assert list(tmp_path.iterdir()) == [path]


def test_what_was_right_before_is_left_out_when_a_run_goes_on():
    """Compiled is again what is still to be tuned: what the compiler kept may be gone."""
    rows = [
        {"part": "stress", "name": "right"},
        {"part": "stress", "name": "wrong", "failed": "other bits"},
        {"part": "tune", "name": "one"},
        {"part": "tune", "name": "two", "skipped": "late"},
        {"part": "compile", "name": "one"},
        {"part": "compile", "name": "two"},
    ]
    assert gpu_results.past(rows) == {("stress", "right"), ("tune", "one"), ("compile", "one")}
    everything = gpu.rows(["stress"])
    rest = gpu.rows(["stress"], past=frozenset({("stress", everything[1].name)}))
    assert [row.name for row in rest] == [row.name for i, row in enumerate(everything) if i != 1]


def test_the_whole_run_on_a_planted_device(monkeypatch, tmp_path, capsys):
    """All of `main` but the device: what is written is there after a run that is broken off, and the next goes on."""
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "missing", lambda: "")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Planted GPU 80GB")
    asked = []

    class Runner(Here):
        def __init__(self, source, device, environment):
            assert device == "cuda"
            assert environment["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
            super().__init__(SimpleNamespace(now=0.0), 0.0)
            self.rows = source()

        def run(self, number, budget_s, most_s):
            asked.append(self.rows[number].name)
            if asked[2:] == [everything[2]]:
                raise KeyboardInterrupt
            return {"refused": "planted"}

    monkeypatch.setattr(gpu, "Runner", Runner)
    everything = [row.name for row in gpu.rows(["stress"])]
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["--only", "stress"])
    path = tmp_path / "planted-gpu-80gb-kernels.json"
    written = [row["name"] for row in json.loads(path.read_text())["rows"]]
    assert written[:2] == everything[:2]
    assert everything[2] not in written
    asked.clear()
    assert gpu.main(["--only", "stress", "--resume"]) == 0
    assert asked == [name for name in everything if name not in written]
    assert {row["name"] for row in json.loads(path.read_text())["rows"]} == set(everything)


def test_cudnn_is_timed_as_its_users_run_it():
    """In training mode it keeps what a backward pass needs: no rival of a call that has none."""
    case = RnnCase("LSTM", 5, 3, 4, 6)
    assert not Rnn(case, False, "cpu").module.training
    assert Rnn(case, True, "cpu").module.training


def test_profiles_are_written_whole(tmp_path):
    """On a CPU's tensors; telemetry and the other framework's device are a card's."""
    label = "torch lstm batch 2 inference"
    row = gpu_profile.profiled("torch", "lstm", 2, "inference", None, label, "cpu", 0.2, tmp_path)
    assert row["written"] == "torch-lstm-batch-2-inference.json"
    assert row["step_ms"] > 0
    assert "failed" not in row
    written = json.loads((tmp_path / row["written"]).read_text())
    assert written["outcome"] == "complete"
    assert (tmp_path / "torch-lstm-batch-2-inference.html").read_text().startswith("<!")
    assert gpu_profile.recorded("cpu", 1.0) == {"refused": "telemetry is of a card"}
    assert gpu_results.told(row).endswith(row["written"])
