"""`python -m bench.fresh_memory`: calls on CPU whose temporary memory is kept, against calls that take it anew.

For each case two processes live side by side, with and without the settings of `perfkit.measure.kept_memory`, which the
C library reads when a process starts. They make calls in turn, there and back, while the other one waits. Kept in
results/fresh-memory-<device>.json, and from there in docs/memory.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from bench.pages import DOCS, NOTHING, RESULTS, device_slug, machine, put, recorded
from perfkit.measure.environment import environment
from perfkit.measure.kept_memory import SETTINGS
from perfkit.measure.statistics import compare
from perfkit.reporting._format import format_bytes

CASES = [
    ("jax", "training", "cnn", 128),
    ("jax", "training", "cnn", 512),
    ("jax", "training", "text_lstm", 64),
    ("torch", "inference", "cnn", 512),
    ("torch", "training", "cnn", 128),
    ("torch", "training", "cnn", 512),
    ("torch", "training", "text_lstm", 64),
]
"""Framework, mode, model, batch size."""

PAIRS, QUICK_PAIRS = 20, 4
BLOCK_MS = 400.0
"""So long the calls of one turn take, at least."""

PAGE = DOCS / "memory.md"
MARKS = "<!-- measured: written by python -m bench.fresh_memory -->", "<!-- end of fresh memory -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="measure nothing, only write the page")
    parser.add_argument("--quick", action="store_true", help="the first case alone, few pairs, nothing written")
    parser.add_argument("--into", type=Path, default=RESULTS, help="folder for the file of results")
    options = parser.parse_args()
    if options.quick:
        print(json.dumps(row(*CASES[0], QUICK_PAIRS), indent=1))
        return
    if not options.page:
        record(options.into)
    if options.into == RESULTS:
        put(PAGE, MARKS, measured())


def record(into: Path) -> None:
    path, rows = into / f"fresh-memory-{device_slug()}.json", []
    found = {"environment": dataclasses.asdict(environment()), "variables": SETTINGS, "rows": rows}
    for case in CASES:
        rows.append(row(*case, PAIRS))
        print(rows[-1], flush=True)
        path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")  # at once: the next one may fail
    print(f"wrote {path}")


def row(framework: str, mode: str, model: str, batch_size: int, pairs: int) -> dict[str, Any]:
    """A case in both processes: times of a call by blocks, page faults, memory; and the ratio of the times."""
    plain = {name: value for name, value in os.environ.items() if name not in SETTINGS} | {"JAX_PLATFORMS": "cpu"}
    with ExitStack() as stack:
        sides = [
            stack.enter_context(worker((framework, mode, model, batch_size), env)) for env in (plain, plain | SETTINGS)
        ]
        begun = [side.asked("begin") for side in sides]
        steps = max(1, round(BLOCK_MS / max(each["step_ms"] for each in begun)))
        blocks: tuple[list, list] = [], []
        for number in range(pairs):
            for side in (0, 1) if number % 2 == 0 else (1, 0):
                blocks[side].append(sides[side].asked("steps", steps))
        ended = [side.asked("memory") for side in sides]
    anew_ms, kept_ms = ([block["step_ms"] for block in side] for side in blocks)
    found = compare(anew_ms, kept_ms, baseline="taken anew", variant="kept")
    return {
        "framework": framework,
        "mode": mode,
        "model": model,
        "batch_size": batch_size,
        "temporary_bytes": begun[0]["temporary_bytes"],
        "ratio": {"ratio": found.ratio, "low": found.low, "high": found.high, "pairs": found.pairs},
        "verdict": str(found.verdict),
        "anew": _side(blocks[0], ended[0]),
        "kept": _side(blocks[1], ended[1]),
    }


def _side(blocks: list[dict[str, float]], ended: dict[str, int]) -> dict[str, Any]:
    times, faults = ([block[name] for block in blocks] for name in ("step_ms", "faults"))
    return {"step_ms": statistics.median(times), "faults": statistics.median(faults), "blocks_ms": times} | ended


@dataclasses.dataclass(frozen=True)
class Worker:
    """A process of `bench.fresh_memory_worker`, which answers a line of JSON to each line that it is given."""

    process: subprocess.Popen

    def asked(self, *question: Any) -> dict[str, Any]:
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        if not (answer := self.process.stdout.readline()):
            raise RuntimeError(f"the worker ended with {self.process.wait()} when it was asked for {question[0]!r}")
        return json.loads(answer)


@contextmanager
def worker(case: tuple[str, str, str, int], variables: dict[str, str]) -> Iterator[Worker]:
    """A worker that was started with these environment variables; it ends when nobody asks any more."""
    command = [sys.executable, "-m", "bench.fresh_memory_worker", *map(str, case)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=variables, **pipes) as process:
        yield Worker(process)


def measured() -> list[str]:
    """What was recorded, as it stands in the page."""
    lines = []
    for path, found in recorded("fresh-memory"):
        lines += [
            "",
            f"{machine(found)}, the reference models; source: `bench/results/{path.name}`.",
            "",
            "| model, batch | call | anew in each | anew | kept | ratio | page faults in it | peak resident |",
            "|---|---|---|---|---|---|---|---|",
            *map(_line, found["rows"]),
        ]
    return [*lines, ""] if lines else NOTHING


def _line(row: dict[str, Any]) -> str:
    anew, kept, ratio = row["anew"], row["kept"], row["ratio"]
    cells = (
        f"{row['model']}, {row['batch_size']}", f"{row['framework']}, {row['mode']}",
        format_bytes(row["temporary_bytes"]),
        f"{anew['step_ms']:.1f} ms", f"{kept['step_ms']:.1f} ms",
        f"{ratio['ratio']:.2f}× [{ratio['low']:.2f}, {ratio['high']:.2f}] {row['verdict']}",
        f"{anew['faults']:.0f} → {kept['faults']:.0f}",
        f"{format_bytes(anew['peak_bytes'])} → {format_bytes(kept['peak_bytes'])}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
