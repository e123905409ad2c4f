"""`python -m bench.caches`: what emptying an allocator's cache gives back, and what the next training step pays for it.

Every row is of a process of its own (`caches_worker.py`), since the C library reads its settings when it starts;
processes that are compared take turns. Kept in results/caches-<device>.json, and from there in docs/memory.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench import caches_page
from bench.pages import RESULTS, device_slug
from perfkit.measure.environment import environment

BATCH_SIZE, STEPS, ROUNDS = 64, 12, 3

SETTINGS = {
    "as glibc starts": {},
    "mapped above 64 KiB": {"MALLOC_MMAP_THRESHOLD_": str(2**16)},
    "never mapped, never given back": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)},
}
"""Environment variables of the C library, by what they are called in the page."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="measure nothing, only write the page")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps that are timed in each process")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="processes for each setting of the C library")
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE, help="rows of a training step")
    parser.add_argument("--into", type=Path, default=RESULTS, help="folder for the file of results")
    options = parser.parse_args()
    if not options.page:
        record(options)
    if options.into == RESULTS:
        caches_page.write()


def record(options: argparse.Namespace) -> None:
    path, rows = options.into / f"caches-{device_slug()}.json", []
    found = {"environment": dataclasses.asdict(environment()), "batch_size": options.batch_size, "rows": rows}
    for case, framework in _cases():
        measured = _by_settings(framework, options) if case == "settings" else [_run(case, framework, options)]
        rows += [{"case": case, "framework": framework} | row for row in measured]
        print(rows[-1], flush=True)
        path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")  # at once: the next one may fail
    print(f"wrote {path}")


def _cases() -> list[tuple[str, str]]:
    """What can be measured here, and in which framework."""
    there = [name for name in ("torch", "jax") if find_spec(name)]
    cases = [("settings", framework) for framework in there]
    if "torch" in there:
        cases += [("trim", "torch"), ("small blocks", "torch")]
        cases += [("empty_cache", "torch")] if _has_cuda() else []
    return [*cases, ("clear_caches", "jax")] if "jax" in there else cases


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _by_settings(framework: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A training step under each setting; the processes take turns, there and back."""
    found: dict[str, list[dict]] = {name: [] for name in SETTINGS}
    for number in range(options.rounds):
        for name in list(SETTINGS)[:: 1 if number % 2 == 0 else -1]:
            found[name].append(_run("steps", framework, options, SETTINGS[name]))
    return [
        {
            "setting": name,
            "variables": SETTINGS[name],
            "step_ms": statistics.median(run["step_ms"] for run in runs),
            "step_ms_of_processes": [run["step_ms"] for run in runs],
            "faults": statistics.median(run["faults"] for run in runs),
            "resident_bytes": statistics.median(run["resident_bytes"] for run in runs),
        }
        for name, runs in found.items()
    ]


def _run(
    case: str, framework: str, options: argparse.Namespace, variables: dict[str, str] | None = None
) -> dict[str, Any]:
    about = ["--framework", framework, "--steps", str(options.steps), "--batch-size", str(options.batch_size)]
    command = [sys.executable, "-m", "bench.caches_worker", case, *about]
    done = subprocess.run(command, env=os.environ | (variables or {}), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
