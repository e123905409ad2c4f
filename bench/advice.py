"""`python -m bench.advice`: what advice predicts for the reference models, and what its recipes then give here.

Each model is profiled, and every finding that names a recipe is tried: `perfkit.optimize` with that recipe, interleaved
with the original in one run. Kept in results/advice-<device>.json, and from there in docs/advice.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime as dt
import json
import math
import time
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import perfkit
from bench.pages import DOCS, NOTHING, RESULTS, device_slug, machine, put, recorded
from perfkit import PerfkitError, PerfkitWarning, reference
from perfkit._showing import plain
from perfkit.measure.environment import environment
from perfkit.profiling._profile import Finding

PAGE = DOCS / "advice.md"
MARKS = "<!-- measured: written by python -m bench.advice -->", "<!-- end -->"

CASES = (
    ("cnn", "inference", 1),
    ("cnn", "inference", 64),
    ("cnn", "inference", 512),
    ("cnn2", "inference", 64),
    ("lstm", "inference", 64),
    ("text_lstm", "inference", 64),
    ("cnn", "training", 64),
    ("lstm", "training", 64),
    ("text_lstm", "training", 64),
)
BUDGET_S = 4.0
CLOSE = 1.5
"""A prediction is called close that is off by no more than this factor."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    there = [name for name in ("torch", "jax") if find_spec(name)]
    parser.add_argument("--frameworks", nargs="+", choices=there, default=there, help="rows of others are kept")
    every = list(dict.fromkeys(case[0] for case in CASES))
    parser.add_argument("--models", nargs="+", choices=every, default=every, help="rows of others are kept")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, metavar="N", help="seconds for timing each recipe")
    parser.add_argument("--page", action="store_true", help="measure nothing, only write the page")
    options = parser.parse_args()
    if not options.page:
        record(options.frameworks, options.models, options.budget_s)
    write()


def record(frameworks: list[str], models: list[str], budget_s: float) -> None:
    """Try every case of them, and write after each row; what is recorded of others stays."""
    path, start = RESULTS / f"advice-{device_slug()}.json", time.monotonic()
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    about = {"environment": dataclasses.asdict(environment()), "date": dt.date.today().isoformat()}
    cases = [(framework, *case) for framework in frameworks for case in CASES if case[0] in models]
    for number, values in enumerate(cases, 1):
        case = dict(zip(("framework", "model", "mode", "batch_size"), values, strict=True))
        print(f"{time.monotonic() - start:4.0f} s  {number}/{len(cases)}: {', '.join(map(str, values))}", flush=True)
        rows = [row for row in rows if not case.items() <= row.items()]
        for row in tried(case, budget_s):
            print(f"{time.monotonic() - start:4.0f} s  {line(row)}", flush=True)
            rows.append(row)
            path.write_text(json.dumps(plain(about | {"rows": rows}), indent=1, sort_keys=True, allow_nan=False) + "\n")
    print(f"wrote {path}")


def tried(case: dict[str, Any], budget_s: float) -> Iterator[dict[str, Any]]:
    """Profile one model; a row for each finding that names a recipe."""
    arguments = given(**case)
    profile = perfkit.profile(**arguments, budget_s=min(budget_s, 3.0))
    if profile.outcome != "complete":
        yield case | {"failed": profile.explanation}
        return
    by_recipe = {finding.recipe: finding for finding in reversed(profile.findings) if finding.recipe}
    for finding in reversed(by_recipe.values()):
        yield case | told(finding) | gained(finding, arguments, budget_s)


def given(framework: str, model: str, mode: str, batch_size: int) -> dict[str, Any]:
    """The arguments of `profile` and `optimize`, a new model among them."""
    if mode == "inference":
        module, example_inputs = reference.load(model, framework=framework, batch_size=batch_size)
        return {"model": module, "example_inputs": example_inputs, "mode": mode}
    task = reference.task(model, framework=framework)
    fields = ("model", "example_inputs", "targets", "loss", "optimizer")
    return {field: getattr(task, field) for field in fields} | {"mode": mode}


def told(finding: Finding) -> dict[str, Any]:
    """What the advice says."""
    return {
        "finding": finding.kind,
        "recipe": finding.recipe,
        "resource": finding.resource,
        "share": finding.share,
        "predicted": finding.predicted.value,
        "because": finding.predicted.method or finding.predicted.unavailable,
    }


def gained(finding: Finding, arguments: dict[str, Any], budget_s: float) -> dict[str, Any]:
    """What the recipe gives: of the time, or of the peak."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PerfkitWarning)  # slower is a result here
            report = perfkit.optimize(**arguments, recipe=finding.recipe, tolerance=10.0, budget_s=budget_s).report
    except PerfkitError as error:
        return {"refused": str(error).splitlines()[0]}
    if finding.resource == "memory":
        before, after = (side.tensor_peak_bytes.value for side in (report.before, report.after))
        return {"gained": before / after if before and after else None}
    fields = ("low", "high")
    speedup = report.speedup
    return {"gained": speedup.ratio, "verdict": str(speedup.verdict)} | {
        name: getattr(speedup, name) for name in fields
    }


def write() -> None:
    """Put what was recorded between the marks of the page."""
    put(PAGE, MARKS, measured())


def measured() -> list[str]:
    lines: list[str] = []
    for path, found in recorded("advice"):
        close, all_of_them = agreement(found["rows"])
        where = f"{machine(found)}{_threads(found['environment'])}, {found['date']}"
        lines += [
            "",
            f"{where}; source: `bench/results/{path.name}`.",
            f"{close} of {all_of_them} predictions are within a factor of {CLOSE:g} of what was measured.",
            "",
            "| model, batch | framework | finding | recipe | predicted | gained |",
            "|---|---|---|---|---|---|",
            *map(line, found["rows"]),
            "",
        ]
    return lines or NOTHING


def _threads(about: dict[str, Any]) -> str:
    """How many threads were allowed, where it was said."""
    told = about["threads"].get("OMP_NUM_THREADS")
    return "" if told is None else f", {told} thread{'s' if told > 1 else ''}"


def agreement(rows: list[dict[str, Any]]) -> tuple[int, int]:
    """How many predictions are close to what was gained, and how many there are to compare."""
    pairs = [(row["predicted"], row["gained"]) for row in rows if row.get("predicted") and row.get("gained")]
    return sum(abs(math.log(predicted / gained)) <= math.log(CLOSE) for predicted, gained in pairs), len(pairs)


def line(row: dict[str, Any]) -> str:
    where = f"{row['model']}, {row['batch_size']}" + (", training" if row["mode"] == "training" else "")
    if "failed" in row:
        return f"| {where} | {row['framework']} | profile failed: {row['failed']} | – | – | – |"
    predicted = f"{row['predicted']:.2f}×" if row["predicted"] else "not predicted"
    gain = f"{row['gained']:.2f}×" if row.get("gained") else f"refused: {row['refused']}" if "refused" in row else "–"
    if "verdict" in row:
        ends = ", ".join("?" if row[end] is None else f"{row[end]:.2f}" for end in ("low", "high"))
        gain += f" [{ends}] {row['verdict']}"
    finding = row["finding"] + (" (memory)" if row["resource"] == "memory" else "")
    return f"| {where} | {row['framework']} | {finding} | `{row['recipe']}` | {predicted} | {gain} |"


if __name__ == "__main__":
    main()
