"""What `bench.plan` recorded, as it stands in docs/planning.md and in the pages of the recipes for several devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from bench.pages import DOCS, NOTHING, machine, put, recorded
from perfkit._chain import chain_of
from perfkit.reporting._format import format_bytes

PLANNING = DOCS / "planning.md"
SPREAD = {name: DOCS / "recipes" / f"{name}.md" for name in
          ("data_parallel", "tensor_parallel", "pipeline_parallel", "local_sgd")}  # fmt: skip
"""Pages of recipes, by name."""

PREDICTIONS = "<!-- measured: written by python -m bench.plan -->", "<!-- end -->"
SCALING = "<!-- scaling: written by python -m bench.plan -->", "<!-- scaling ends -->"
WITHIN = 0.25
"""By how much a prediction may be off, as a share of what was measured."""

REMARK = """One process with the whole batch against all of them, in turn in the same rounds: batches of 64 rows, Adam.
All run on the cores of one machine. Processes of torch have a thread each: as many as there are cores can be so many
times as quick, and more of them no quicker than that. Devices of JAX are parts of one process, and one of them alone
takes all cores. What is sent goes through the same cores. Machines with a device for each process scale otherwise:
[planning](../planning.md) predicts how. Efficiency is the ratio divided by the number of processes; a ratio below 1 is
a slow-down."""


def write() -> None:
    """Put what was recorded between the marks of the pages."""
    put(PLANNING, PREDICTIONS, predictions())
    for recipe, page in SPREAD.items():
        put(page, SCALING, scaling(recipe))


def predictions() -> list[str]:
    """Every layout's predicted and measured step, as Markdown, machine by machine."""
    lines: list[str] = []
    for source, rows in _recorded(lambda row: "predicted_ms" in row):
        off = [abs(row["ratio"] - 1) for row in rows]
        lines += [
            "",
            f"{source} {sum(value <= WITHIN for value in off)} of {len(rows)} predictions are within {WITHIN:.0%}.",
            "",
            "| model | framework | processes | layout | predicted | measured | predicted / measured, of all launches |",
            "|---|---|---|---|---|---|---|",
            *map(predicted_line, rows),
            "",
        ]
    return lines or NOTHING


def predicted_line(row: dict[str, Any]) -> str:
    cells = (
        row["model"], row["framework"], str(row["processes"]), row["layout"], f"{row['predicted_ms']:.1f} ms",
        f"{row['measured_ms']:.1f} ms", f"{row['ratio']:.2f}, {row['lowest']:.2f} to {row['highest']:.2f}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def scaling(recipe: str) -> list[str]:
    """What so many processes gave under a recipe, as Markdown, machine by machine."""
    lines: list[str] = []
    for source, rows in _recorded(
        lambda row: "scaling" in row and recipe in {one.name for one in chain_of(row["recipe"])}
    ):
        lines += [
            "",
            source,
            "",
            "| model | framework | recipe | step of one → of all | ratio [99 %] | efficiency "
            "| against one on all cores | sent a step | communicating | model and peak of a step, a process |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *map(scaling_line, rows),
            "",
        ]
    return ["", *REMARK.splitlines(), *lines] if lines else NOTHING


def scaling_line(row: dict[str, Any]) -> str:
    found, about = row["scaling"], row.get("parallel", {})
    cells = (
        row["model"], row["framework"], f"`{row['recipe']}`", f"{found['one_ms']:.1f} → {row['measured_ms']:.1f} ms",
        _ratio(found["one"]), f"{found['one']['ratio'] / row['processes']:.0%}",
        _ratio(found["all_cores"]) if found["all_cores"] else "–", _known(about.get("sent_bytes"), format_bytes),
        _known(about.get("communicating"), "{:.0%}".format),
        f"{_known(about.get('held_bytes'), format_bytes)}, {_known(about.get('peak_bytes'), format_bytes)}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _ratio(found: dict[str, float]) -> str:
    return f"{found['ratio']:.2f}× [{found['low']:.2f}, {found['high']:.2f}]"


def _known(value: Any, told: Callable[[Any], str]) -> str:
    return "unavailable" if value is None else told(value)


def _recorded(wanted: Callable[[dict[str, Any]], bool]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Machines with such rows: where they come from, in a sentence, and the rows."""
    for path, found in recorded("plan"):
        if rows := [row for row in found["rows"] if wanted(row)]:
            yield f"{machine(found)}, {found['date']}; source: `bench/results/{path.name}`.", rows
