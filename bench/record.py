"""`python -m bench.record`: recipe="auto" on the reference models, in results/<device>.json and on the pages of it.

The same command on any machine adds that machine's file; nothing is ever written that was not measured on it.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import perfkit
from bench.pages import RESULTS, device_slug, machine, put
from perfkit import PerfkitWarning, reference
from perfkit.reporting import _format

CASES = [
    ("cnn", 1),
    ("cnn", 64),
    ("cnn", 512),
    ("cnn2", 64),
    ("lstm", 1),
    ("lstm", 64),
    ("text_lstm", 1),
    ("text_lstm", 64),
]
TRAINED = ["cnn", "lstm", "text_lstm"]
BUDGET_S = 40.0
FRONT = Path(__file__).parents[1] / "README.md"
MARKS = "<!-- measured: written by python -m bench.record -->", "<!-- end -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--continued", action="store_true", help="after an interruption: rows that are there stay")
    path = RESULTS / f"{device_slug()}.json"
    there = json.loads(path.read_text())["rows"] if parser.parse_args().continued and path.exists() else []
    kept = {(row["framework"], row["label"]): row for row in there}
    rows: list[dict[str, Any]] = []
    for row in _measured(kept):
        rows.append(row)
        about = row["report"]
        recorded = {"environment": about["environment"], "date": about["created"][:10], "rows": rows}
        path.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")
    (RESULTS / "README.md").write_text(page())
    put(FRONT, MARKS, summary())
    print(f"wrote {path}, {RESULTS / 'README.md'} and {FRONT}")


def _measured(kept: dict[tuple[str, str], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Every row, those that are kept as they are."""
    for framework in filter(find_spec, ("torch", "jax")):
        for model, batch_size in CASES:
            module, example_inputs = reference.load(model, framework=framework, batch_size=batch_size)
            calibration = reference.calibration(model, framework=framework)
            arguments = {"model": module, "example_inputs": example_inputs, "calibration": calibration}
            label = f"{model}, batch {batch_size}"
            yield kept.get((framework, label)) or _row(label, framework, **arguments)
        for model in TRAINED:
            task = reference.task(model, framework=framework)
            arguments = {
                name: getattr(task, name) for name in ("model", "example_inputs", "targets", "loss", "optimizer")
            }
            label = f"{model}, training step, batch 64"
            yield kept.get((framework, label)) or _row(label, framework, **arguments, mode="training")


def _row(label: str, framework: str, **arguments: Any) -> dict[str, Any]:
    if framework == "torch":
        import torch

        torch.compiler.reset()  # what earlier rows compiled counts against Dynamo's limit
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PerfkitWarning)  # that none is faster is a result here
        report = perfkit.optimize(**arguments, recipe="auto", budget_s=BUDGET_S).report
    print(f"{framework}: {label}: {report.recipe}: {report.speedup}", flush=True)
    data = report.to_dict()
    for side in ("before", "after"):
        data[side]["latency"]["samples_ms"] = []  # thousands of numbers that nobody reads again
    return {"label": label, "framework": framework, "report": data}


def _recorded() -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every machine's file."""
    for path in sorted(RESULTS.glob("*.json")):
        recorded = json.loads(path.read_text())
        if "report" in recorded.get("rows", [{}])[0]:
            yield path, recorded


def summary() -> list[str]:
    """Ratios on every recorded device, short: PyTorch's against eager, JAX's against jax.jit."""
    lines = [""]
    for _, recorded in _recorded():
        labels = dict.fromkeys(row["label"] for row in recorded["rows"])
        found = {(row["label"], row["framework"]): row["report"] for row in recorded["rows"]}
        lines += [f"{machine(recorded)}, {recorded['date']}:", ""]
        lines += ["| model | PyTorch, against eager | JAX, against `jax.jit` |", "|---|---|---|"]
        for label in labels:
            torch, jax = (found.get((label, framework)) for framework in ("torch", "jax"))
            lines.append(f"| {label} | {_gain(torch, 'speedup')} | {_gain(jax, 'against_compiled')} |")
        lines.append("")
    return lines


def _gain(report: dict[str, Any] | None, against: str) -> str:
    if report is None:
        return "–"
    if report["outcome"] == "original returned":
        return "none is faster"
    ratio = report[against] or report["speedup"]  # a training step of JAX is compiled to begin with
    return f"{ratio['ratio']:.2f}× [{ratio['low']:.2f}, {ratio['high']:.2f}] by `{report['recipe']}`"


def page() -> str:
    """The results of every recorded device, as Markdown."""
    lines = [
        "# What was measured",
        "",
        'Written by `python -m bench.record`: `recipe="auto"` on the reference models, for inference unless a training',
        f"step is named, {BUDGET_S:g} s each. The ratio is the original's time over the result's, interleaved in one",
        "run, with its 99 % interval; the original is the model as its user would call it: eager PyTorch, eager flax.",
        "For JAX the ratio against `jax.jit` of the original stands beside it. What single recipes and kernels give,",
        "slow-downs included, is on their pages in [docs](../../docs), from the other files here.",
    ]
    for path, recorded in _recorded():
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
