"""Numbers as they are measured: with their unit or why there are none; times of calls; two variants compared."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

NOT_FINITE = "not finite"


def rounded(ratio: float, decimals: int = 2) -> str:
    """A ratio in digits that tell: `1.84`, `12.3`, `673`, `0.029`."""
    if not math.isfinite(ratio):
        return NOT_FINITE
    if abs(ratio) >= 100:
        return f"{ratio:,.0f}"
    if abs(ratio) >= 10:
        return f"{ratio:.1f}"
    if abs(ratio) < 0.1:
        return f"{ratio:.2g}"
    return f"{ratio:.{decimals}f}"


@dataclass(frozen=True)
class Quantity:
    """A number with its unit, or the reason why there is none.

    Args:
        value: the number; None where it could not be measured.
        unit: "B", "s", "ms", "calls", "ratio", "dB", …
        unavailable: why there is no value; None where there is one.
        method: how it was measured, in a few words.
    """

    value: float | None
    unit: str
    unavailable: str | None = None
    method: str | None = None

    def __post_init__(self):
        assert (self.value is None) == (self.unavailable is not None), "a value or a reason, never both or neither"

    @classmethod
    def missing(cls, unit: str, reason: str) -> Quantity:
        return cls(None, unit, unavailable=reason)


class Verdict(enum.StrEnum):
    FASTER = "faster"
    SLOWER = "slower"
    SAME = "no significant change"
    NOISY = "too noisy"


@dataclass(frozen=True)
class Comparison:
    """Two variants timed interleaved in one run.

    Args:
        ratio: time of `baseline` / time of `variant`, so 2.0 means twice as fast: the median over pairs.
        low, high: confidence interval of the ratio.
        confidence: coverage of the interval, e.g. 0.99.
        verdict: what the interval allows to say.
        pairs: number of interleaved pairs behind it; 0 where the result is the original itself, whose ratio is 1.
        noise: half-width of the same interval for the baseline against itself, as a relative number.
        waited: seconds that this process' threads, together, had work but no processor, for each second of the timing;
            None where the platform does not tell.
    """

    baseline: str
    variant: str
    ratio: float
    low: float
    high: float
    confidence: float
    verdict: Verdict
    pairs: int
    noise: float
    waited: float | None = None

    def __str__(self) -> str:
        return f"{rounded(self.ratio)}× [{rounded(self.low)}, {rounded(self.high)}] {self.verdict}"


@dataclass(frozen=True)
class Latency:
    """Times of single synchronized calls, in the order they were taken (at most a few thousand are kept)."""

    samples_ms: tuple[float, ...]
    median_ms: float
    p90_ms: Quantity
    p95_ms: Quantity
    p99_ms: Quantity
