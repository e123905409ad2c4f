"""Paired benchmarks: each one times a variant against its baseline in the same run."""

from __future__ import annotations

import pytest

from perfkit._quantity import Comparison
from perfkit.measure.environment import environment


@pytest.fixture
def paired(benchmark):
    """Record a comparison beside what pytest-benchmark times itself.

    pytest-benchmark's own numbers are of the variant alone; the claim is the ratio in `extra_info`.
    """

    def record(call, comparison: Comparison | None, **more) -> None:
        if comparison is not None:
            benchmark.extra_info |= {
                "ratio": comparison.ratio,
                "low": comparison.low,
                "high": comparison.high,
                "confidence": comparison.confidence,
                "verdict": str(comparison.verdict),
                "pairs": comparison.pairs,
                "baseline": comparison.baseline,
            }
        benchmark.extra_info |= more
        benchmark.pedantic(call, rounds=20, warmup_rounds=2)

    return record


def pytest_benchmark_update_machine_info(config, machine_info):
    """Absolute times may be compared only where the fingerprint is the same."""
    found = environment()
    machine_info |= {
        "fingerprint": found.fingerprint,
        "instruction_sets": list(found.instruction_sets),
        "libraries": found.libraries,
        "threads": found.threads,
        "settings": found.settings,
    }
