"""`python -m bench.gpu`: everything that needs a GPU, in one go: check, stress, compile, tune, time, profile.

    check    every op's cases by every implementation, forward and every gradient, against float64
    compile  what is to be tuned, by several processes
    stress   programs that wait for each other on all processors, thousands of steps: the same bits as step by step
    tune     implementations and tile sizes, timed; the fastest go into kernels/tuned/<device>.json
    time     the ops as they are then dispatched, against cuDNN, torch.compile and what JAX has
    profile  cnn and text_lstm, as they are and with our kernels, with the card's own readings and energy

Kept in results/<device>-kernels.json, with what failed and what there was no time for: after each row, so that a run
that is ended has lost nothing but the row it was at, and --resume goes on there. Each row runs in a process that is
replaced when it dies or hangs. Exit code 0: all as it should be; 1: a row failed; 2: nothing here to run on.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import os
import queue
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from bench import gpu_results

RESULTS = Path(__file__).parent / "results"

SHARES = {"check": 0.15, "compile": 0.17, "stress": 0.06, "tune": 0.22, "time": 0.25, "profile": 0.15}
"""Of the budget, for each part; what one leaves over or takes too much is the later ones'."""

LEAST_S = {"check": 0.0, "compile": 0.0, "stress": 5.0, "tune": 3.0, "time": 2.5, "profile": 4.0}
"""What a row is given at least, while there is time left for its part: less would be no use."""

TOGETHER = ("check", "compile")
"""Parts that several processes share, as nothing is timed; a row may take all that is left for its part."""

PROCESSES = max(1, min(12, (os.cpu_count() or 1) * 3 // 4))

BUDGET_S = 460.0
PATIENCE = 4.0
PATIENCE_S = 90.0
"""A row is taken to hang after the longer of these: times its budget, seconds."""

GRACE_S = 20.0  # what still runs so long after all of the budget is ended


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if find_spec("torch") is None:
        print("bench.gpu needs PyTorch: pip install 'perfkit[torch]'", file=sys.stderr)
        return 2
    if options.dry_run:
        return _show(options)
    if reason := missing():
        print(f"bench.gpu cannot run here: {reason}\n--dry-run shows what it would do", file=sys.stderr)
        return 2
    import torch

    from perfkit.kernels import _autotune

    path = RESULTS / f"{_autotune.slug(torch.cuda.get_device_name())}-kernels.json"
    about, kept = gpu_results.about(), gpu_results.read(path)
    past = gpu_results.past(kept) if options.resume else frozenset()
    source = functools.partial(rows, options.only, options.match, past)
    found: list[dict[str, Any]] = []
    known = {(row.part, row.name) for row in rows(list(SHARES))}
    kept = [row for row in kept if (row["part"], row["name"]) in known]

    def keep(row: dict[str, Any]) -> None:
        found.append(row)
        gpu_results.write(path, about, gpu_results.merged(kept, found))

    with tempfile.TemporaryDirectory() as cache:
        # what this user's machine measured before is not what is to be tested
        runners = [Runner(source, "cuda", {"PERFKIT_CACHE": cache, **ENVIRONMENT}) for _ in range(PROCESSES)]
        try:
            run_parts(runners, options.only, options.budget_s, keep)
        finally:
            for runner in runners:
                runner.close()
    failed = [row for row in found if "failed" in row]
    late = sum("skipped" in row for row in found)
    print(f"{len(found)} rows, {len(failed)} failed, {late} left out for want of time; wrote {path}")
    for row in failed:
        print(f"FAILED {row['part']} {row['name']}: {row['failed']}")
    return 1 if failed else 0


def missing() -> str:
    """What a run needs and is not there; empty where nothing is missing."""
    import torch

    if torch.version.hip is not None:
        return "this PyTorch is built for ROCm, and the script's events and rivals are CUDA's"
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is built without CUDA: install a CUDA build"
    if not torch.cuda.is_available():
        return "PyTorch sees no NVIDIA GPU: is there one, and does nvidia-smi show it?"
    if find_spec("triton") is None:
        return "Triton is not installed: pip install 'perfkit[triton]'"
    return ""


def rows(parts: list[str], match: str = "", past: frozenset[tuple[str, str]] = frozenset()) -> list[Any]:
    """The rows of these parts whose names have that text, in the order in which they run, without those of `past`."""
    from bench import gpu_profile, gpu_rows, gpu_time

    made = {
        "check": gpu_rows.check_rows,
        "stress": gpu_rows.stress_rows,
        "compile": gpu_rows.compile_rows,
        "tune": gpu_rows.tune_rows,
        "time": gpu_time.time_rows,
        "profile": gpu_profile.profile_rows,
    }
    found = (row for part in parts for row in made[part]() if match in row.name)
    return [row for row in found if (row.part, row.name) not in past]


Keep = Callable[[dict[str, Any]], None]  # what is done with each row, as it comes


def run_parts(
    runners: list[Runner], parts: list[str], budget_s: float, keep: Keep, clock: Callable[[], float] = time.monotonic
) -> None:
    """Part after part; what one takes too much of the budget, the later ones have less."""
    end = clock() + budget_s
    for i, part in enumerate(parts):
        left = max(0.0, end - clock())
        share_s = left * SHARES[part] / sum(SHARES[name] for name in parts[i:])
        together = part in TOGETHER
        run_part(runners if together else runners[:1], part, share_s, keep, clock, end + GRACE_S)
        if i + 1 == len(parts) or not (together and parts[i + 1] in TOGETHER):
            for runner in runners[1:]:
                runner.close()  # nobody else on the device while it is timed


def run_part(
    runners: list[Runner],
    part: str,
    budget_s: float,
    keep: Keep,
    clock: Callable[[], float] = time.monotonic,
    ended: float = math.inf,
) -> None:
    """All rows of a part in `budget_s` seconds; those that it does not last for are told as skipped.

    Where several runners are given they work at the same time: for what is not timed. What runs at the time `ended` is
    stopped then.
    """
    end, listed = clock() + budget_s, runners[0].rows
    numbers = [number for number, row in enumerate(listed) if row.part == part]
    free: queue.SimpleQueue[Runner] = queue.SimpleQueue()
    for each in runners:
        free.put(each)
    telling = threading.Lock()

    def do(place: int) -> None:
        row = {"part": part, "name": listed[numbers[place]].name}
        now = clock()
        left = end - now
        if left <= 0:
            row["skipped"] = "the part's share of the budget was spent"
        else:
            runner = free.get()
            share = left if part in TOGETHER else left / (len(numbers) - place)
            try:
                row |= runner.run(numbers[place], max(LEAST_S[part], share), max(1.0, ended - now))
            finally:  # or the rows after it wait for ever
                free.put(runner)
        with telling:
            print(f"{part} {place + 1}/{len(numbers)} {row['name']}: {gpu_results.told(row)}", flush=True)
            keep(row)

    with ThreadPoolExecutor(len(runners)) as pool:
        list(pool.map(do, range(len(numbers))))


ENVIRONMENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
"""Or JAX would take most of the device's memory, beside PyTorch."""


class Runner:
    """A process that runs rows, one at a time, and is replaced when it dies or does not answer.

    Args:
        source: makes the rows, here and in the process.
        device: the rows'.
        environment: of the process.
    """

    def __init__(self, source: Callable[[], list[Any]], device: str, environment: dict[str, str]):
        self.rows = source()
        self._started_with = source, device, environment
        self._process: Any = None
        self._pipe: Any = None

    def run(self, number: int, budget_s: float, most_s: float = math.inf) -> dict[str, Any]:
        """What a row returns, or {"failed": why}; after `most_s` it is ended in any case."""
        if self._process is None:
            spawn = get_context("spawn")
            self._pipe, theirs = spawn.Pipe()
            self._process = spawn.Process(target=_serve, args=(theirs, *self._started_with), daemon=True)
            self._process.start()
            theirs.close()
        limit_s = min(max(PATIENCE * budget_s, PATIENCE_S), most_s)
        try:
            self._pipe.send((number, budget_s))
            if self._pipe.poll(limit_s):
                found = self._pipe.recv()
                if found.pop("lost", False):
                    self.close()
                return found
            told = f"no answer in {limit_s:.0f} s"
        except (EOFError, OSError):  # it died in this row, or since the last one
            self._process.join(10)
            told = f"its process died, with exit code {self._process.exitcode}"
        self.close()
        return {"failed": told}

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None


def _serve(pipe: Any, source: Callable[[], list[Any]], device: str, environment: dict[str, str]) -> None:
    """What the process does: rows as their numbers come, until its parent is gone or its device can no more."""
    os.environ.update(environment)
    mine = source()
    while True:
        try:
            number, budget_s = pipe.recv()
        except EOFError:
            return
        try:
            found = mine[number].run(device, budget_s)
        except Exception as error:  # one row's: the others are still to be run
            found = {"failed": f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"}
        if device == "cuda":
            found |= _cleared()
        pipe.send(found)


def _cleared() -> dict[str, Any]:
    """Give memory back between rows; a device that cannot even do that is of no more use to this process."""
    import torch

    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        told = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        return {"failed": told, "lost": True}
    return {}


def _show(options: argparse.Namespace) -> int:
    """Every row's problem, by the name under which it would be tuned."""
    from perfkit.kernels import _autotune

    for row in rows(options.only, options.match):
        told = ""
        if row.make is not None:
            subject = row.make("meta")
            told = ": " + _autotune.key(subject.op.name, dataclasses.replace(subject.problem, device="cuda"))
        print(f"{row.part} {row.name}{told}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", type=_parts, default=list(SHARES), metavar="PARTS", help=f"some of {','.join(SHARES)}; default: all"
    )
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, metavar="N", help="seconds for all; default: 460")
    parser.add_argument("--match", default="", metavar="TEXT", help="only rows whose name has this text")
    parser.add_argument("--resume", action="store_true", help="leave out what the file has from before, and is right")
    parser.add_argument("--dry-run", action="store_true", help="run nothing, show what would run; needs no GPU")
    return parser


def _parts(text: str) -> list[str]:
    asked = text.split(",")
    if unknown := [part for part in asked if part not in SHARES]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: expected some of {','.join(SHARES)}")
    return [part for part in SHARES if part in asked]


if __name__ == "__main__":
    sys.exit(main())
