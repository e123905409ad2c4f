"""`python -m bench.keep_memory`: what the recipe `keep_memory` gives on this machine, and what it holds.

Kept in results/keep-memory-<device>.json, and from there in docs/recipes/keep_memory.md. Each row is measured in a
process of its own, since what others have left in the heap counts: `python -m bench.keep_memory --only 0` makes the
first one alone, and leaves the others as they were recorded.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import timeit
import warnings
from typing import Any

from bench.pages import RESULTS, device_slug, machine, recorded
from perfkit.measure.environment import environment

CASES = (
    ("cnn", 512, "inference", "keep_memory"),
    ("cnn", 512, "inference", "fused_kernels+keep_memory"),
    ("cnn", 128, "training", "keep_memory"),
    ("cnn", 512, "training", "keep_memory"),
    ("cnn", 512, "training", "fused_kernels+keep_memory"),
    ("text_lstm", 64, "training", "keep_memory"),
    ("cnn", 64, "inference", "keep_memory"),
)
"""Model, batch size, mode, chain."""

BUDGET_S = 15.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="measure nothing, only write the page")
    parser.add_argument("--only", type=int, choices=range(len(CASES)), help="the number of a row")
    parser.add_argument("--row", nargs=4, metavar=("MODEL", "BATCH_SIZE", "MODE", "CHAIN"), help="print one, as JSON")
    options = parser.parse_args()
    if options.row:
        model, batch_size, mode, chain = options.row
        print(json.dumps(row(model, int(batch_size), mode, chain)))
        return
    if not options.page:
        record(CASES if options.only is None else [CASES[options.only]])
    from bench import compression

    compression.write(compression.PAGES / "keep_memory.md")


def record(cases) -> None:
    path = RESULTS / f"keep-memory-{device_slug()}.json"
    rows = {case_of(each): each for each in json.loads(path.read_text())["rows"]} if path.exists() else {}
    for case in cases:
        command = [sys.executable, "-m", "bench.keep_memory", "--row", *map(str, case)]
        rows[case] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
        print(rows[case], flush=True)
        ordered = [rows[each] for each in CASES if each in rows]
        found = {"environment": dataclasses.asdict(environment()), "rows": ordered, "switching_us": switching_us()}
        path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    print(f"wrote {path}")


def case_of(row: dict[str, Any]) -> tuple[str, int, str, str]:
    return row["model"], row["batch_size"], row["mode"], row["recipe"]


def row(model: str, batch_size: int, mode: str, chain: str) -> dict[str, Any]:
    """A chain with the recipe against the model as it was, and the pages that a call of either touches first."""
    import perfkit
    from perfkit import PerfkitWarning, reference
    from perfkit.measure import kept_memory

    warnings.simplefilter("ignore", PerfkitWarning)  # slower is a result here
    given = reference.task(model, batch_size=batch_size)
    wanted = ("model", "example_inputs", *(("targets", "loss", "optimizer") if mode == "training" else ()))
    arguments = {name: getattr(given, name) for name in wanted} | {"mode": mode}
    report = (result := perfkit.optimize(**arguments, recipe=chain, budget_s=BUDGET_S)).report
    plain = perfkit.apply(**arguments, recipe="nothing")
    taken = []
    for side in (plain, result):
        for _ in range(2):  # the first calls after measuring memory find none
            taken.append(kept_memory.touched_anew(calling(side, given, mode)))
    speedup = {name: getattr(report.speedup, name) for name in ("ratio", "low", "high")}
    return speedup | {
        "model": model,
        "batch_size": batch_size,
        "mode": mode,
        "recipe": chain,
        "verdict": str(report.speedup.verdict),
        "median_ms": [side.latency.median_ms for side in (report.before, report.after)],
        "taken_bytes": [taken[1], taken[3]],
        "high_water_bytes": [side.process_high_water_bytes.value for side in (report.before, report.after)],
        "notes": list(report.steps[-1].effect.notes),
    }


def calling(result, given, mode):
    import torch

    if mode == "training":
        return lambda: result.train_step((given.example_inputs, given.targets))

    def call():
        with torch.no_grad():
            result.model(*given.example_inputs)

    return call


def switching_us() -> float:
    """What each call costs on top: going into the cache and out of it, in µs."""
    from perfkit.kernels.torch_memory.allocator import Keeping, User

    _user = User()

    def once() -> None:
        with Keeping():
            pass

    return min(timeit.repeat(once, number=1000, repeat=9)) / 1000 * 1e6


def measured() -> list[str]:
    """What was recorded, as Markdown, machine by machine."""
    lines = []
    for path, found in recorded("keep-memory"):
        lines += [
            "",
            f"{machine(found)}, PyTorch, the reference models; source: `bench/results/{path.name}`. Going into the "
            f"cache and out of it takes {found['switching_us']:.1f} µs of each call.",
            "",
            "| model, batch | recipe | what it said | taken anew in a call | a call | the whole chain |",
            "|---|---|---|---|---|---|",
            *map(line, found["rows"]),
            "",
        ]
    return lines


def line(row: dict[str, Any]) -> str:
    where = f"{row['model']}, {row['batch_size']}, {row['mode']}"
    ratio = f"{row['ratio']:.2f}× [{row['low']:.2f}, {row['high']:.2f}] {row['verdict']}"
    taken = " → ".join(f"{size / 2**20:.0f} MiB" for size in row["taken_bytes"])
    times = " → ".join(f"{ms:.1f} ms" for ms in row["median_ms"])
    return f"| {where} | `{row['recipe']}` | {'; '.join(row['notes'])} | {taken} | {times} | {ratio} |"


if __name__ == "__main__":
    main()
