"""One callable timed by itself, on a clock that only it advances: when that ends, and what does not count."""

import math

import pytest
from simulated_machine import Machine, use

from perfkit.measure import calls


def test_first_call_returns_its_seconds_and_its_result(machine):
    assert calls.first_call(machine.call("compiling", 3.0)) == (3.0, "compiling")


def test_warm_up_calls_at_least_twice_and_ends_with_the_budget(machine):
    assert calls.warm_up(machine.call("slow", 10.0), budget_s=1.0) == 2
    assert calls.warm_up(machine.call("slow", 10.0), budget_s=45.0) == 5


def test_warm_up_ends_once_the_median_is_stable(machine):
    assert calls.warm_up(machine.call("steady", 0.001), budget_s=60.0) == 3 * calls.WARM_WINDOW


def test_warm_up_goes_on_while_calls_get_faster(monkeypatch):
    machine = use(monkeypatch, Machine(lambda now: 1 + 9 * math.exp(-now)))
    made = calls.warm_up(machine.call("settling", 0.02), budget_s=60.0)
    assert made > 3 * calls.WARM_WINDOW
    assert machine.slow_down(machine.now_s) < 1.3


def test_an_interrupted_calibration_call_does_not_count(monkeypatch):
    machine = use(monkeypatch, Machine(lambda now: 100.0 if now == 0 else 1.0))
    call = machine.call("A", 0.0005)
    assert calls.quickest_s(call) == pytest.approx(0.0005)


def test_one_variant_alone_is_timed_until_its_percentiles_are_supported(machine):
    latency = calls.alone(machine.call("a", 0.001), budget_s=100)
    assert latency.median_ms == pytest.approx(1)
    assert latency.p99_ms.value == pytest.approx(1)
    assert machine.now_s < 2


def test_one_variant_alone_ends_with_its_budget(machine):
    latency = calls.alone(machine.call("a", 0.1), budget_s=2)
    assert 15 <= len(latency.samples_ms) <= 16
    assert latency.p90_ms.value is None


def test_a_slow_variant_alone_is_timed_three_times(machine):
    assert len(calls.alone(machine.call("a", 60), budget_s=1).samples_ms) == calls.ALONE_CALLS == 3
