"""`python -m bench.plan`: is the planner's prediction what two and four processes really take?

Every launch measures link, framework and the models' parts, predicts each layout's step from them, and times that
step itself, all in turn in every round. Kept in results/plan-<device>.json, and from there in docs/planning.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from bench.record import RESULTS, device_slug
from perfkit._recipe import names
from perfkit.measure.environment import environment
from perfkit.parallel.launching import Launch, launch, told
from perfkit.parallel.planning import MICRO_BATCHES, predict
from perfkit.parallel.planning_parts import Way

MODELS = ("cnn2", "text_lstm", "transformer")
BATCH_SIZE, POSITIONS, WIDTH, HEADS = 64, 64, 128, 4
PAGE = Path(__file__).parents[1] / "docs" / "planning.md"
BEGIN, END = "<!-- measured: written by python -m bench.plan -->", "<!-- end -->"
WITHIN = 0.25
"""By how much a prediction may be off, as a share of what was measured."""


def main() -> None:
    options = _parser().parse_args()
    if options.worker:
        work(options.models, options.rounds, options.worker)
        return
    if not options.page:
        record(options)
    if not options.quick:
        write()


def record(options: argparse.Namespace) -> None:
    found: list[dict[str, Any]] = []
    for number in range(options.repeats):
        for count in options.processes:
            found += [row | {"repeat": number} for row in launched(count, options.models, options.rounds)]
        if not options.quick:
            keep(summed_up(found), options.rounds)  # at once: a later launch may fail, or not be waited for
    for row in summed_up(found):
        print(_line(row), flush=True)


def keep(rows: list[dict[str, Any]], rounds: int) -> None:
    """Write the rows to this machine's file, in the place of those of the same models and processes."""
    path = RESULTS / f"plan-{device_slug()}.json"
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    new = {(row["model"], row["processes"]) for row in rows}
    recorded = {
        "environment": dataclasses.asdict(environment()),
        "date": datetime.now(UTC).date().isoformat(),
        "rounds": rounds,
        "rows": [row for row in kept if (row["model"], row["processes"]) not in new] + rows,
    }
    path.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")
    print(f"wrote {path}", flush=True)


def launched(processes: int, models: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """What one launch of so many processes predicts and measures."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        command = ["-m", "bench.plan", "--worker", str(file), "--rounds", str(rounds), "--models", *models]
        if ended := launch(command, Launch(processes=processes, framework="torch")):
            sys.exit(told(ended))
        return json.loads(file.read_text())


def summed_up(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each model, number of processes and layout: medians over the launches."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in found:
        groups.setdefault((row["model"], row["processes"], row["layout"]), []).append(row)
    rows = []
    for (model, processes, layout), some in groups.items():
        sides = {side: [row[f"{side}_ms"] for row in some] for side in ("predicted", "measured")}
        each = [row["predicted_ms"] / row["measured_ms"] for row in some]
        middle = {f"{side}_ms": median(values) for side, values in sides.items()}
        rows.append(
            {"model": model, "processes": processes, "layout": layout, "recipe": some[0]["recipe"], **middle}
            | {"ratio": median(each), "lowest": min(each), "highest": max(each), "launches": len(some)}
            | {"parts_ms": {part: median(row["parts_ms"][part] for row in some) for part in some[0]["parts_ms"]}}
        )
    return rows


def work(models: Sequence[str], rounds: int, file: Path) -> None:
    """One process of a launch."""
    import torch.distributed as dist

    from perfkit.parallel import torch_link, torch_world

    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)  # of a model that makes no such view
    torch_world.join()
    processes = dist.get_world_size()
    rows = []
    for model in models:
        ways = layouts(processes)
        recipes = [way.recipe for way in ways]
        bound = workload(model)
        progress = _told(f"{model}, {processes} processes") if dist.get_rank() == 0 else str
        costs, cluster, measured = torch_link.calibrated(bound, 0, rounds, recipes, progress)
        for way in ways:
            expected = predict(costs, way, cluster)
            parts = {
                name: getattr(expected, f"{name}_s") * 1e3 for name in ("computing", "sending", "waiting", "overhead")
            }
            rows.append(
                {"model": model, "processes": processes, "layout": str(way), "recipe": way.recipe}
                | {"predicted_ms": expected.step_s * 1e3, "measured_ms": measured[way.recipe] * 1e3, "parts_ms": parts}
            )
    if dist.get_rank() == 0:
        file.write_text(json.dumps(rows))


def layouts(processes: int) -> list[Way]:
    """What is predicted and measured."""
    found = [Way(data=processes), Way(data=processes, shard=True), Way(tensor=processes)]
    if "pipeline_parallel" in names():
        found.append(Way(pipeline=processes, micro_batches=processes * MICRO_BATCHES))
    return found


def workload(name: str) -> Any:
    """A model with all that its training step needs."""
    import torch

    from perfkit import reference
    from perfkit.backends import backend

    if name == "transformer":
        torch.manual_seed(0)
        layer = torch.nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True)
        model: Any = torch.nn.Sequential(layer, torch.nn.Flatten(), torch.nn.Linear(POSITIONS * WIDTH, 10))
        inputs: Any = (torch.randn(BATCH_SIZE, POSITIONS, WIDTH),)
        targets: Any = torch.randint(0, 10, (BATCH_SIZE,))
        loss: Any = torch.nn.functional.cross_entropy
    else:
        task = reference.task(name, batch_size=BATCH_SIZE)
        model, inputs, targets, loss = task.model, task.example_inputs, task.targets, task.loss
    adam = functools.partial(torch.optim.Adam, lr=1e-3)
    return backend("torch").bind(
        model, None, inputs, mode="training", loss=loss, targets=targets, optimizer=adam, seed=0
    )


def write() -> None:
    """Put what was recorded between the marks of the page."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(before + "\n".join([BEGIN, *measured(), END]) + after)


def measured() -> list[str]:
    lines = []
    for path in sorted(RESULTS.glob("plan-*.json")):
        recorded = json.loads(path.read_text())
        machine, rows = recorded["environment"], recorded["rows"]
        off = [abs(row["ratio"] - 1) for row in rows]
        lines += [
            "",
            f"{machine['cpu']}, {machine['cores']} cores, {recorded['date']}; source: `bench/results/{path.name}`. "
            f"{sum(value <= WITHIN for value in off)} of {len(rows)} predictions are within {WITHIN:.0%}.",
            "",
            "| model | processes | layout | predicted | measured | predicted / measured, lowest to highest |",
            "|---|---|---|---|---|---|",
            *map(_line, rows),
            "",
        ]
    return lines or ["", "Not measured yet.", ""]


def _line(row: dict[str, Any]) -> str:
    cells = (
        row["model"], str(row["processes"]), row["layout"], f"{row['predicted_ms']:.1f} ms",
        f"{row['measured_ms']:.1f} ms", f"{row['ratio']:.2f}, {row['lowest']:.2f} to {row['highest']:.2f}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _told(what: str) -> Callable[[str], Any]:
    return lambda message: print(f"{what}: {message}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="rows of others are kept")
    parser.add_argument("--processes", nargs="+", type=int, default=(2, 4))
    parser.add_argument("--rounds", type=int, default=9, help="of each launch")
    parser.add_argument("--repeats", type=int, default=3, help="launches: processes differ from start to start")
    parser.add_argument("--page", action="store_true", help="measure nothing, only write the page")
    parser.add_argument("--quick", action="store_true", help="keep nothing: see it work")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
