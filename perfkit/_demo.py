"""`perfkit demo`: the reference CNN and LSTM, trained on real data and made faster in both frameworks."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import perfkit
from perfkit import _cli_common, backends, reference
from perfkit._errors import PerfkitWarning, missing
from perfkit._report import Report
from perfkit.reference import Framework
from perfkit.reporting import html, terminal

MODELS = {"cnn": 512, "lstm": 64}
"""What is shown, and at which batch size."""

MAX_DROP = {"accuracy": 0.005, "mse": 0.01}
"""By how much the held-out metric may worsen."""


def run(page: Path, budget_s: float) -> None:
    """Train, optimize, print the table, and write `page`.

    Args:
        budget_s: seconds to search on each model in each framework.

    Raises:
        MissingDependencyError: neither framework is installed.
    """
    began = time.perf_counter()
    frameworks = [name for name in get_args(Framework) if all(map(find_spec, backends.REQUIRED[name]))]
    if not frameworks:
        raise missing("torch or jax", "the demo", extra="all")
    rows: list[tuple[str, Report]] = []
    for name, batch_size in MODELS.items():
        metric, models = _trained(name, frameworks)
        for framework, model in models.items():
            label = f"{name}, {framework}, batch {batch_size}"
            with _cli_common.status(label) as progress:
                report = _optimized(name, framework, model, batch_size, metric, budget_s, progress)
            rows.append((label, report))
            _cli_common.out.print(f"{label}: {report.explanation}", highlight=False, soft_wrap=True)
    _cli_common.out.print()
    _cli_common.out.print(terminal.summary_table(rows))
    page.write_text(html.page(rows), encoding="utf-8")
    _cli_common.out.print(
        f"\n{time.perf_counter() - began:.0f} s. The whole proof is in {page}.", highlight=False, soft_wrap=True
    )


def _trained(name: str, frameworks: list[Framework]) -> tuple[str, dict[Framework, Any]]:
    """The metric, and the model trained once, in each framework: its weights are converted."""
    first = frameworks[0]
    with _cli_common.training_progress(f"{name} ({first})") as progress:
        trained = reference.train(name, framework=first, progress=progress)
    _cli_common.out.print(_cli_common.trained_line(name, first, trained), highlight=False, soft_wrap=True)
    models: dict[Framework, Any] = {first: trained.model}
    if "jax" in frameworks[1:]:
        models["jax"] = reference.to_jax(name, trained.model)
    return trained.metric, models


def _optimized(
    name: str,
    framework: Framework,
    model: Any,
    batch_size: int,
    metric: str,
    budget_s: float,
    progress: Callable[[str], None],
) -> Report:
    _, example_inputs = reference.load(name, framework=framework, batch_size=batch_size)
    evaluate = partial(_score, name, framework, metric)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PerfkitWarning)  # they stand in the report
        return perfkit.optimize(
            model,
            "auto",
            example_inputs=example_inputs,
            calibration=reference.calibration(name, framework=framework),
            evaluate=evaluate,
            max_drop=MAX_DROP[metric],
            budget_s=budget_s,
            progress=progress,
        ).report


def _score(name: str, framework: Framework, metric: str, model: Any) -> float:
    """Held-out accuracy; or the mean squared error, negative, so that larger is better."""
    value = reference.evaluate(name, model, framework=framework).value
    return -value if metric == "mse" else value
