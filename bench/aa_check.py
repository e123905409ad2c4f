"""How often are perfkit's verdicts wrong on this machine? `python -m bench.aa_check` from the repository's root.

Three questions, each asked many times of the document's CNN, through the function that `optimize` itself uses:

- against itself: the same callable on both sides. Every "faster" and every "slower" is false.
- against a copy: another copy of the weights and inputs, as a recipe that changes nothing would make. What differs is
  only where the memory lies.
- a tenth slower: the variant makes the same call and then spins for a tenth of what it took, which is a slow-down of
  exactly 10 % (a larger batch is not: allocators and kernels jump at sizes). Everything but "slower" is a miss.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import nn

from perfkit._quantity import Comparison
from perfkit.measure.environment import environment
from perfkit.measure.timing import paired

IMAGES = 20
RESULTS = Path(__file__).parent / "results" / "aa_check.json"


def caller(model: nn.Module, images: torch.Tensor) -> Callable[[], torch.Tensor]:
    def call():
        with torch.inference_mode():
            return model(images)

    return call


def a_tenth_slower(call: Callable) -> Callable:
    def slower():
        start = time.perf_counter_ns()
        result = call()
        end = time.perf_counter_ns() + (time.perf_counter_ns() - start) // 10
        while time.perf_counter_ns() < end:
            pass
        return result

    return slower


def questions() -> dict[str, tuple[Callable, Callable]]:
    """The two sides of each question."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(5408, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    ).eval()
    images = torch.randn(IMAGES, 1, 28, 28)
    original = caller(model, images)
    return {
        "against itself": (original, original),
        "against a copy": (original, caller(copy.deepcopy(model), images.clone())),
        "a tenth slower": (original, a_tenth_slower(original)),
    }


def asked(sides: tuple[Callable, Callable], seed: int, budget_s: float) -> Comparison:
    return paired(*sides, baseline="original", variant_name="variant", budget_s=budget_s, seed=seed)[2]


def summary(comparisons: list[Comparison]) -> dict:
    ratios = [item.ratio for item in comparisons]
    half_widths = [np.sqrt(item.high / max(item.low, 1e-9)) - 1 for item in comparisons]
    return {
        "runs": len(comparisons),
        "verdicts": dict(Counter(str(item.verdict) for item in comparisons)),
        "ratio_median": float(np.median(ratios)),
        "ratio_lowest": min(ratios),
        "ratio_highest": max(ratios),
        "interval_half_width_median": float(np.median(half_widths)),
        "noise_median": float(np.median([item.noise for item in comparisons])),
        "pairs_median": float(np.median([item.pairs for item in comparisons])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200, help="comparisons per question")
    parser.add_argument("--budget-s", type=float, default=1.0, help="seconds per comparison")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--questions", nargs="+", metavar="NAME", help="only these; what is on file of others is kept")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    load_before = os.getloadavg()
    comparisons: dict[str, list[Comparison]] = {}
    sides = {name: pair for name, pair in questions().items() if not options.questions or name in options.questions}
    # Question by question in each round, so that a busy hour of the machine falls on all three.
    for seed in range(options.runs):
        for name, pair in sides.items():
            comparisons.setdefault(name, []).append(asked(pair, seed, options.budget_s))
    found = {
        "model": f"the document's CNN, {IMAGES} images, float32, eager",
        "budget_s": options.budget_s,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_before": load_before,
        "load_after": os.getloadavg(),
        "environment": dataclasses.asdict(environment()),
        "questions": {name: summary(items) | {"budget_s": options.budget_s} for name, items in comparisons.items()},
    }
    if options.questions and options.output.exists():
        found["questions"] = json.loads(options.output.read_text())["questions"] | found["questions"]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n")
    for name, item in found["questions"].items():
        verdicts = ", ".join(f"{count} {verdict}" for verdict, count in item["verdicts"].items())
        print(f"{name}: {verdicts}; ratio {item['ratio_median']:.3f}, {item['pairs_median']:.0f} pairs")


if __name__ == "__main__":
    main()
