"""What a machine reaches at best, by a clock that only calls move; once by the frameworks themselves."""

from __future__ import annotations

import json
import math

import pytest

from perfkit._quantity import Quantity
from perfkit.profiling import ceilings
from perfkit.profiling._profile import Ceilings
from perfkit.profiling._time_data import Op


class Machine(ceilings.Bench):
    """Computes 100 GFLOP/s in float32, 200 in bfloat16, streams 50 GB/s; every third call is disturbed."""

    sizes = (256, 512)

    def __init__(self):
        self.now_s, self.calls = 0.0, 0

    def clock(self) -> float:
        return self.now_s

    def name(self) -> str:
        return "Made Up 3000"

    def _taking(self, seconds: float) -> ceilings.Call:
        def call() -> None:
            self.calls += 1
            self.now_s += seconds * (5 if self.calls % 3 == 0 else 1)

        return call

    def product(self, dtype, size):
        if dtype == "int8":
            raise ceilings.Unsupported("no integers here")
        return self._taking(2 * size**3 / 1e9 / {"float32": 100, "bfloat16": 200, "float16": 1}[dtype])

    def triad(self, elements):
        return self._taking(12 * elements / 1e9 / 50)


def test_the_best_call_counts():
    machine = Machine()
    found = ceilings.now(machine, 1.0, machine.clock)
    reached = {dtype: told.value for dtype, told in found.gflops.items()}
    assert reached == pytest.approx({"float32": 100, "bfloat16": 200, "float16": 1, "int8": None})
    assert found.gflops["int8"].unavailable == "no integers here"
    assert found.bandwidth_gb_s.value == pytest.approx(50)


def test_the_time_is_kept_and_shared():
    machine = Machine()
    ceilings.now(machine, 1.0, machine.clock)
    # beyond it: the calls that set up, at least three of each, the last one; each disturbed at worst
    slowest_s = sum(2 * size**3 / 1e9 for size in machine.sizes) + 12 * ceilings.STREAM_BYTES / 12 / 50e9
    assert 1.0 < machine.now_s < 1.0 + 5 * (2 + ceilings.LEAST_CALLS) * slowest_s


def test_processes_measure_until_enough_have(monkeypatch, tmp_path):
    monkeypatch.setenv("PERFKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(ceilings, "_bench", lambda framework, device: Machine())
    heights = iter([10.0, 30.0, 20.0])

    def now(_bench):
        height = next(heights)
        return Ceilings({dtype: Quantity(height, "GFLOP/s") for dtype in ceilings.DTYPES}, Quantity(height, "GB/s"))

    monkeypatch.setattr(ceilings, "now", now)
    monkeypatch.setattr(ceilings, "PROCESSES", 3)
    seen = []
    for _process in range(4):
        ceilings.measured.cache_clear()
        seen.append(ceilings.measured("torch", "cpu").gflops["int8"].value)
    ceilings.measured.cache_clear()
    assert seen == [10.0, 30.0, 30.0, 30.0]
    (kept,) = (tmp_path / "ceilings").glob("torch-made-up-3000-*.json")
    kept.write_text("damaged")
    assert ceilings._read(kept) == (None, 0)


def test_one_process_measures_once(monkeypatch, tmp_path):
    monkeypatch.setenv("PERFKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(ceilings, "_bench", lambda framework, device: Machine())
    asked = []
    monkeypatch.setattr(ceilings, "now", lambda bench: asked.append(bench) or _flat(1.0))
    ceilings.measured.cache_clear()
    for _ in range(3):
        ceilings.measured("torch", "cpu")
    assert len(asked) == 1
    assert ceilings.remeasured("torch", "cpu").bandwidth_gb_s.value == 1.0
    assert len(asked) == 2
    ceilings.measured.cache_clear()


def test_an_operation_above_the_ceiling_raises_it(monkeypatch):
    asked = []
    monkeypatch.setattr(ceilings, "measured", lambda framework, device: _flat(100.0))
    monkeypatch.setattr(ceilings, "remeasured", lambda framework, device: asked.append(device) or _flat(200.0))

    def reached(gflops: float) -> float:
        op = Op("mm", "op", "", "forward", 1, 1.0, gflops * 1e6, 1e3, "float32[8, 8]")
        return ceilings.above([op], "torch", "cpu").gflops["float32"].value

    assert reached(90.0) == 100.0
    assert asked == []
    assert reached(150.0) == 200.0


def _flat(height: float) -> Ceilings:
    return Ceilings({dtype: Quantity(height, "GFLOP/s") for dtype in ceilings.DTYPES}, Quantity(height, "GB/s"))


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_frameworks(framework, monkeypatch, tmp_path):
    pytest.importorskip(framework)
    bench = ceilings._bench(framework, "cpu")
    monkeypatch.setattr(bench, "sizes", (64,))
    monkeypatch.setattr(ceilings, "STREAM_BYTES", 12 * 2**10)
    monkeypatch.setattr(type(bench), "cache_bytes", lambda self: 0)
    found = ceilings.now(bench, 0.01)
    told = [*found.gflops.values(), found.bandwidth_gb_s]
    assert all((quantity.value is None) == bool(quantity.unavailable) for quantity in told)
    assert found.gflops["float32"].value > 0
    assert math.isfinite(found.bandwidth_gb_s.value)
    json.dumps([quantity.value for quantity in told])


def test_float16_without_instructions_is_no_ceiling():
    assert "no float16" in ceilings.float16_missing(("avx2", "avx512f"))
    assert ceilings.float16_missing(("avx512_fp16",)) == ""


def test_the_last_cache(tmp_path):
    for level, size in enumerate(("48K", "2048K", "32M")):
        (tmp_path / f"index{level}").mkdir()
        (tmp_path / f"index{level}" / "size").write_text(f"{size}\n")
    assert ceilings.last_cache_bytes(tmp_path) == 32 * 2**20
    assert ceilings.last_cache_bytes(tmp_path / "none") == 0
