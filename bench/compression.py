"""`python -m bench.compression`: what quantization and pruning do to the trained reference models on this machine.

Kept in results/compression-<device>.json, and from there in the pages under docs/recipes. Speed is the ratio against
the trained model as it was, eager, interleaved in one run; the metric is of the held-out set.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import warnings
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import perfkit
from bench import keep_memory, kernels, memory, threads
from bench.pages import DOCS, NOTHING, RESULTS, device_slug, machine, put, recorded
from perfkit import PerfkitError, PerfkitWarning, backends, reference
from perfkit._chain import chain_of
from perfkit._variant import compared, ready
from perfkit.measure.environment import environment
from perfkit.reporting._format import format_bytes, format_count

PAGES = DOCS / "recipes"
MARKS = "<!-- measured: written by python -m bench.compression -->", "<!-- end -->"
FINE_TUNING_STEPS = {"cnn": 200, "cnn2": 200, "lstm": 600, "text_lstm": 60}
BUDGET_S = 6.0

AT_ONCE = {
    ("cnn", 512): (
        "compile",
        "int8",
        "int8+compile",
        "int8+fused_kernels",
        "int8+fused_kernels+compile",
        "int8_dynamic+compile",
        "int8_weight_only",
        "low_rank",
    ),
    ("cnn", 1): ("int8+compile", "int8+fused_kernels", "int8_weight_only", "int4_weight_only"),
    ("text_lstm", 64): ("bf16", "int8", "int8_dynamic", "int8_weight_only", "int4_weight_only", "low_rank"),
}
"""Recipes for inference, by model and batch size."""

FINE_TUNED = {
    ("cnn2", 64): ("prune", "prune(structure='unstructured')"),
    ("lstm", 64): ("prune",),
    ("text_lstm", 64): ("prune",),
}
"""Recipes for training, whose result is trained for some more steps and then timed in inference."""

ROUNDED = {("cnn", 64): (2, 3, 4)}
"""Bits of weights that are rounded at once, and again after quantization-aware training."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", action="store_true", help="measure nothing, only write the pages")
    there = [name for name in ("torch", "jax") if find_spec(name)]
    parser.add_argument("--frameworks", nargs="+", choices=there, default=there, help="rows of others are kept")
    options = parser.parse_args()
    if not options.pages:
        record(options.frameworks)
    for page in sorted(PAGES.glob("*.md")):
        write(page)


def record(frameworks: list[str]) -> None:
    warnings.simplefilter("ignore", PerfkitWarning)  # slower is a result here
    path = RESULTS / f"compression-{device_slug()}.json"
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [row for row in kept if row["framework"] not in frameworks]
    for framework in frameworks:
        for (name, batch_size), recipes in AT_ONCE.items():
            rows += [told(at_once(framework, name, batch_size, recipe)) for recipe in recipes]
        for (name, batch_size), recipes in FINE_TUNED.items():
            rows += [told(fine_tuned(framework, name, batch_size, recipe)) for recipe in recipes]
        for (name, batch_size), widths in ROUNDED.items():
            for bits in widths:
                rows += [told(row) for row in rounded(framework, name, batch_size, bits)]
    found = {"environment": dataclasses.asdict(environment()), "rows": rows}
    path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    print(f"wrote {path}")


def told(row: dict[str, Any]) -> dict[str, Any]:
    print(row, flush=True)
    return row


@cache
def trained(framework: str, name: str) -> Any:
    """The reference model, trained; in JAX with the weights that torch found, where torch is there."""
    if framework == "jax" and find_spec("torch"):
        return reference.to_jax(name, trained("torch", name))
    return reference.train(name, framework=framework).model


def at_once(framework: str, name: str, batch_size: int, recipe: str, model: Any = None) -> dict[str, Any]:
    """A recipe on a trained model."""
    model = trained(framework, name) if model is None else model
    row = about(framework, name, batch_size, recipe)
    try:
        result = perfkit.optimize(
            model,
            recipe,
            example_inputs=reference.load(name, framework=framework, batch_size=batch_size).example_inputs,
            calibration=reference.calibration(name, framework=framework),
            tolerance=10.0,  # the metric is what is told here
            budget_s=BUDGET_S,
        )
    except PerfkitError as error:
        return row | {"refused": str(error).splitlines()[0]}
    report = result.report
    simulated = any(step.effect.simulated for step in report.steps)
    return row | sides(framework, name, model, result.model) | speed(report.speedup) | {"simulated": simulated}


def fine_tuned(framework: str, name: str, batch_size: int, recipe: str) -> dict[str, Any]:
    """A recipe that trains, some more steps of training, and the result against the trained original."""
    original, model = trained(framework, name), retrained(framework, name, recipe)
    row = about(framework, name, batch_size, recipe) | {"fine_tuning_steps": FINE_TUNING_STEPS[name]}
    inputs = reference.load(name, framework=framework, batch_size=batch_size).example_inputs
    variants = [ready(bound(side, inputs), recipe) for side in (original, model)]
    return row | sides(framework, name, original, model) | speed(compared(*variants, ("original", recipe), BUDGET_S)[2])


def rounded(framework: str, name: str, batch_size: int, bits: int) -> list[dict[str, Any]]:
    """Weights of few bits: rounded at once, and rounded after training with the rounding."""
    recipe = f"int8(weight_bits={bits})"
    plain = at_once(framework, name, batch_size, recipe)
    learned = at_once(framework, name, batch_size, recipe, retrained(framework, name, f"qat(weight_bits={bits})"))
    for field in ("ratio", "low", "high", "verdict"):
        learned.pop(field, None)  # against the model that only simulates the rounding, which nobody would run
    learned |= {"recipe": f"qat(weight_bits={bits}), then {recipe}", "before": plain.get("before")}
    return [plain, learned | {"bytes": plain.get("bytes"), "parameters": plain.get("parameters")}]


def retrained(framework: str, name: str, recipe: str) -> Any:
    """The trained model under a recipe for training, trained for some more steps, in inference mode."""
    task = reference.task(name, framework=framework)
    arguments = {field: getattr(task, field) for field in ("example_inputs", "targets", "loss", "optimizer")}
    model = trained(framework, name)
    model.train()
    result = perfkit.optimize(model, recipe, mode="training", **arguments, tolerance=10.0, budget_s=1.0)
    for batch in reference.batches(name, framework=framework, steps=FINE_TUNING_STEPS[name], seed=1):
        result.train_step(batch)
    for side in (model, result.model):
        side.eval()
    return result.model


def bound(model: Any, inputs: Any) -> Any:
    nothing = dict.fromkeys(("loss", "targets", "optimizer"))
    return backends.of(model).bind(model, None, inputs, mode="inference", seed=0, **nothing)


def about(framework: str, name: str, batch_size: int, recipe: str) -> dict[str, Any]:
    return {"framework": framework, "model": name, "batch_size": batch_size, "recipe": recipe}


def speed(comparison: perfkit.Comparison) -> dict[str, Any]:
    fields = ("ratio", "low", "high")
    return {field: getattr(comparison, field) for field in fields} | {"verdict": str(comparison.verdict)}


def sides(framework: str, name: str, original: Any, model: Any) -> dict[str, Any]:
    """Held-out metric, parameters, bytes in memory and in a file, before and after."""
    scores = [reference.evaluate(name, side, framework=framework) for side in (original, model)]
    works = [bound(side, None) for side in (original, model)]
    (bytes_before, parameters_before), (bytes_after, parameters_after) = [work.backend.size(work) for work in works]
    return {
        "metric": scores[0].metric,
        "before": scores[0].value,
        "after": scores[1].value,
        "bytes": [bytes_before, bytes_after],
        "parameters": [parameters_before, parameters_after],
        "file_bytes": [file_bytes(original), file_bytes(model)] if framework == "torch" else None,
    }


def file_bytes(model: Any) -> int:
    import torch

    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell()


def write(page: Path) -> None:
    """Put what was recorded about a recipe between the marks of its page, if it has them; others are `plan_pages`'."""
    if MARKS[0] in page.read_text():
        put(page, MARKS, measured(page.stem))


def measured(recipe: str) -> list[str]:
    own = {"threads": threads.measured, "keep_memory": keep_memory.measured, "skip_padding": kernels.measured}
    lines = memory.measured(recipe) + own.get(recipe, list)()
    for path, found in recorded("compression"):
        rows = [row for row in found["rows"] if recipe in names_in(row["recipe"])]
        if not rows:
            continue
        instructions = ", ".join(found["environment"]["instruction_sets"])
        lines += [
            "",
            f"{machine(found)} ({instructions}); source: `bench/results/{path.name}`.",
            "",
            "| model, batch | framework | recipe | speed | metric before → after | weights before → after |",
            "|---|---|---|---|---|---|",
            *map(line, rows),
            "",
        ]
    return lines or NOTHING


def names_in(written: str) -> set[str]:
    return {recipe.name for part in written.split(", then ") for recipe in chain_of(part)}


def line(row: dict[str, Any]) -> str:
    where = f"{row['model']}, {row['batch_size']}"
    if "refused" in row:
        cells = (where, row["framework"], f"`{row['recipe']}`", f"refused: {row['refused']}", "–", "–")
        return f"| {' | '.join(cells)} |"
    ratio = "–"
    if "ratio" in row:
        ratio = f"{row['ratio']:.2f}× [{row['low']:.2f}, {row['high']:.2f}] {row['verdict']}"
        ratio += ", simulated" if row.get("simulated") else ""
    weights = " → ".join(map(format_bytes, row["bytes"]))
    if row["parameters"][0] != row["parameters"][1] and "prune" in row["recipe"]:
        weights = " → ".join(map(format_count, row["parameters"])) + " parameters"
    metric = f"{row['metric']} {row['before']:.4g} → {row['after']:.4g}"
    cells = (where, row["framework"], f"`{row['recipe']}`", ratio, metric, weights)
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
