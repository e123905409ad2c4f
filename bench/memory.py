"""`python -m bench.memory`: what the recipes for memory save on this machine, and what that costs in time.

Kept in results/memory-<device>.json, and from there in the pages under docs/recipes. Memory is the tensor peak of one
training step above parameters and optimizer state, as the report has it; in JAX on CPU it is XLA's count. The optimizer
is plain SGD where activations are what is cut, so that its own temporaries do not stand in the way.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import perfkit
from bench.memory_models import deep_cnn
from bench.pages import RESULTS, device_slug, machine, recorded
from perfkit import PerfkitError, PerfkitWarning, reference
from perfkit._chain import chain_of
from perfkit.measure.environment import environment
from perfkit.reporting._format import format_bytes

BUDGET_S = 8.0
BATCH_SIZE = 64
ACTIVATIONS = ("checkpoint", "checkpoint(budget=0.5)", "accumulate(8)", "checkpoint+accumulate(8)")
STATES = ("low_bit_optimizer", "low_bit_optimizer(4)", "donate", "offload")
CASES = {"deep_cnn": ACTIVATIONS, "text_lstm": ACTIVATIONS, "cnn2": STATES}
"""Recipes for training, by model."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    there = [name for name in ("torch", "jax") if find_spec(name)]
    parser.add_argument("--frameworks", nargs="+", choices=there, default=there, help="rows of others are kept")
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES), help="rows of others are kept")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds to time each recipe")
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE, help="rows of a training step")
    parser.add_argument("--into", type=Path, default=RESULTS, help="folder for the file of results, to try it out")
    parser.add_argument("--pages", action="store_true", help="measure nothing, only write the pages")
    options = parser.parse_args()
    if not options.pages:
        record(options)
    if options.into != RESULTS:
        return
    from bench import compression

    for page in sorted(compression.PAGES.glob("*.md")):
        compression.write(page)


def record(options: argparse.Namespace) -> None:
    warnings.simplefilter("ignore", PerfkitWarning)  # saving nothing is a result here
    path = options.into / f"memory-{device_slug()}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    for framework, model in itertools.product(options.frameworks, options.models):
        for recipe in CASES[model]:
            about = (framework, model, recipe)
            rows = [row for row in rows if (row["framework"], row["model"], row["recipe"]) != about]
            rows.append(measured_row(*about, options.batch_size, options.budget))
            print(rows[-1], flush=True)
            found = {"environment": dataclasses.asdict(environment()), "rows": rows}
            path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")  # at once: the next one may fail
    print(f"wrote {path}")


def measured_row(framework: str, model: str, recipe: str, batch_size: int, budget_s: float) -> dict[str, Any]:
    """One recipe on one model: peaks, optimizer state, time, and how far the loss curves are apart."""
    row = {"framework": framework, "model": model, "batch_size": batch_size, "recipe": recipe}
    given = deep_cnn(framework, batch_size) if model == "deep_cnn" else _reference(framework, model, recipe, batch_size)
    try:
        report = perfkit.optimize(
            **given, recipe=recipe, mode="training", budget_s=budget_s, tolerance=_tolerance(model, recipe)
        ).report
    except PerfkitError as error:
        return row | {"refused": str(error).splitlines()[0]}
    peaks, states = _sides(report, "tensor_peak_bytes"), _sides(report, "optimizer_state_bytes")
    speedup = report.speedup
    return row | {
        "peak_bytes": peaks,
        "optimizer_state_bytes": states,
        "memory_ratio": None if None in peaks else peaks[0] / peaks[1],
        "time_ratio": 1 / speedup.ratio,
        "time_low": 1 / speedup.high,
        "time_high": 1 / speedup.low,
        "verdict": str(speedup.verdict),
        "loss_distance": report.fidelity.relative_error,
        "first_losses": [report.losses.before[0], report.losses.after[0]],
        "notes": [note for step in report.steps for note in step.effect.notes],
        "method": report.before.tensor_peak_bytes.method or report.before.tensor_peak_bytes.unavailable,
    }


def _reference(framework: str, model: str, recipe: str, batch_size: int) -> dict[str, Any]:
    task = reference.task(model, framework=framework, batch_size=batch_size)
    given = {name: getattr(task, name) for name in ("model", "example_inputs", "targets", "loss", "optimizer")}
    return given | ({} if keeps_adam(recipe) else {"optimizer": _sgd(framework)})


def keeps_adam(recipe: str) -> bool:
    """Whether a chain is about the optimizer's state, of which plain SGD has none."""
    return any(part.name in ("low_bit_optimizer", "offload", "donate") for part in chain_of(recipe))


def _sgd(framework: str) -> Any:
    if framework == "torch":
        import torch

        return functools.partial(torch.optim.SGD, lr=0.02)
    import optax

    return optax.sgd(0.02)


def _tolerance(model: str, recipe: str) -> float | None:
    """Batch norm takes the statistics of each micro-batch: how far that leads is told, and no reason to refuse."""
    return 10.0 if model == "deep_cnn" and "accumulate" in recipe else None


def _sides(report: perfkit.Report, field: str) -> list[float | None]:
    return [getattr(side, field).value for side in (report.before, report.after)]


def measured(recipe: str) -> list[str]:
    """What was recorded about a recipe, as Markdown, machine by machine."""
    lines = []
    for path, found in recorded("memory"):
        rows = [row for row in found["rows"] if recipe in {part.name for part in chain_of(row["recipe"])}]
        if not rows:
            continue
        lines += [
            "",
            f"{machine(found)}; source: `bench/results/{path.name}`.",
            "",
            "| model, batch | framework | recipe | tensor peak of a step | optimizer state | time | losses apart |",
            "|---|---|---|---|---|---|---|",
            *map(line, rows),
            "",
        ]
    return lines


def line(row: dict[str, Any]) -> str:
    where = f"{row['model']}, {row['batch_size']}"
    if "refused" in row:
        return f"| {where} | {row['framework']} | `{row['recipe']}` | refused: {row['refused']} | – | – | – |"
    ratio = "" if row["memory_ratio"] is None else f"{row['memory_ratio']:.2f}× less: "
    peaks = ratio + " → ".join("unavailable" if size is None else format_bytes(size) for size in row["peak_bytes"])
    states = " → ".join(format_bytes(size or 0) for size in row["optimizer_state_bytes"])
    time = f"{row['time_ratio']:.2f}× [{row['time_low']:.2f}, {row['time_high']:.2f}]"
    cells = (where, row["framework"], f"`{row['recipe']}`", peaks, states, time, f"{row['loss_distance']:.2g}")
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
