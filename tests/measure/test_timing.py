"""Two variants timed on a clock that only their calls advance: what is sampled, in which order, and when it ends."""

import gc
import math

import numpy as np
import pytest
from simulated_machine import Machine, use, without_collector

from perfkit._errors import PerfkitWarning
from perfkit._quantity import Quantity, Verdict
from perfkit.measure import timing


def runs(log):
    """The log as [name, how often in a row]."""
    found = []
    for name in log:
        if found and found[-1][0] == name:
            found[-1][1] += 1
        else:
            found.append([name, 1])
    return found


# What is sampled


def test_blocks_alternate_in_balanced_quadruples(machine):
    timed = timing.interleave(machine.call("A", 0.004), machine.call("B", 0.004), budget_s=1.0)
    sampled = machine.log[-4 * len(timed.original_ms) :]  # each block is one call untimed, and one timed
    assert sampled[::2] == sampled[1::2]
    quadruples = ["".join(sampled[i : i + 8 : 2]) for i in range(0, len(sampled), 8)]
    assert set(quadruples) == {"ABBA", "BAAB"}
    for first, second in zip(quadruples[::2], quadruples[1::2], strict=False):
        assert first != second
    # Which comes first is drawn.
    assert len(set(quadruples[::2])) == 2


def test_a_long_call_is_not_made_untimed(machine):
    timed = timing.interleave(machine.call("A", 0.2), machine.call("B", 0.003), budget_s=2.0)
    calls = [machine.log.count(name) for name in "AB"]
    calibration = len(machine.log) - sum(length for _, length in runs(machine.log)[2:])
    assert sum(calls) - calibration == len(timed.original_ms) + 2 * len(timed.variant_ms)


def order(machine, seed):
    start = len(machine.log)
    timing.interleave(machine.call("A", 0.01), machine.call("B", 0.01), budget_s=0.5, seed=seed)
    return "".join(machine.log[start:])


def test_the_seed_decides_the_order(machine):
    assert order(machine, 1) == order(machine, 1)
    assert len({order(machine, seed) for seed in range(8)}) > 1


def test_pairs_and_samples_are_in_the_order_taken(monkeypatch):
    machine = use(monkeypatch, Machine(lambda now: 1 + now))  # it gets slower all the time
    timed = timing.interleave(machine.call("A", 0.0002), machine.call("B", 0.0004), budget_s=0.2)
    for blocks, samples in (
        (timed.original_ms, timed.original_samples_ms),
        (timed.variant_ms, timed.variant_samples_ms),
    ):
        assert list(samples) == sorted(samples)
        per_block = np.reshape(samples, (len(blocks), -1))
        assert blocks == pytest.approx(np.median(per_block, axis=1))
    assert len(timed.original_ms) == len(timed.variant_ms)
    ratios = np.divide(timed.variant_ms, timed.original_ms)
    assert np.median(ratios) == pytest.approx(2.0, rel=0.02)


def test_both_sides_get_as_many_calls_a_block_and_one_untimed_before_them(machine):
    timed = timing.interleave(machine.call("A", 0.0002), machine.call("B", 0.0005), budget_s=0.5)
    per_block = 10  # 2 ms / 0.2 ms
    assert len(timed.original_samples_ms) == len(timed.variant_samples_ms) == per_block * len(timed.original_ms)
    sampled = runs(machine.log)[2:]  # what comes first is calibration
    assert {length for _, length in sampled} <= {per_block + 1, 2 * (per_block + 1)}


@pytest.mark.parametrize(
    ("original_s", "variant_s", "calls"),
    [
        (0.003, 0.003, 1),
        (0.001, 0.001, 2),
        (50e-6, 50e-6, 40),
        (0.001, 50e-6, 20),  # the faster side decides …
        (0.010, 50e-6, 2),  # … as long as the slower side's block stays short
        (1.0, 50e-6, 1),
        (1e-7, 1e-7, 1000),
    ],
)
def test_calls_per_block(original_s, variant_s, calls):
    assert timing._calls_per_block([original_s, variant_s], 0.002) == calls
    assert timing._calls_per_block([variant_s, original_s], 0.002) == calls


def test_a_call_below_the_timers_resolution_has_a_time_all_the_same(machine, monkeypatch):
    # Nothing advances the clock but the untimed garbage collection.
    without_collector(monkeypatch, machine)
    timed = timing.interleave(lambda: None, lambda: None, budget_s=0.01, block_s=1e-9)
    assert set(timed.original_ms) == {1e-6}


# When it ends


def test_it_ends_early_where_the_ratio_is_settled_and_p90_supported(machine):
    timed = timing.interleave(machine.call("A", 0.004), machine.call("B", 0.004), budget_s=60.0)
    assert 64 <= len(timed.original_samples_ms) <= 90
    quick = timing.interleave(machine.call("A", 50e-6), machine.call("B", 50e-6), budget_s=60.0)
    assert len(quick.original_ms) == timing.SETTLED_PAIRS


def test_it_uses_the_budget_where_the_ratio_is_not_settled(monkeypatch):
    generator = np.random.default_rng(0)
    machine = use(monkeypatch, Machine(lambda _: math.exp(generator.normal(0, 0.2))))
    timed = timing.interleave(machine.call("A", 0.004), machine.call("B", 0.004), budget_s=2.0)
    assert timed.seconds == pytest.approx(2.0, rel=0.05)
    assert timed.shortfall == ""


def test_it_overruns_the_budget_for_the_pairs_that_a_verdict_needs(machine):
    timed = timing.interleave(machine.call("A", 1.0), machine.call("B", 1.0), budget_s=1.0)
    assert len(timed.original_ms) == 8
    assert timed.seconds < timing.PATIENCE_S
    assert timed.shortfall == ""


def test_it_gives_up_on_calls_too_slow_for_that_and_says_so(machine):
    timed = timing.interleave(machine.call("A", 10.0), machine.call("B", 10.0), budget_s=1.0)
    assert len(timed.original_ms) == 2
    assert "a verdict needs 8" in timed.shortfall
    assert "give a budget_s of " in timed.shortfall
    advised = int(timed.shortfall.split("budget_s of ")[1].split(",")[0])
    assert timing.interleave(machine.call("A", 10.0), machine.call("B", 10.0), budget_s=advised).shortfall == ""


# What is left behind


@pytest.fixture
def thawed():
    """Nothing frozen, as in a program that does not do so itself (tests' `settled_heap` does)."""
    gc.unfreeze()


@pytest.mark.usefixtures("thawed")
def test_the_collector_is_off_while_sampling_and_back_afterwards():
    enabled, frozen = [], []

    def call():
        enabled.append(gc.isenabled())
        if len(enabled) == 20:  # past calibration; counting takes long
            frozen.append(gc.get_freeze_count())

    assert gc.isenabled()
    timing.interleave(call, call, budget_s=0.01)
    assert enabled[-1] is False
    assert frozen[0] > 0
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


@pytest.mark.usefixtures("thawed")
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_collector_is_back_after_a_call_that_raises(error):
    calls = []

    def call():
        calls.append(gc.isenabled())
        if len(calls) > 20:
            raise error("stop")

    with pytest.raises(error, match="stop"):
        timing.interleave(call, call, budget_s=0.01)
    assert calls[-1] is False
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_a_collector_that_was_off_stays_off_and_frozen_objects_stay_frozen():
    gc.disable()
    gc.freeze()
    frozen = gc.get_freeze_count()
    try:
        timing.interleave(lambda: None, lambda: None, budget_s=0.01)
        assert not gc.isenabled()
        assert gc.get_freeze_count() > 0.9 * frozen
    finally:
        gc.unfreeze()
        gc.enable()


# What the operating system took


def test_interrupted_blocks_are_counted_and_kept(machine, monkeypatch):
    counts = iter(range(10_000))

    class Preempted(timing.Interruptions):
        def count(self):
            # Read before and after a block: the second and fourth block of each quadruple are interrupted.
            return (next(counts) + 1) // 4, 0

    monkeypatch.setattr(timing, "Interruptions", Preempted)
    timed = timing.interleave(machine.call("A", 0.004), machine.call("B", 0.004), budget_s=1.0)
    assert timed.contaminated.unit == "blocks"
    assert timed.contaminated.value == len(timed.original_ms)
    assert len(timed.original_samples_ms) == len(timed.original_ms)


def test_waiting_for_a_processor_is_told_per_second(machine, monkeypatch):
    monkeypatch.setattr(timing, "waited_s", lambda: 0.6 * machine.now_s)
    timed = timing.interleave(machine.call("A", 0.004), machine.call("B", 0.004), budget_s=1.0)
    assert timed.waited.value == pytest.approx(0.6)
    monkeypatch.setattr(timing, "waited_s", lambda: None)
    timed = timing.interleave(machine.call("A", 0.004), machine.call("B", 0.004), budget_s=1.0)
    assert "schedstat" in timed.waited.unavailable


# The one that the pipeline calls


def paired(machine, original_s, variant_s, budget_s=1.0, seed=0):
    return timing.paired(
        machine.call("A", original_s),
        machine.call("B", variant_s),
        baseline="original",
        variant_name="bf16",
        budget_s=budget_s,
        seed=seed,
    )


def test_paired_returns_both_latencies_and_the_comparison(machine):
    before, after, comparison = paired(machine, 0.006, 0.003, budget_s=2.0)
    assert (before.median_ms, after.median_ms) == pytest.approx((6.0, 3.0))
    assert (comparison.baseline, comparison.variant, comparison.verdict) == ("original", "bf16", Verdict.FASTER)
    assert comparison.ratio == pytest.approx(2.0)
    assert after.p90_ms.value == pytest.approx(3.0)


def test_steps_that_are_timed_together_are_told_one_by_one(machine):
    sides = machine.call("A", 0.006), machine.call("B", 0.003)
    before, after, comparison = timing.paired(*sides, baseline="original", variant_name="local", budget_s=2.0, steps=3)
    assert (before.median_ms, after.median_ms) == pytest.approx((2.0, 1.0))
    assert comparison.ratio == pytest.approx(2.0)


def test_paired_keeps_to_its_budget(monkeypatch):
    generator = np.random.default_rng(0)
    machine = use(monkeypatch, Machine(lambda _: math.exp(generator.normal(0, 0.2))))
    paired(machine, 0.004, 0.004, budget_s=3.0)
    assert machine.now_s == pytest.approx(3.0, rel=0.15)


def test_paired_warns_where_calls_are_too_slow_for_a_verdict(machine):
    with pytest.warns(PerfkitWarning, match="a verdict needs 8"):
        comparison = paired(machine, 20.0, 10.0)[2]
    assert comparison.verdict == Verdict.NOISY


@pytest.mark.parametrize(("waited", "verdict"), [(0.1, Verdict.SAME), (0.9, Verdict.NOISY)])
def test_no_change_is_not_claimed_where_the_scheduler_was_measured(machine, monkeypatch, waited, verdict):
    monkeypatch.setattr(timing, "waited_s", lambda: waited * machine.now_s)
    comparison = paired(machine, 0.004, 0.004)[2]
    assert (comparison.verdict, comparison.waited) == (verdict, pytest.approx(waited))
    assert paired(machine, 0.004, 0.002)[2].verdict == Verdict.FASTER


def noisy_machine(monkeypatch, seed):
    """Drift, bursts of 30 ms at any time, and autocorrelated jitter."""
    generator = np.random.default_rng(seed)
    drift, phase = generator.uniform(-0.1, 0.1), generator.uniform(0, 6.28)
    state = {"until": 0.0, "by": 1.0, "wander": 0.0}

    def slow_down(now):
        if now > state["until"] and generator.random() < 0.03:
            state["until"], state["by"] = now + generator.exponential(0.03), generator.uniform(1.1, 1.8)
        state["wander"] = 0.9 * state["wander"] + generator.normal(0, 0.01)
        burst = state["by"] if now < state["until"] else 1.0
        return burst * math.exp(drift * now + 0.05 * math.sin(5 * now + phase) + state["wander"])

    without_collector(monkeypatch)
    return use(monkeypatch, Machine(slow_down))


@pytest.mark.parametrize("call_s", [0.0005, 0.004])
def test_verdicts_on_a_noisy_machine_adaptive_ending_included(monkeypatch, call_s):
    runs = 100
    alike = [paired(noisy_machine(monkeypatch, seed), call_s, call_s, seed=seed)[2].verdict for seed in range(runs)]
    assert sum(verdict in (Verdict.FASTER, Verdict.SLOWER) for verdict in alike) <= 0.02 * runs
    assert Verdict.SAME in alike
    slower = [
        paired(noisy_machine(monkeypatch, seed), call_s, 1.1 * call_s, seed=seed)[2].verdict for seed in range(runs)
    ]
    assert sum(verdict == Verdict.SLOWER for verdict in slower) >= 0.95 * runs


def test_real_calls_on_the_real_clock():
    values = np.ones(20_000)
    before, after, comparison = timing.paired(
        lambda: values.sum(),
        lambda: [values.sum() for _ in range(10)],
        baseline="once",
        variant_name="ten times",
        budget_s=0.3,
    )
    assert comparison.ratio < 1
    assert before.median_ms < after.median_ms
    assert comparison.pairs >= 8
    assert isinstance(before.p90_ms, Quantity)
