"""Percentiles, latency, and the comparison: its interval, its verdicts, and how often they are wrong."""

import math

import numpy as np
import pytest

from perfkit._quantity import Verdict
from perfkit.measure import statistics
from perfkit.measure.statistics import compare, latency, median_interval, percentile

CLAIMS = (Verdict.FASTER, Verdict.SLOWER)


def compared(original, variant, **options):
    return compare(original, variant, baseline="original", variant="variant", **options)


def blocks(ratios, scale_ms=5.0):
    """Block times whose pairs have exactly these ratios."""
    return [scale_ms * ratio for ratio in ratios], [scale_ms] * len(ratios)


# Percentiles


@pytest.mark.parametrize(("p", "needed"), [(90, 64), (95, 130), (99, 662), (99.9, 6636), (10, 64)])
def test_percentile_is_given_from_the_loadgen_number_of_samples_on(p, needed):
    assert statistics.samples_needed(p) == needed
    assert percentile(range(needed), p).value == pytest.approx(np.percentile(np.arange(needed), p))
    short = percentile(range(needed - 1), p)
    assert short.value is None
    assert short.unavailable == f"p{p:g} needs {needed} samples, have {needed - 1}"


def test_percentile_keeps_the_unit_and_says_how_many_samples_it_rests_on():
    quantity = percentile([1.0] * 64, 90, unit="s")
    assert (quantity.value, quantity.unit, quantity.method) == (1.0, "s", "p90 of 64 samples")


@pytest.mark.parametrize("p", [0, 100, -1, math.nan])
def test_a_percentile_outside_its_range_is_refused(p):
    with pytest.raises(ValueError, match="between 0 and 100"):
        statistics.samples_needed(p)


def test_latency_has_only_the_percentiles_that_its_samples_support():
    found = latency([1.0, 2.0, 3.0] * 50)
    assert found.median_ms == 2.0
    assert found.samples_ms == (1.0, 2.0, 3.0) * 50
    assert found.p90_ms.value == found.p95_ms.value == 3.0
    assert found.p99_ms.unavailable == "p99 needs 662 samples, have 150"


def test_latency_thins_evenly_and_computes_percentiles_from_all_samples():
    samples = np.arange(1.0, 10_001.0)
    found = latency(samples)
    assert len(found.samples_ms) == statistics.KEPT_SAMPLES
    assert found.samples_ms[0], found.samples_ms[-1] == (1.0, 10_000.0)
    assert set(np.diff(found.samples_ms)) <= {5.0, 6.0}
    assert found.p99_ms.value == np.percentile(samples, 99)


# The interval


def test_pairs_needed_follows_from_the_sign_test():
    assert [statistics.pairs_needed(confidence) for confidence in (0.5, 0.95, 0.99, 0.999)] == [2, 6, 8, 11]
    with pytest.raises(ValueError, match="between 0 and 1"):
        statistics.pairs_needed(1.0)


@pytest.mark.parametrize(("count", "inner"), [(8, 0), (11, 0), (12, 1), (20, 3), (100, 36)])
def test_order_statistic_interval_leaves_out_no_more_than_allowed_and_one_step_in_would(count, inner):
    values = np.random.default_rng(0).permutation(count).astype(float)
    low, high = statistics.order_statistic_interval(values, 0.99)
    assert (low, high) == (inner, count - 1 - inner)

    def missed(k):
        return 2 * sum(math.comb(count, j) for j in range(k)) / 2**count

    assert missed(inner + 1) <= 0.01 < missed(inner + 2)


def test_order_statistic_interval_does_not_underflow_for_long_runs():
    low, high = statistics.order_statistic_interval(np.arange(20_000.0), 0.99)
    # The normal approximation: n/2 ± 2.576 sqrt(n)/2.
    assert low == pytest.approx(10_000 - 182, abs=3)
    assert high == pytest.approx(10_000 + 182, abs=3)


@pytest.mark.parametrize("count", [8, 12, 40])
def test_interval_covers_the_median_as_often_as_promised(count):
    generator = np.random.default_rng(count)
    runs = 400
    missed = 0
    for seed in range(runs):
        low, high = median_interval(generator.standard_t(3, count), 0.99, seed)
        missed += not low <= 0 <= high
    # 1 % is promised: more than 10 of 400 would come by chance in 0.3 % of cases.
    assert missed <= 10


def test_bootstrap_alone_would_break_that_promise_for_few_pairs():
    generator = np.random.default_rng(9)
    missed = 0
    for seed in range(400):
        medians = statistics._bootstrap_medians(generator.standard_normal(9), 1, seed)
        low, high = np.quantile(medians, [0.005, 0.995])
        missed += not low <= 0 <= high
    assert missed > 10


def autoregressive(generator, count, correlation):
    values = np.zeros(count)
    for i in range(1, count):
        values[i] = correlation * values[i - 1] + generator.normal()
    return values


def test_autocorrelated_pairs_get_a_wider_interval_than_the_same_values_shuffled():
    generator = np.random.default_rng(1)
    values = autoregressive(generator, 200, 0.8)
    assert statistics.autocorrelation(values) > statistics.AUTOCORRELATED
    shuffled = generator.permutation(values)
    assert statistics.autocorrelation(shuffled) < statistics.AUTOCORRELATED
    widths = [np.ptp(median_interval(array, 0.99)) for array in (values, shuffled)]
    assert widths[0] > 1.5 * widths[1]


def test_autocorrelated_pairs_are_resampled_in_blocks(monkeypatch):
    blocks_drawn = []
    draw = statistics._bootstrap_medians

    def watched(values, block, seed):
        blocks_drawn.append(block)
        return draw(values, block, seed)

    monkeypatch.setattr(statistics, "_bootstrap_medians", watched)
    generator = np.random.default_rng(1)
    values = autoregressive(generator, 200, 0.8)
    median_interval(values, 0.99)
    median_interval(generator.permutation(values), 0.99)
    assert blocks_drawn == [12, 1]
    spreads = [np.std(draw(values, block, 0)) for block in blocks_drawn]
    assert spreads[0] > 1.3 * spreads[1]


def test_interval_covers_the_median_of_autocorrelated_pairs():
    generator = np.random.default_rng(2)
    missed = 0
    for seed in range(200):
        low, high = median_interval(autoregressive(generator, 120, 0.6), 0.99, seed)
        missed += not low <= 0 <= high
    assert missed <= 6  # 3 %; independent resampling misses 15 %


# Verdicts


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [
        (2.0, Verdict.FASTER),
        (1.03, Verdict.FASTER),
        (1.01, Verdict.SAME),
        (1.0, Verdict.SAME),
        (0.99, Verdict.SAME),
        (0.97, Verdict.SLOWER),
        (0.5, Verdict.SLOWER),
    ],
)
def test_verdict_of_a_steady_ratio(ratio, verdict):
    found = compared(*blocks([ratio] * 20))
    assert found.verdict == verdict
    assert (found.ratio, found.low, found.high) == pytest.approx((ratio, ratio, ratio))
    assert (found.baseline, found.variant, found.pairs, found.confidence) == ("original", "variant", 20, 0.99)


def test_swapping_the_sides_mirrors_the_comparison():
    generator = np.random.default_rng(0)
    original, variant = np.exp(generator.normal(0, 0.02, (2, 40)))
    variant *= 1.2
    one, other = compared(original, variant), compared(variant, original)
    assert (one.verdict, other.verdict) == (Verdict.SLOWER, Verdict.FASTER)
    # The resamples are the same and so mirrored too, but quantiles interpolate.
    assert (one.ratio, one.low, one.high) == pytest.approx((1 / other.ratio, 1 / other.high, 1 / other.low), rel=1e-3)


@pytest.mark.parametrize("pairs", [1, 2, 5, 7])
def test_too_few_pairs_are_never_called_faster_or_slower(pairs):
    found = compared(*blocks([3.0] * pairs))
    assert found.verdict == Verdict.NOISY
    assert (found.low, found.high) == (0.0, math.inf)
    assert found.ratio == pytest.approx(3.0)
    assert compared(*blocks([3.0] * 8)).verdict == Verdict.FASTER


def test_a_change_that_may_lie_below_the_smallest_effect_is_not_claimed():
    ratios = [1.04, 1.045, 1.05, 1.035] * 10
    assert compared(*blocks(ratios)).verdict == Verdict.FASTER
    assert compared(*blocks(ratios), smallest_effect=0.05).verdict == Verdict.SAME


def test_too_noisy_begins_where_a_visible_effect_could_have_been_missed():
    def spread(half_width):
        # The interval of 8 pairs is their range. Out of order, or they would be autocorrelated and it wider.
        return compared(*blocks(np.exp(half_width * np.array([0.2, -1, 0.6, -0.2, 1, -0.6, 0.1, -0.1]))))

    limit = math.log1p(statistics.VISIBLE_EFFECT) - math.log1p(0.02)
    assert spread(0.98 * limit).verdict == Verdict.SAME
    assert spread(1.02 * limit).verdict == Verdict.NOISY


def test_a_large_change_is_seen_through_large_noise():
    generator = np.random.default_rng(0)
    found = compared(*blocks(3 * np.exp(generator.normal(0, 0.3, 40))))
    assert found.verdict == Verdict.FASTER
    assert found.high / found.low > 1.1


def test_a_repeated_comparison_is_the_same_and_another_seed_resamples_differently():
    original, variant = np.exp(np.random.default_rng(3).normal(0, 0.05, (2, 30)))
    assert compared(original, variant, seed=1) == compared(original, variant, seed=1)
    assert len({compared(original, variant, seed=seed).noise for seed in range(10)}) > 1


def test_noise_is_the_spread_of_the_baseline_against_itself():
    generator = np.random.default_rng(4)
    calm, wild = (np.exp(generator.normal(0, sigma, 60)) for sigma in (0.01, 0.1))
    # The variant's own noise does not enter.
    assert compared(calm, wild).noise < 0.02 < compared(wild, calm).noise
    # It predicts the interval that two equally noisy sides get.
    against_itself = compared(wild, np.exp(generator.normal(0, 0.1, 60)))
    half_width = math.sqrt(against_itself.high / against_itself.low) - 1
    assert against_itself.noise == pytest.approx(half_width, rel=0.5)
    assert compared([1.0] * 8, [1.0] * 8).noise == 0.0


def test_noise_compares_blocks_of_one_quadruple_and_so_leaves_drift_out():
    drifting = np.exp(np.linspace(0, 1, 60))
    assert 0 < compared(drifting, drifting).noise < 0.03


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan, math.inf])
def test_times_that_are_not_positive_and_finite_are_refused(wrong):
    times = [1.0] * 7 + [wrong]
    with pytest.raises(ValueError, match=r"variant_ms\[7\] is .*positive and finite"):
        compared([1.0] * 8, times)
    with pytest.raises(ValueError, match="positive and finite"):
        latency(times)


def test_sides_of_different_length_and_empty_ones_are_refused():
    with pytest.raises(ValueError, match="8 blocks and variant_ms 7"):
        compared([1.0] * 8, [1.0] * 7)
    with pytest.raises(ValueError, match="non-empty"):
        compared([], [])
    with pytest.raises(ValueError, match="non-empty"):
        latency([])


# How often a verdict is wrong


def machine(generator, slots, kind):
    """Log of how much slower a machine is than its best, block by block."""
    time = np.linspace(0, 1, slots)
    log_time = generator.normal(0, 0.012, slots)
    if "drift" in kind:
        log_time += generator.uniform(-0.3, 0.3) * time + 0.05 * np.sin(6.28 * (3 * time + generator.random()))
    if "bursts" in kind:
        busy = False
        for slot in range(slots):
            busy = generator.random() < (0.85 if busy else 0.05)
            log_time[slot] += busy * generator.uniform(0.1, 0.6)
    if "autocorrelated" in kind:
        log_time += 0.02 * autoregressive(generator, slots, 0.9)
    if "two modes" in kind:
        log_time += 0.25 * (generator.random(slots) < 0.3)
    return log_time


def simulated(generator, pairs, kind, slow_down=1.0):
    """Block times of two sides in ABBA or BAAB order on such a machine."""
    orders = [[0, 1, 1, 0] if generator.random() < 0.5 else [1, 0, 0, 1] for _ in range(pairs // 2)]
    side = np.concatenate(orders)
    times = np.exp(machine(generator, 2 * pairs, kind)) * np.where(side == 1, slow_down, 1.0)
    return times[side == 0], times[side == 1]


@pytest.mark.parametrize(("kind", "pairs"), [("drift, bursts, autocorrelated", 60), ("bursts, two modes", 120)])
def test_a_model_against_itself_gets_no_false_verdict_and_a_tenth_more_is_found(kind, pairs):
    generator = np.random.default_rng(0)
    runs = 200
    alike = [compared(*simulated(generator, pairs, kind), seed=run).verdict for run in range(runs)]
    assert sum(verdict in CLAIMS for verdict in alike) <= 0.02 * runs
    slower = [compared(*simulated(generator, pairs, kind, 1.10), seed=run).verdict for run in range(runs)]
    assert sum(verdict == Verdict.SLOWER for verdict in slower) >= 0.95 * runs
    assert Verdict.FASTER not in slower


def test_this_simulation_fools_an_unpaired_comparison():
    """All of one side before the other, as most benchmarks run it: the test above is not an easy one."""
    generator = np.random.default_rng(0)
    fooled = 0
    for run in range(60):
        times = np.exp(machine(generator, 120, "drift, bursts, autocorrelated"))
        fooled += compared(times[:60], times[60:], seed=run).verdict in CLAIMS
    assert fooled > 0.05 * 60


def test_a_quiet_machine_is_not_called_noisy():
    generator = np.random.default_rng(5)
    verdicts = [compared(*simulated(generator, 40, "drift"), seed=run).verdict for run in range(30)]
    assert verdicts.count(Verdict.SAME) >= 28
