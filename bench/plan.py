"""`python -m bench.plan`: what do two and four processes really take, and is the planner's prediction that?

Every launch measures the models' parts and what lies between the processes, predicts each layout's step from them, and
times that step itself and the step of one process, all in turn in every round. Kept in results/plan-<device>.json, and
from there in docs/planning.md and the pages of the recipes. In JAX the processes are devices of one process.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from bench import plan_pages
from bench.pages import RESULTS, device_slug
from bench.plan_models import MODELS
from perfkit.measure import statistics
from perfkit.measure.environment import environment
from perfkit.parallel.launching import Launch, launch, told

DESCRIBED = ("sent_bytes", "communicating", "held_bytes", "peak_bytes")


def main() -> None:
    options = _parser().parse_args()
    if options.worker:
        from bench.plan_work import work

        (framework,) = options.frameworks
        work(framework, options.models, options.rounds, options.describe, options.worker)
        return
    if not options.page:
        for framework in options.frameworks:
            record(framework, options)
    if not options.quick:
        plan_pages.write()


def record(framework: str, options: argparse.Namespace) -> None:
    """Launch after launch until all were made, or the next would take too long; the first of each is always made."""
    began, found, took = time.monotonic(), [], {}
    launches = [(number, count) for number in range(options.repeats) for count in options.processes]
    for index, (number, count) in enumerate(launches):
        start = time.monotonic()
        if count in took and start - began + took[count] > options.minutes * 60:
            print(f"{framework}: {options.minutes:g} minutes are nearly over after {index} launches", flush=True)
            break
        print(f"{framework}: launch {index + 1} of {len(launches)}, {count} processes", flush=True)
        found += launched(framework, count, options, describe=number == 0)
        took[count] = time.monotonic() - start
        print(f"{framework}: took {took[count]:.0f} s, {time.monotonic() - began:.0f} s so far", flush=True)
        rows = summed_up(found)
        if not options.quick:
            keep(rows, options.rounds)  # at once: a later launch may fail, or not be waited for
    for row in rows:
        line = plan_pages.predicted_line if "predicted_ms" in row else plan_pages.scaling_line
        print(line(row), flush=True)


def keep(rows: list[dict[str, Any]], rounds: int) -> None:
    """Write the rows to this machine's file, in the place of those of the same models and processes."""
    path = RESULTS / f"plan-{device_slug()}.json"
    kept = json.loads(path.read_text())["rows"] if path.exists() else []

    def about(row: dict[str, Any]) -> tuple:
        return row["framework"], row["model"], row["processes"]

    new = set(map(about, rows))
    recorded = {
        "environment": dataclasses.asdict(environment()),
        "date": datetime.now(UTC).date().isoformat(),
        "rounds": rounds,
        "rows": [row for row in kept if about(row) not in new] + rows,
    }
    path.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")
    print(f"wrote {path}", flush=True)


def launched(framework: str, count: int, options: argparse.Namespace, describe: bool) -> list[dict[str, Any]]:
    """What one launch of so many processes predicts and measures."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        command = ["-m", "bench.plan", "--worker", str(file), "--frameworks", framework]
        command += ["--rounds", str(options.rounds), "--models", *options.models, *(["--describe"] if describe else [])]
        how = {"processes": count} if framework == "torch" else {"processes": 1, "devices": count}
        if ended := launch(command, Launch(framework=framework, **how)):
            sys.exit(told(ended))
        return json.loads(file.read_text())


def summed_up(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each model, number of processes and layout.

    Predictions and times are medians over the launches; ratios are of steps of the same round, over the rounds of all.
    """
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in found:
        groups.setdefault((row["framework"], row["model"], row["processes"], row["recipe"]), []).append(row)
    return [_row(some) for some in groups.values()]


def _row(some: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first = some[0]
    steps_ms = [median(row["steps_ms"]) for row in some]
    found = {name: first[name] for name in ("framework", "model", "processes", "layout", "recipe")}
    found |= {"measured_ms": median(steps_ms), "launches": len(some), "scaling": _scaling(some)}
    if "predicted_ms" in first:
        each = [row["predicted_ms"] / step_ms for row, step_ms in zip(some, steps_ms, strict=True)]
        found |= {"ratio": median(each), "lowest": min(each), "highest": max(each)}
        found["predicted_ms"] = median(row["predicted_ms"] for row in some)
        found["parts_ms"] = {part: median(row["parts_ms"][part] for row in some) for part in first["parts_ms"]}
    if described := next((row for row in some if "sent_bytes" in row), None):
        found["parallel"] = {name: described[name] for name in DESCRIBED}
    return found


def _scaling(some: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How many times as quick as one process, with the 99 % interval."""

    def all_of(side: str) -> list[float]:
        return [value for row in some for value in row[side]]

    def against(side: str) -> dict[str, Any] | None:
        if not (before := all_of(side)):
            return None
        found = statistics.compare(before, all_of("steps_ms"), baseline=side, variant=some[0]["recipe"])
        return {name: getattr(found, name) for name in ("ratio", "low", "high", "pairs")}

    return {"one_ms": median(all_of("one_ms")), "one": against("one_ms"), "all_cores": against("all_cores_ms")}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    there = [name for name in ("torch", "jax") if find_spec(name)]
    parser.add_argument("--frameworks", nargs="+", choices=there, default=there, help="rows of others are kept")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="rows of others are kept")
    parser.add_argument("--processes", nargs="+", type=int, default=(2, 4))
    parser.add_argument("--rounds", type=int, default=8, help="of each launch; fewer than 8 leave no 99 %% interval")
    parser.add_argument("--repeats", type=int, default=3, help="launches: processes differ from start to start")
    parser.add_argument(
        "--minutes", type=float, default=15.0, help="for each framework: no launch begins that ends later"
    )
    parser.add_argument("--page", action="store_true", help="measure nothing, only write the pages")
    parser.add_argument("--quick", action="store_true", help="keep nothing: see it work")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--describe", action="store_true", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
