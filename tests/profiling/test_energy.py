"""Energy by the counters of cards and processors."""

from __future__ import annotations

import ctypes
import json

import pytest

from perfkit.profiling import energy, rapl, telemetry
from perfkit.profiling.counter import NvmlCounter, Unavailable
from perfkit.profiling.nvml import Replay, opened
from perfkit.profiling.rapl import Rapl


class Ticking(energy.Counter):
    """A counter of a device that uses `busy_w` while `call` runs, by a clock that only calls and reads move."""

    source, window_s = "made up", 1.0

    def __init__(self, tick_s: float, idle_w: float, busy_w: float):
        self.tick_s, self.idle_w, self.busy_w = tick_s, idle_w, busy_w
        self.now_s = self.used_j = 0.0
        self._shown = (0, 0.0)

    def call(self, seconds: float = 0.007) -> None:
        self._pass(seconds, self.busy_w)

    def sleep(self, seconds: float) -> None:
        self._pass(seconds, self.idle_w)

    def _pass(self, seconds: float, watts: float) -> None:
        self.now_s += seconds
        self.used_j += seconds * watts
        tick = int(self.now_s / self.tick_s)
        if tick != self._shown[0]:
            self._shown = tick, self.used_j

    def joules(self) -> float:
        return self._shown[1]

    def clock(self) -> float:
        return self.now_s


@pytest.mark.parametrize("tick_s", [0.1, 0.001, 0.0])
def test_idle_is_subtracted_over_whole_ticks(monkeypatch, tick_s):
    counter = Ticking(tick_s or 1e-9, idle_w=60.0, busy_w=300.0)
    monkeypatch.setattr(energy.time, "sleep", counter.sleep)
    idle, busy = energy.windows(counter.call, counter, 0.5, counter.clock)
    told = energy.told(counter, idle, busy)
    # the counter's moves are seen after the call in which they happen: a call of 7 ms at either end
    assert told.idle_w.value == pytest.approx(60.0, rel=2e-3 / 0.5)
    assert told.mean_w.value == pytest.approx(300.0, rel=2 * 0.007 / busy.seconds)
    assert told.step_j.value == pytest.approx(0.007 * 240.0, rel=3 * 0.007 / busy.seconds)
    assert busy.ticks >= 20
    assert told.window_s == busy.seconds >= counter.window_s


def test_a_step_that_outlasts_ticks_ends(monkeypatch):
    counter = Ticking(0.1, idle_w=60.0, busy_w=300.0)
    monkeypatch.setattr(energy.time, "sleep", counter.sleep)
    _idle, busy = energy.windows(lambda: counter.call(0.9), counter, 0.5, counter.clock)
    assert busy.calls == 3
    assert busy.watts == pytest.approx(300.0)


def test_a_counter_that_stands_still(monkeypatch):
    counter = Ticking(1e9, idle_w=60.0, busy_w=300.0)
    monkeypatch.setattr(energy.time, "sleep", counter.sleep)
    with pytest.raises(Unavailable, match="has not moved for 2"):
        energy.windows(counter.call, counter, 0.5, counter.clock)


def test_no_more_than_idle_is_no_number(monkeypatch):
    counter = Ticking(0.1, idle_w=60.0, busy_w=60.0)
    idle, busy = (energy.Window(1.0, joules, 10, 10) for joules in (60.0, 59.0))
    assert "no more than idle (59 W against 60 W)" in energy.told(counter, idle, busy).step_j.unavailable


def test_sensor_and_counter_that_differ_are_both_told():
    busy = energy.Window(1.0, 100.0, 10, 10, (50.0, 60.0))
    assert energy.told(Ticking(1, 1, 1), energy.Window(1.0, 10.0, 1, 1), busy).mean_w.method.endswith(
        "sensor says 55 W"
    )


def test_a_card_by_the_binding(fake_nvml):
    """The stand-in's counter runs by the real clock, and tells the time that it shows."""
    library = fake_nvml("cards=2 power=100000 tick=1000")
    library.fake_power.argtypes = [ctypes.c_double]
    library.fake_seconds.restype = ctypes.c_double
    with opened() as live:
        both = NvmlCounter(live, telemetry.own_cards(live))
        counter = NvmlCounter(live, telemetry.own_cards(live, "1"), window_s=0.1)
        idle, _busy = energy.windows(lambda: None, counter, 0.02, library.fake_seconds)
        library.fake_power(300e3)
        _idle, busy = energy.windows(lambda: None, counter, 0.02, library.fake_seconds)
    told = energy.told(counter, idle, busy)
    # the counter is in whole mJ, and each end of a window off by one at most: 20 ms at 100 W are 2000 mJ
    assert told.idle_w.value == pytest.approx(100.0, rel=2 / 2000)
    assert told.mean_w.value == pytest.approx(300.0, rel=2 / 30000)
    assert told.source == "NVML energy counter, 1 card"
    assert both.source == "NVML energy counter, 2 cards"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("refuse=nvmlDeviceGetTotalEnergyConsumption:3", "energy counter: Not Supported"),
        ("refuse=nvmlInitWithFlags:9", "Driver Not Loaded"),
    ],
)
def test_cards_without_a_counter(fake_nvml, words, reason):
    fake_nvml(words)
    told = energy.measured(lambda: None, "cuda", idle_s=0.01)
    assert reason in told.step_j.unavailable
    assert told.window_s == 0.0


def test_parts_of_a_card_have_no_counter(fake_nvml, monkeypatch):
    fake_nvml("mig=2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-0-1")
    assert "MIG" in energy.measured(lambda: None, "cuda", idle_s=0.01).step_j.unavailable


def test_a_recorded_counter_is_measured_as_a_live_one(tmp_path):
    """Read every 10 ms, it moves every 100 ms: 60 W for the first 2 s, then 300 W."""
    answers = [{"at_s": 0.0, "function": "cards", "value": [{"uuid": "GPU-0", "index": 0}]}]
    for read in range(1200):
        tick_s = read // 10 / 10
        millijoules = 1e3 * (60 * tick_s if tick_s < 2 else 120 + 300 * (tick_s - 2))
        asked = {"function": "nvmlDeviceGetTotalEnergyConsumption", "card": "GPU-0", "arguments": []}
        answers.append({"at_s": read / 100, **asked, "value": millijoules})
    (tmp_path / "recorded.json").write_text(json.dumps({"answers": answers}))
    replay = Replay(tmp_path / "recorded.json", endless=False)
    counter = NvmlCounter(replay, telemetry.own_cards(replay))
    idle, busy = energy.windows(lambda: None, counter, 1.75, replay.clock)
    assert idle.watts == pytest.approx(60.0)
    # the first tick of the second window is the second in which the power changes
    assert busy.watts == pytest.approx(300.0, rel=0.01)
    assert busy.ticks == energy.TICKS
    with pytest.raises(Unavailable, match="no answer"):
        energy.windows(lambda: None, counter, 10.0, replay.clock)


def test_no_counter_for_other_devices():
    assert "not of a tpu" in energy.measured(lambda: None, "tpu").step_j.unavailable


# ---- RAPL ------------------------------------------------------------------------------------------------------------


def powercap(root, name: str, label: str, energy_uj: int, limit_uj: int = 1000) -> None:
    folder = root / name
    folder.mkdir()
    (folder / "name").write_text(f"{label}\n")
    (folder / "energy_uj").write_text(f"{energy_uj}\n")
    (folder / "max_energy_range_uj").write_text(f"{limit_uj}\n")


def test_packages_and_memory_are_added_up_and_start_again_from_0(tmp_path):
    powercap(tmp_path, "intel-rapl:0", "package-0", 900)
    powercap(tmp_path, "intel-rapl:0:0", "core", 5)
    powercap(tmp_path, "intel-rapl:0:1", "dram", 10)
    powercap(tmp_path, "intel-rapl:1", "psys", 7)
    counter = Rapl(tmp_path)
    assert counter.source == "RAPL package-0, dram of package 0, other processes included"
    assert counter.joules() == 0.0
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("100")  # 900 → 1000 = 0 → 100
    (tmp_path / "intel-rapl:0:1" / "energy_uj").write_text("30")
    assert counter.joules() == pytest.approx(220e-6)


def test_counters_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(rapl, "POWERCAP", tmp_path)
    with pytest.raises(Unavailable, match="a virtual machine, or the driver is not loaded"):
        Rapl(tmp_path)


def test_counters_that_may_not_be_read(tmp_path, monkeypatch):
    powercap(tmp_path, "intel-rapl:0", "package-0", 900)

    def forbidden(path, *arguments, **more):
        raise PermissionError(13, "Permission denied")

    counter_file = tmp_path / "intel-rapl:0" / "energy_uj"
    read_text = rapl.Path.read_text
    monkeypatch.setattr(
        rapl.Path,
        "read_text",
        lambda path, *given: forbidden(path) if path == counter_file else read_text(path, *given),
    )
    with pytest.raises(Unavailable, match=r"root only: `chmod a\+r"):
        Rapl(tmp_path)
