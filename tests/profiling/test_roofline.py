"""Operations under a machine's roofs: 100 GFLOP/s in float32, 400 in bfloat16, 50 GB/s."""

from __future__ import annotations

import dataclasses

import pytest

from perfkit._quantity import Quantity
from perfkit.profiling._profile import Ceilings
from perfkit.profiling._time_data import Op
from perfkit.profiling.roofline import exceeded, place, placed

CEILINGS = Ceilings(
    {"float32": Quantity(100.0, "GFLOP/s"), "bfloat16": Quantity(400.0, "GFLOP/s")}, Quantity(50.0, "GB/s")
)


def op(flops: float, moved_bytes: float, self_ms: float, calls: float = 1, dtype: str = "float32") -> Op:
    return Op("aten::mm", "op", "fc", "forward", calls, self_ms, flops, moved_bytes, f"{dtype}[8, 8], {dtype}[8, 8]")


def test_the_equation():
    found = place(op(flops=1e9, moved_bytes=1e8, self_ms=20.0), CEILINGS)
    assert found.intensity == pytest.approx(10.0)  # the ridge is at 2
    assert found.gflops == pytest.approx(50.0)
    assert found.gb_s == pytest.approx(5.0)
    assert found.roof_gflops == pytest.approx(100.0)
    assert found.least_ms == pytest.approx(10.0)
    assert found.share == pytest.approx(0.5)
    assert found.bound == "compute"


def test_left_of_the_ridge_memory_is_the_roof():
    found = place(op(flops=1e8, moved_bytes=1e8, self_ms=4.0), CEILINGS)
    assert (found.bound, found.roof_gflops) == ("memory", pytest.approx(50.0))
    assert found.share == pytest.approx(0.5)


def test_the_peak_is_the_dtypes():
    assert place(op(4e9, 1e6, 20.0, dtype="bfloat16"), CEILINGS).share == pytest.approx(0.5)


def test_without_flops_memory_is_the_roof():
    found = place(op(flops=0, moved_bytes=1e8, self_ms=4.0), CEILINGS)
    assert (found.bound, found.gflops, found.share) == ("memory", 0.0, pytest.approx(0.5))


def test_short_and_far_below_both_is_overhead():
    assert place(op(flops=1e4, moved_bytes=1e4, self_ms=1.0, calls=100), CEILINGS).bound == "overhead"
    assert place(op(flops=1e4, moved_bytes=1e4, self_ms=1.0, calls=1), CEILINGS).bound == "memory"  # slow, not short


@pytest.mark.parametrize("change", [{"self_ms": 0.0}, {"moved_bytes": 0.0}])
def test_what_cannot_be_placed(change):
    assert place(dataclasses.replace(op(1e9, 1e8, 20.0), **change), CEILINGS) is None


def test_no_ceilings_no_place():
    nothing = Quantity.missing("GB/s", "not measured")
    assert place(op(1e9, 1e8, 20.0), Ceilings({}, Quantity(50.0, "GB/s"))) is None
    assert place(op(1e9, 1e8, 20.0), Ceilings(CEILINGS.gflops, nothing)) is None


def test_the_heaviest_come_first():
    ops = [op(1e9, 1e8, 1.0), op(1e9, 1e8, 3.0), op(1e9, 0.0, 9.0)]
    assert [found.op.self_ms for found in placed(ops, CEILINGS)] == [3.0, 1.0]


def test_faster_than_the_peak():
    assert exceeded(placed([op(1e9, 1e7, 5.0)], CEILINGS), CEILINGS)
    assert not exceeded(placed([op(1e9, 1e7, 15.0)], CEILINGS), CEILINGS)
