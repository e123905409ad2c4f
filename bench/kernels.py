"""`python -m bench.kernels`: what the kernels do for the reference models on this machine's CPU, and what others do.

Kept in results/kernels-<device>.json. Speed is the ratio against the model as it was, eager float32, interleaved in one
run; for JAX also against `jax.jit` of it. The peers (`bench/peers.py`) are timed against the same eager model, each
in a process of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime as dt
import json
import warnings
from importlib.util import find_spec
from typing import Any

import perfkit
from bench.pages import RESULTS, device_slug, machine, recorded
from perfkit import PerfkitError, PerfkitWarning, reference
from perfkit.measure.environment import environment

BUDGET_S = 6.0
QUICK_S = 0.2

RECURRENT = ("fused_kernels", "bf16+fused_kernels", "half+fused_kernels")
CONVOLUTION = ("compile", "fused_kernels", "fused_kernels+compile", "half+fused_kernels", "bf16+fused_kernels+compile")
BYTES = "int8+fused_kernels"
"""In PyTorch too, calibrated on the example inputs alone: for its speed."""
SHORT = ("bf16+fused_kernels+skip_padding", "half+fused_kernels+skip_padding", "int8+skip_padding")
"""In PyTorch too, for models that read padded texts; in JAX the kernels do so themselves."""
INFERENCE = {
    ("lstm", 64): RECURRENT,
    ("lstm", 1): RECURRENT,
    ("text_lstm", 256): RECURRENT,
    ("text_lstm", 64): RECURRENT,
    ("text_lstm", 1): RECURRENT,
    ("cnn", 512): CONVOLUTION,
    ("cnn", 64): CONVOLUTION,
    ("cnn", 1): CONVOLUTION,
}
UPDATES = "half+fused_kernels+fused_optimizer"
SHORT_UPDATES = "half+fused_kernels+skip_padding+fused_optimizer"
TRAINING = {
    "text_lstm": (*RECURRENT, UPDATES, SHORT_UPDATES),
    "lstm": (*RECURRENT, UPDATES),
    "cnn": (*CONVOLUTION, UPDATES),
}
"""Recipes by model, and batch size; training steps are of the reference task's own. In JAX all are compiled, and so are
the optimizer's updates.
"""


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    warnings.simplefilter("ignore", PerfkitWarning)  # slower is a result here
    if options.quick:
        for framework in options.frameworks:
            inference(framework, "lstm", 1, RECURRENT[:1], QUICK_S)
        return
    path = RESULTS / f"kernels-{device_slug()}.json"
    kept = json.loads(path.read_text())["rows"] if path.exists() else []

    def asked(framework: str, model: str) -> bool:
        return framework in options.frameworks and model in (options.models or [model])

    rows = [row for row in kept if not asked(row["framework"], row["model"])]
    for framework in options.frameworks:
        for (model, batch_size), recipes in INFERENCE.items():
            if asked(framework, model):
                padded = model.startswith("text") and batch_size > 1
                more = (BYTES, *(SHORT if padded else ())) if framework == "torch" else ()
                rows += inference(framework, model, batch_size, (*recipes, *more))
        for model, recipes in TRAINING.items():
            if asked(framework, model):
                rows += training(framework, model, recipes)
    recorded = {"environment": dataclasses.asdict(environment()), "date": dt.date.today().isoformat(), "rows": rows}
    path.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")
    print(f"wrote {path}")
    from bench import compression

    compression.write(compression.PAGES / "skip_padding.md")


def inference(
    framework: str, model: str, batch_size: int, recipes: tuple[str, ...], budget_s: float = BUDGET_S
) -> list[dict[str, Any]]:
    loaded = reference.load(model, framework=framework, batch_size=batch_size)
    about = {"framework": framework, "model": model, "batch_size": batch_size, "mode": "inference"}
    arguments = {"model": loaded.model, "example_inputs": loaded.example_inputs, "budget_s": budget_s}
    rows = [about | optimized(_as_used(framework, recipe), **arguments) for recipe in recipes]
    if framework == "torch":
        rows += [about | row for row in peers(model, batch_size, budget_s)]
    return rows


def training(framework: str, model: str, recipes: tuple[str, ...]) -> list[dict[str, Any]]:
    task = reference.task(model, framework=framework)
    names = ("model", "example_inputs", "targets", "loss", "optimizer")
    arguments = {name: getattr(task, name) for name in names} | {"budget_s": BUDGET_S}
    about = {"framework": framework, "model": model, "batch_size": 64, "mode": "training"}
    return [about | optimized(_as_used(framework, recipe), **arguments, mode="training") for recipe in recipes]


def _as_used(framework: str, recipe: str) -> str:
    """A JAX model is run under jit, a recurrent torch model is not compiled."""
    return recipe if framework == "torch" or "compile" in recipe else f"{recipe}+compile"


def optimized(recipe: str, **arguments: Any) -> dict[str, Any]:
    """A recipe's row: its ratio and error, or why it does not apply."""
    try:
        report = perfkit.optimize(recipe=recipe, **arguments).report
    except PerfkitError as error:
        return told({"recipe": recipe, "refused": str(error).splitlines()[0]})
    row = {"recipe": recipe, "error": report.fidelity.relative_error} | speed(report.speedup)
    if report.against_compiled is not None:
        row["against_jit"] = speed(report.against_compiled)
    return told(row)


def peers(model: str, batch_size: int, budget_s: float) -> list[dict[str, Any]]:
    """What other runtimes do with the same model and inputs, and how far their outputs are from eager's."""
    from bench.peers import PEERS, Refused, compared

    rows = []
    for peer in PEERS:
        row: dict[str, Any] = {"peer": peer.__name__}
        try:
            comparison, error = compared(model, batch_size, peer, budget_s)
            row |= {"error": error} | speed(comparison)
        except Refused as refused:
            row["refused"] = str(refused)
        rows.append(told(row))
    return rows


def speed(comparison: perfkit.Comparison) -> dict[str, Any]:
    fields = ("ratio", "low", "high")
    return {field: getattr(comparison, field) for field in fields} | {"verdict": str(comparison.verdict)}


def told(row: dict[str, Any]) -> dict[str, Any]:
    print(row, flush=True)
    return row


def measured() -> list[str]:
    """What was recorded of padded texts for the page on `skip_padding`, each chain beside the one without it."""
    lines = []
    for path, found in recorded("kernels"):
        rows = {
            (row["model"], row["batch_size"], row["mode"], row.get("recipe", "")): row
            for row in found["rows"]
            if "ratio" in row and row["framework"] == "torch"
        }
        pairs = [(key, rows.get((*key[:3], _without(key[3])))) for key in rows if "skip_padding" in key[3]]
        if pairs:
            lines += [
                "",
                f"{machine(found)}, PyTorch, against eager; source: `bench/results/{path.name}`.",
                "",
                "| model, batch | recipe | with it | without it |",
                "|---|---|---|---|",
                *(f"| {model}, {size}, {mode} | `{recipe}` | {_told(rows[model, size, mode, recipe])} | "
                  f"{_told(plain)} |" for (model, size, mode, recipe), plain in pairs),
                "",
            ]  # fmt: skip
    return lines


def _without(recipe: str) -> str:
    """The chain beside one with `skip_padding`; integers in recurrent layers are the same with `fused_kernels`."""
    return BYTES if recipe == SHORT[-1] else recipe.replace("+skip_padding", "")


def _told(row: dict[str, Any] | None) -> str:
    return "–" if row is None else f"{row['ratio']:.2f}× [{row['low']:.2f}, {row['high']:.2f}] {row['verdict']}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    there = [name for name in ("torch", "jax") if find_spec(name)]
    parser.add_argument("--frameworks", nargs="+", choices=there, default=there, help="rows of others are kept")
    models = sorted({model for model, _ in INFERENCE})
    parser.add_argument("--models", nargs="+", choices=models, help="only these; rows of others are kept")
    parser.add_argument("--quick", action="store_true", help="one small model, briefly: see it work, keep nothing")
    return parser


if __name__ == "__main__":
    main()
