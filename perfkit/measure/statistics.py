"""What a sample of times allows to say: percentiles, latency, and whether one variant is faster than another.

Two variants are compared by the median of the log ratios of paired blocks. Its interval is a bootstrap's, widened to
the exact order-statistic (sign test) interval wherever that is wider: with 9 pairs the bootstrap alone misses the truth
in 4.2 % of runs where 1 % is promised, with 20 pairs in 1.9 %; the exact interval never in more than 1 %.

Sources: sample sizes of percentiles, MLPerf LoadGen's early stopping; interval of the ratio, Kalibera and Jones,
"Rigorous benchmarking in reasonable time" (ISMM 2013); moving blocks, Künsch (1989).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from perfkit._quantity import Comparison, Latency, Quantity, Verdict

KEPT_SAMPLES = 2000
RESAMPLES = 2000

VISIBLE_EFFECT = 0.05
"""A comparison that could not have shown a change of this size is called too noisy, not "no significant change"."""

AUTOCORRELATED = 0.3
"""Lag-1 autocorrelation of the log ratios above which they are not treated as independent."""


def samples_needed(p: float) -> int:
    """The fewest samples that support percentile `p`: 64 for p90, 130 for p95, 662 for p99.

    With that many, two or more of them lie beyond the true percentile with a probability of 99 %.
    """
    if not 0 < p < 100:
        raise ValueError(f"p is {p!r}, but a percentile lies between 0 and 100, exclusive")
    beyond = min(p, 100 - p) / 100

    def supports(count: int) -> bool:
        within = (1 - beyond) ** (count - 1)
        return within * (1 - beyond) + count * beyond * within <= 0.01

    # The condition is monotone: double up to it, then halve the bracket.
    high = 2
    while not supports(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if supports(middle) else (middle, high)
    return high


def percentile(samples: Sequence[float] | np.ndarray, p: float, unit: str = "ms") -> Quantity:
    """Percentile `p` of the samples, where there are enough of them to support it.

    Example:
        >>> percentile([1.0] * 50, 99).unavailable
        'p99 needs 662 samples, have 50'
    """
    needed = samples_needed(p)
    if len(samples) < needed:
        return Quantity.missing(unit, f"p{p:g} needs {needed} samples, have {len(samples)}")
    return Quantity(float(np.percentile(samples, p)), unit, method=f"p{p:g} of {len(samples)} samples")


def latency(samples_ms: Sequence[float]) -> Latency:
    """Median and percentiles of single calls in ms: computed from all of them, of which about 2000 are kept, evenly.

    Raises:
        ValueError: no samples, or a time that is not positive and finite.
    """
    times = _positive_times(samples_ms, "samples_ms")
    kept = times
    if len(times) > KEPT_SAMPLES:
        kept = times[np.linspace(0, len(times) - 1, KEPT_SAMPLES).round().astype(int)]
    return Latency(
        samples_ms=tuple(kept.tolist()),
        median_ms=float(np.median(times)),
        p90_ms=percentile(times, 90),
        p95_ms=percentile(times, 95),
        p99_ms=percentile(times, 99),
    )


def compare(
    original_ms: Sequence[float],
    variant_ms: Sequence[float],
    *,
    baseline: str,
    variant: str,
    confidence: float = 0.99,
    smallest_effect: float = 0.02,
    seed: int = 0,
) -> Comparison:
    """Compare two variants from the times of paired, order-balanced blocks.

    The ratio is `exp(median(log(original_ms / variant_ms)))`. The verdict is FASTER where the whole interval lies above
    `1 + smallest_effect`, SLOWER where it lies below `1 / (1 + smallest_effect)`, NOISY where a change of
    `VISIBLE_EFFECT` could have gone unseen, and SAME otherwise.

    Fewer than `pairs_needed(confidence)` pairs have no interval of that confidence, whatever they say: the result is
    then [0, inf] and NOISY.

    Args:
        original_ms, variant_ms: (pairs,), block times in ms, in the order they were taken. Blocks 2q and 2q + 1 of a
            side come from the same quadruple (ABBA or BAAB); that is where `noise` is read from.
        baseline, variant: names for the report.
        smallest_effect: changes below it are not claimed, however sure they are: two copies of one model differ by a
            percent or two through where their memory lies.
        seed: of the bootstrap.

    Raises:
        ValueError: times that are not positive and finite, or not the same number on both sides.

    Example:
        >>> compare([2.0] * 20, [1.0] * 20, baseline="a", variant="b").verdict
        <Verdict.FASTER: 'faster'>
    """
    original = np.log(_positive_times(original_ms, "original_ms"))
    changed = np.log(_positive_times(variant_ms, "variant_ms"))
    if len(original) != len(changed):
        raise ValueError(
            f"original_ms has {len(original)} blocks and variant_ms {len(changed)}, but pairs need as many of each"
        )
    ratios = original - changed
    low, high = median_interval(ratios, confidence, seed)
    return Comparison(
        baseline=baseline,
        variant=variant,
        ratio=math.exp(float(np.median(ratios))),
        low=math.exp(low),
        high=math.exp(high),
        confidence=confidence,
        verdict=_verdict(low, high, smallest_effect),
        pairs=len(ratios),
        noise=_noise(original, confidence, seed),
    )


def pairs_needed(confidence: float) -> int:
    """The fewest pairs for which any interval of the median has that confidence without assuming a distribution.

    Even the whole range of n values misses the median with probability `2 ** (1 - n)`: 8 pairs for 99 %.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence!r}, but it lies between 0 and 1, exclusive")
    return max(2, math.ceil(1 - math.log2(1 - confidence)))


def median_interval(values: np.ndarray, confidence: float, seed: int = 0) -> tuple[float, float]:
    """Confidence interval of the median: the wider of the bootstrap's and the exact one; see the module's text.

    Args:
        values: (n,), in the order they were taken. Where they are autocorrelated, blocks are resampled and the exact
            interval is stretched to the number of independent values that they are worth.
    """
    exact_low, exact_high = order_statistic_interval(values, confidence)
    if not math.isfinite(exact_low):
        return exact_low, exact_high
    correlation = autocorrelation(values)
    block = 1
    if correlation > AUTOCORRELATED:
        block = round(2 * len(values) ** (1 / 3))
        median = float(np.median(values))
        # The variance of an AR(1) mean is (1 + r) / (1 - r) times that of independent values.
        stretch = math.sqrt((1 + correlation) / (1 - min(correlation, 0.95)))
        exact_low, exact_high = median - stretch * (median - exact_low), median + stretch * (exact_high - median)
    medians = _bootstrap_medians(values, block, seed)
    low, high = np.quantile(medians, [(1 - confidence) / 2, (1 + confidence) / 2])
    return min(float(low), exact_low), max(float(high), exact_high)


def order_statistic_interval(values: np.ndarray, confidence: float) -> tuple[float, float]:
    """The exact interval of the median of independent values (the sign test's); infinite below `pairs_needed`."""
    count = len(values)
    if count < pairs_needed(confidence):
        return -math.inf, math.inf
    # The k-th value from each end leaves the median out with probability 2 * P(Binomial(count, 1/2) < k).
    # In logarithms, because 2 ** -count underflows for long runs.
    allowed = (1 - confidence) / 2
    outside, k = 0.0, 0
    while True:
        log_term = math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) - count * math.log(2)
        outside += math.exp(log_term)
        if outside > allowed:
            break
        k += 1
    ordered = np.sort(values)
    return float(ordered[k - 1]), float(ordered[count - k])


def autocorrelation(values: np.ndarray) -> float:
    """Lag-1 autocorrelation, outliers clipped: one hiccup must not hide or feign it."""
    clipped = np.clip(values, *np.percentile(values, [5, 95]))
    centred = clipped - clipped.mean()
    power = float(centred @ centred)
    return float(centred[1:] @ centred[:-1]) / power if power > 0 else 0.0


def _bootstrap_medians(values: np.ndarray, block: int, seed: int) -> np.ndarray:
    """Medians of `RESAMPLES` resamples, each of moving blocks of `block` values."""
    generator = np.random.default_rng(seed)
    count = len(values)
    offsets = np.arange(block)

    def resampled(rows: int) -> np.ndarray:
        starts = generator.integers(0, count - block + 1, (rows, math.ceil(count / block)))
        return values[(starts[:, :, None] + offsets).reshape(rows, -1)[:, :count]]

    return _medians(resampled, count)


def _noise(log_times: np.ndarray, confidence: float, seed: int) -> float:
    """Half-width of the interval for the baseline against itself, with as many pairs as the comparison has.

    Its two blocks in a quadruple are two measurements of the same thing. Which of them is called first is arbitrary, so
    their log ratio gets a random sign: the median of such draws is what chance alone makes of the comparison.
    """
    pairs = len(log_times)
    differences = log_times[0 : pairs - 1 : 2] - log_times[1::2]
    if not len(differences):
        return math.inf
    either_way = np.concatenate([differences, -differences])
    generator = np.random.default_rng(seed)
    medians = _medians(lambda rows: either_way[generator.integers(0, len(either_way), (rows, pairs))], pairs)
    return math.expm1(float(np.quantile(np.abs(medians), confidence)))


def _medians(drawn: Callable[[int], np.ndarray], count: int) -> np.ndarray:
    """Medians of `RESAMPLES` rows of `count` values, drawn some at a time, which bounds the memory."""
    rows = max(1, 1_000_000 // count)
    medians = []
    for start in range(0, RESAMPLES, rows):
        # Four times as fast as np.median along an axis.
        ordered = np.sort(drawn(min(rows, RESAMPLES - start)), axis=1)
        medians.append((ordered[:, (count - 1) // 2] + ordered[:, count // 2]) / 2)
    return np.concatenate(medians)


def _verdict(log_low: float, log_high: float, smallest_effect: float) -> Verdict:
    floor = math.log1p(smallest_effect)
    # A change of this size is seen where its interval, half as wide to either side, still clears the floor.
    visible = math.log1p(max(VISIBLE_EFFECT, 2 * smallest_effect))
    if log_low > floor:
        return Verdict.FASTER
    if log_high < -floor:
        return Verdict.SLOWER
    if (log_high - log_low) / 2 > visible - floor:
        return Verdict.NOISY
    return Verdict.SAME


def _positive_times(times: Sequence[float], name: str) -> np.ndarray:
    array = np.asarray(times, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"{name} has shape {array.shape}, but must be a non-empty list of times")
    wrong = ~(np.isfinite(array) & (array > 0))
    if wrong.any():
        first = int(np.argmax(wrong))
        raise ValueError(f"{name}[{first}] is {array[first]}, but times are positive and finite")
    return array
