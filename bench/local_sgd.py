"""`python -m bench.local_sgd`: what averaging models every few steps costs in learning, against plain data parallelism.

Two processes train reference models on their data, from the same weights and on the same batches. Kept in
results/local_sgd.json, and from there in docs/recipes/local_sgd.md. Losses and metrics do not depend on the machine's
speed; the times are left out for that.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import perfkit
from bench.pages import DOCS, NOTHING, RESULTS, put
from perfkit import reference
from perfkit._chain import chain_of
from perfkit._recipe import ask
from perfkit.measure.environment import environment
from perfkit.parallel.launching import Launch, launch, told

PROCESSES = 2
CASES = {"cnn2": 400, "lstm": 600}
RECIPES = (
    "data_parallel",
    "local_sgd(sync_every=8)",
    "local_sgd(sync_every=32)",
    "local_sgd(sync_every=32, warmup_steps=100)",
    "local_sgd(sync_every=32, average_state=True)",
    "local_sgd(sync_every=32, diloco=True)",
)
PAGE = DOCS / "recipes" / "local_sgd.md"
MARKS = "<!-- loss curve: written by python -m bench.local_sgd -->", "<!-- loss curve ends -->"
QUARTERS, AVERAGED = 4, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="measure nothing, only write the page")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker)
        return
    if not options.page:
        record()
    write()


def record() -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        if ended := launch(["-m", "bench.local_sgd", "--worker", str(file)], Launch(processes=PROCESSES)):
            sys.exit(told(ended))
        rows = json.loads(file.read_text())
    here = environment()
    found = {
        "device": f"{here.cpu}, {here.cores} cores",
        "date": datetime.now(UTC).date().isoformat(),
        "libraries": dict(here.libraries),
        "processes": PROCESSES,
        "rows": rows,
    }
    path = RESULTS / "local_sgd.json"
    path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    print(f"wrote {path}")


def work(file: Path) -> None:
    """One of the processes."""
    from perfkit.parallel import torch_world

    warnings.simplefilter("ignore", perfkit.PerfkitWarning)
    torch_world.join()
    rows = [trained(name, recipe, steps) for name, steps in CASES.items() for recipe in RECIPES]
    if torch_world.world().leads:
        file.write_text(json.dumps(rows))


def trained(name: str, recipe: str, steps: int) -> dict[str, Any]:
    """Losses of averaged models and the held-out metric of a training."""
    from perfkit.parallel import world
    from perfkit.parallel.batch import dealer
    from perfkit.reference._train_run import suited

    task = reference.task(name)
    about = {field: getattr(task, field) for field in ("example_inputs", "targets", "loss", "optimizer")}
    chain = suited(chain_of(recipe), name)
    result = perfkit.optimize(task.model, chain, mode="training", tolerance=10.0, budget_s=0.5, **about)
    deal = dealer(chain, "torch")
    losses = [float(result.train_step(deal(batch))) for batch in reference.batches(name, steps=steps)]
    result.settle()
    every = world.of("torch").gather(losses)
    mean = [sum(side) / len(side) for side in zip(*every, strict=True)]
    compared = next(filter(None, (ask(one, "judged_at", steps) for one in chain)), range(steps))
    averaged = [step for step in compared if step < steps - 1]  # the last one came after its average here
    model = result.model.eval()
    score = reference.evaluate(name, model)
    row = {
        "model": name,
        "recipe": recipe,
        "steps": steps,
        "bytes_a_step": result.report.parallel.sent_bytes.value,
        "losses": [at(mean, averaged, steps * (quarter + 1) // QUARTERS) for quarter in range(QUARTERS)],
        "metric": score.metric,
        "value": score.value,
    }
    if world.of("torch").leads:
        print(row, flush=True)
    return row


def at(losses: list[float], averaged: list[int], step: int) -> float:
    """The mean loss of the last few averaged models up to a step."""
    last = [losses[index] for index in averaged if index < step][-AVERAGED:]
    return sum(last) / len(last)


def write() -> None:
    """Put what was recorded between the marks of the page."""
    put(PAGE, MARKS, measured())


def measured() -> list[str]:
    path = RESULTS / "local_sgd.json"
    if not path.exists():
        return NOTHING
    recorded = json.loads(path.read_text())
    return [
        "",
        f"{recorded['device']}, {recorded['date']}; source: `bench/results/{path.name}`.",
        "",
        f"{recorded['processes']} processes, batches of 64 rows, torch {recorded['libraries']['torch']}. Losses are of",
        f"averaged models, the mean of the last {AVERAGED} up to each quarter of the steps; bytes are those given to",
        "all-reduces.",
        "",
        "| model, steps | recipe | bytes a step | loss at ¼, ½, ¾ and the end | held-out |",
        "|---|---|---|---|---|",
        *map(_line, recorded["rows"]),
        "",
    ]


def _line(row: dict[str, Any]) -> str:
    cells = (
        f"{row['model']}, {row['steps']}", f"`{row['recipe']}`", f"{row['bytes_a_step'] / 1e3:.1f} kB",
        ", ".join(f"{loss:.2g}" for loss in row["losses"]), f"{row['metric']} {row['value']:.4g}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
