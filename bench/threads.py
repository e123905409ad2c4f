"""`python -m bench.threads`: which number of threads the recipe `threads` chooses on this machine, and what it gives.

Kept in results/threads-<device>.json, and from there in docs/recipes/threads.md. Each row tells every number that was
tried against what torch is set to, and the whole chain against the model as it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import timeit
import warnings
from typing import Any

import perfkit
from bench.pages import RESULTS, device_slug, machine, recorded
from perfkit import PerfkitError, PerfkitWarning, reference
from perfkit.measure.environment import environment

INFERENCE = {
    ("cnn", 1): ("threads", "compile+threads"),
    ("cnn", 64): ("threads", "compile+threads"),
    ("cnn", 512): ("threads",),
    ("lstm", 1): ("threads", "fused_kernels+threads"),
    ("lstm", 64): ("threads", "fused_kernels+threads", "half+fused_kernels+threads"),
    ("text_lstm", 64): ("threads",),
}
TRAINING = {("cnn", 64): ("threads",), ("lstm", 64): ("threads", "fused_kernels+threads")}
"""Chains, by model and batch size."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="measure nothing, only write the page")
    if not parser.parse_args().page:
        record()
    from bench import compression

    compression.write(compression.PAGES / "threads.md")


def record() -> None:
    warnings.simplefilter("ignore", PerfkitWarning)  # slower is a result here
    rows = []
    for mode, cases in (("inference", INFERENCE), ("training", TRAINING)):
        for (model, batch_size), chains in cases.items():
            for chain in chains:
                rows.append(row(model, batch_size, mode, chain))
                print(rows[-1], flush=True)
    path = RESULTS / f"threads-{device_slug()}.json"
    found = {"environment": dataclasses.asdict(environment()), "rows": rows, "setting_us": setting_us()}
    path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    print(f"wrote {path}")


def row(model: str, batch_size: int, mode: str, chain: str) -> dict[str, Any]:
    """One chain on one model: the numbers that were tried, and the result against the model as it was."""
    about = {"model": model, "batch_size": batch_size, "mode": mode, "recipe": chain}
    given = reference.task(model, framework="torch", batch_size=batch_size)
    wanted = ("model", "example_inputs", *(("targets", "loss", "optimizer") if mode == "training" else ()))
    try:
        report = perfkit.optimize(**{name: getattr(given, name) for name in wanted}, recipe=chain, mode=mode).report
    except PerfkitError as error:
        return about | {"refused": str(error).splitlines()[0]}
    speedup = {name: getattr(report.speedup, name) for name in ("ratio", "low", "high")}
    medians = [side.latency.median_ms for side in (report.before, report.after)]
    notes = report.steps[-1].effect.notes
    return about | speedup | {"verdict": str(report.speedup.verdict), "median_ms": medians, "notes": list(notes)}


def setting_us() -> float:
    """What each call costs on top: the number set and put back, in µs."""
    import torch

    from perfkit.backends.torch_threads import Computing

    count = torch.get_num_threads() + 1

    def once() -> None:
        with Computing(count):
            pass

    return min(timeit.repeat(once, number=10_000, repeat=9)) / 10_000 * 1e6


def measured() -> list[str]:
    """What was recorded, as Markdown, machine by machine."""
    lines = []
    for path, found in recorded("threads"):
        lines += [
            "",
            f"{machine(found)}; source: `bench/results/{path.name}`. Setting the number and "
            f"putting it back takes {found['setting_us']:.1f} µs of each call.",
            "",
            "| model, batch | recipe | chosen, and what was tried | the whole chain |",
            "|---|---|---|---|",
            *map(line, found["rows"]),
            "",
        ]
    return lines


def line(row: dict[str, Any]) -> str:
    where = f"{row['model']}, {row['batch_size']}" + (", training" if row["mode"] == "training" else "")
    if "refused" in row:
        return f"| {where} | `{row['recipe']}` | refused: {row['refused']} | – |"
    ratio = f"{row['ratio']:.2f}× [{row['low']:.2f}, {row['high']:.2f}] {row['verdict']}"
    return f"| {where} | `{row['recipe']}` | {'; '.join(row['notes'])} | {ratio} |"


if __name__ == "__main__":
    main()
