"""`python -m bench.record`: recipe="auto" on the reference models, kept in results/<device>.json and results/README.md.

The same command on any machine adds that machine's file; nothing is ever written that was not measured on it.
"""

from __future__ import annotations

import json
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import perfkit
from bench.pages import RESULTS, device_slug, machine
from perfkit import PerfkitWarning, reference
from perfkit.reporting import _format

CASES = [("cnn", 1), ("cnn", 64), ("cnn", 512), ("cnn2", 64), ("lstm", 64), ("text_lstm", 64)]
BUDGET_S = 40.0
TRAINING = [("cnn", "bf16"), ("cnn", "compile"), ("lstm", "bf16"), ("lstm", "compile")]


def main() -> None:
    frameworks = [name for name in ("torch", "jax") if find_spec(name)]
    rows = [_inference(framework, *case) for framework in frameworks for case in CASES]
    rows += [_training(framework, *case) for framework in frameworks for case in TRAINING]
    path = RESULTS / f"{device_slug()}.json"
    recorded = {
        "environment": rows[0]["report"]["environment"],
        "date": rows[0]["report"]["created"][:10],
        "rows": rows,
    }
    path.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")
    (RESULTS / "README.md").write_text(page())
    print(f"wrote {path} and {RESULTS / 'README.md'}")


def _inference(framework: str, model: str, batch_size: int) -> dict[str, Any]:
    module, example_inputs = reference.load(model, framework=framework, batch_size=batch_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PerfkitWarning)  # slower is a result here
        report = perfkit.optimize(module, "auto", example_inputs=example_inputs, budget_s=BUDGET_S).report
    return _row(f"{model}, batch {batch_size}", framework, report)


def _training(framework: str, model: str, recipe: str) -> dict[str, Any]:
    task = reference.task(model, framework=framework)
    arguments = {name: getattr(task, name) for name in ("model", "example_inputs", "targets", "loss", "optimizer")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PerfkitWarning)
        report = perfkit.optimize(**arguments, recipe=recipe, mode="training").report
    return _row(f"{model}, training step, batch 64", framework, report)


def _row(label: str, framework: str, report: perfkit.Report) -> dict[str, Any]:
    print(f"{framework}: {label}: {report.recipe}: {report.speedup}", flush=True)
    data = report.to_dict()
    for side in ("before", "after"):
        data[side]["latency"]["samples_ms"] = []  # thousands of numbers that nobody reads again
    return {"label": label, "framework": framework, "report": data}


def page() -> str:
    """The results of every recorded device, as Markdown."""
    lines = [
        "# What was measured",
        "",
        'Written by `python -m bench.record`: `recipe="auto"` for inference, single recipes for training, on the',
        "reference models. The ratio is the original's time over the result's, interleaved in one run, with its 99 %",
        "interval; the original is the model as its user would call it: eager PyTorch, eager flax. For JAX the ratio",
        "against `jax.jit` of the original stands beside it. A ratio below 1 is a slow-down.",
    ]
    for path in sorted(RESULTS.glob("*.json")):
        recorded = json.loads(path.read_text())
        if "report" in recorded.get("rows", [{}])[0]:
            lines += ["", *_device(path, recorded)]
    return "\n".join(lines) + "\n"


def _device(path: Path, recorded: dict[str, Any]) -> list[str]:
    about = recorded["environment"]
    libraries = ", ".join(f"{name} {version}" for name, version in sorted(about["libraries"].items()))
    instructions = ", ".join(about["instruction_sets"])
    return [
        f"## {machine(recorded)}",
        "",
        f"{recorded['date']}; {libraries}; instructions: {instructions}. Source: `{path.name}`.",
        "",
        "| model | framework | recipe | ratio | against jax.jit | median before → after | error |",
        "|---|---|---|---|---|---|---|",
        *(_line(row) for row in recorded["rows"]),
    ]


def _line(row: dict[str, Any]) -> str:
    report = row["report"]
    kept = report["outcome"] == "original returned"
    speedup, compiled = report["speedup"], report["against_compiled"]
    told = "1 (the original)" if kept else _ratio(speedup)
    medians = [_format.format_ms(report[side]["latency"]["median_ms"]) for side in ("before", "after")]
    error = _format.format_error(report["fidelity"]["relative_error"])
    cells = (
        row["label"], row["framework"], "none is faster" if kept else f"`{report['recipe']}`", told,
        _ratio(compiled) if compiled and not kept else "–", " → ".join(medians), error,
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _ratio(comparison: dict[str, Any]) -> str:
    low, high = comparison["low"], comparison["high"]
    return f"{comparison['ratio']:.2f}× [{low:.2f}, {high:.2f}] {comparison['verdict']}"


if __name__ == "__main__":
    main()
