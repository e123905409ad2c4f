"""What cards are asked, by the real binding from a library that stands in for the driver's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from perfkit.kernels import _native
from perfkit.profiling import nvml, telemetry
from perfkit.profiling.nvml import Live, Recording, Refused, Replay, opened
from perfkit.profiling.nvml_readings import READINGS, others, quantity
from perfkit.reporting import diagnosis

RECORDED = sorted((Path(__file__).parents[2] / "bench" / "results").glob("telemetry-*.json"))


def states(device: str = "cuda"):
    with telemetry.watching(device, period_s=0.005) as watch:
        watch.sample()
        return watch.states()


def test_cards_and_their_parts(fake_nvml):
    fake_nvml("cards=2 mig=2")
    with opened() as live:
        assert [(card.uuid, card.index, card.part) for card in live.cards()] == [
            ("GPU-0", 0, None),
            ("MIG-0-0", 0, 0),
            ("MIG-0-1", 0, 1),
            ("GPU-1", 1, None),
        ]


def test_readings_have_their_units(fake_nvml):
    fake_nvml("power=350000 reasons=0x21")
    (state,) = states()
    values = {name: (told.value, told.unit) for name, told in state.readings.items()}
    assert state.name == "Fake Card (0)"
    assert values["power"] == (350.0, "W")
    assert values["sm clock"] == (1900.0, "MHz")
    assert values["memory clock"] == (2600.0, "MHz")
    assert values["memory"] == (80 * 2**30, "B")
    assert values["PCIe sent"] == (1e6, "B/s")
    assert values["ECC corrected"] == (3.0, "errors")
    assert state.reasons == ("its temperature (driver)",)  # that it idles holds nothing down
    (power,) = [series for series in state.series if series.name == "power"]
    assert len(power.values) >= 2
    assert set(power.values) == {350.0}
    assert list(power.at_s) == sorted(power.at_s)


def test_the_card_of_a_part_keeps_what_the_part_does_not_tell(fake_nvml):
    fake_nvml("mig=1")
    whole, part = states()
    assert part.name == "Fake Card (0), part 0"
    assert whole.readings["power"].value == 100.0
    assert part.readings["power"].unavailable == "not supported: Not Supported"
    assert part.readings["memory"].value == 10 * 2**30
    assert whole.readings["MIG"].value == 1


@pytest.mark.parametrize("code", [1, 3, 4, 13, 15, 999], ids=lambda code: f"code {code}")
@pytest.mark.parametrize("function", ["nvmlDeviceGetClockInfo", "nvmlDeviceGetTotalEccErrors", "nvmlDeviceGetMigMode"])
def test_a_refused_call_is_a_reason(fake_nvml, function, code):
    fake_nvml(f"refuse={function}:{code}")
    (state,) = states()
    gone = [told for told in state.readings.values() if told.value is None]
    assert gone
    assert all(told.unavailable.startswith("not supported: ") for told in gone)
    assert state.readings["temperature"].value == 54.0


def test_every_single_call_may_be_refused(fake_nvml):
    fake_nvml()
    with opened() as live:
        recording = Recording(live)
        for card in recording.cards():
            for reading in READINGS:
                quantity(reading, recording, card.uuid)
            others(recording, card.uuid)
    asked = {answer["function"] for answer in recording.answers} - {"cards"}
    for function in asked:
        symbol = function.replace("Processes", "Processes_v3")
        fake_nvml(f"refuse={symbol}:3")
        assert states()[0].readings["memory clock" if "Clock" not in function else "memory"] is not None


def test_an_old_driver_lacks_functions(fake_nvml):
    fake_nvml("reasons=0x4 power=200000", "-DOLD_DRIVER")
    (state,) = states()
    assert state.readings["power"].value == 200.0  # by the older function
    assert state.reasons == ("the power limit",)
    assert state.processes == ()


def test_other_processes_are_told(fake_nvml, monkeypatch):
    monkeypatch.setenv("FAKE_NVML_OWN_PID", str(os.getpid()))
    fake_nvml()
    (state,) = states()
    assert state.processes == ("another (process 4242, 512 MiB)",)


@pytest.mark.parametrize("code", [9, 12, 18])
def test_a_driver_that_does_not_start(fake_nvml, code):
    fake_nvml(f"refuse=nvmlInitWithFlags:{code}")
    (state,) = states()
    assert state.readings["power"].unavailable.startswith("not supported: ")


def test_no_binding(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(Refused, match=r"pip install 'perfkit\[nvidia\]'"):
        Live()
    assert nvml.NOT_INSTALLED in states()[0].readings["power"].unavailable


def test_no_cards(fake_nvml):
    fake_nvml("cards=0")
    assert "finds no card" in states()[0].readings["power"].unavailable


def test_devices_of_other_makers(fake_nvml):
    assert "this is a tpu" in states("tpu")[0].readings["power"].unavailable


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("1", ["GPU-1"]),
        ("1,0", ["GPU-1", "GPU-0", "MIG-0-0", "MIG-0-1"]),
        ("MIG-0-1", ["MIG-0-1"]),
        ("GPU-1", ["GPU-1"]),
        ("1,7,0", ["GPU-1"]),
        ("", []),
        ("-1", []),
    ],
)
def test_cards_that_cuda_may_use(fake_nvml, visible, expected):
    fake_nvml("cards=2 mig=2")
    with opened() as live:
        assert [card.uuid for card in telemetry.own_cards(live, visible)] == expected


def test_what_was_recorded_is_answered_again(fake_nvml, tmp_path):
    fake_nvml("cards=2 mig=1 refuse=nvmlDeviceGetTemperature:4")
    with opened() as live:
        recording = Recording(live)
        recorded = telemetry.Cards(recording, telemetry.own_cards(recording))
        recorded.sample()
        expected = recorded.states()
    recording.write(tmp_path / "recorded.json", device="Fake Card")
    assert json.loads((tmp_path / "recorded.json").read_text())["device"] == "Fake Card"
    assert _replayed(tmp_path / "recorded.json") == [(state.name, _without_times(state)) for state in expected]


@pytest.mark.skipif(not RECORDED, reason="no telemetry of a real card is recorded yet: python -m bench.gpu does it")
@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_real_cards_recorded(path):
    for name, readings in _replayed(path):
        assert name
        assert any(told.value is not None for told in readings.values())


def _replayed(path):
    replay = Replay(path)
    watch = telemetry.Cards(replay, telemetry.own_cards(replay))
    watch.sample()
    return [(state.name, _without_times(state)) for state in watch.states()]


def _without_times(state):
    return state.readings


def test_a_question_that_was_not_recorded(tmp_path):
    (tmp_path / "empty.json").write_text('{"answers": []}')
    with pytest.raises(Refused, match="has no answer of nvmlDeviceGetName"):
        Replay(tmp_path / "empty.json").ask("nvmlDeviceGetName", "GPU-0")


def test_the_dynamic_linker_finds_it(tmp_path):
    """The way by which the driver's own library is found, and `perfkit.doctor` with it."""
    pytest.importorskip("pynvml")
    built = _native.load(Path(__file__).parent / "fake_nvml.cpp")._name
    shutil.copy(built, tmp_path / "libnvidia-ml.so.1")
    told = subprocess.run(
        [sys.executable, "-c", "from perfkit.measure.environment import environment as e; print(e().accelerators)"],
        env=os.environ | {"LD_LIBRARY_PATH": str(tmp_path), "FAKE_NVML": "cards=2"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert (
        told.count("Fake Card, 80 GiB, compute capability 9.0, driver 570.00, power limit 700 W, ECC on, MIG off") == 2
    )


def test_doctor_tells_of_cards(fake_nvml, monkeypatch):
    monkeypatch.setattr("perfkit.measure._hardware.accelerators", lambda: (("Fake Card",), ""))
    fake_nvml("cards=2 power=120000 reasons=0x8 refuse=nvmlDeviceGetTemperature:3")
    from perfkit import _doctor

    counters, cards = _doctor._counters_and_cards()
    assert counters["cuda"] == "NVML energy counter, 2 cards"
    assert len(cards) == 2
    told = diagnosis.card_now(cards[0])
    assert told.startswith("power 120 W; sm clock 1,900 MHz")
    assert "temperature" not in told
    assert "clock held down by a hardware slowdown; also computing: " in told
