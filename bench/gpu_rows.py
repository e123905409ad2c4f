"""What `python -m bench.gpu` does, row by row: numbers checked, barriers stressed, tile sizes compiled and tuned."""

from __future__ import annotations

import dataclasses
import datetime as dt
import functools
import importlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.gpu_cases import Conv, Linear, Rnn
from bench.gpu_subject import Subject
from perfkit.kernels import _autotune, _tune
from perfkit.kernels.conv2d import cases as conv2d_cases
from perfkit.kernels.linear_int8 import cases as linear_cases
from perfkit.kernels.rnn import cases as rnn_cases
from perfkit.measure.environment import environment

SHIPPED = _autotune.SHIPPED
STRESS_STEPS = 5000
REPEATS = 5
NO_GRID = "programs of a grid run at once on a GPU alone"


@dataclass(frozen=True)
class Row:
    """One thing to do.

    Args:
        part: "check", "stress", "compile", "tune", "time" or "profile".
        name: for people.
        run: does it, on a device, in about so many seconds; what it returns is written down. A row that failed has
            "failed" in it, one that does not apply "refused".
        make: the subject of it on a device, where there is one.
    """

    part: str
    name: str
    run: Callable[[str, float], dict[str, Any]]
    make: Callable[[str], Subject] | None = None


# ---- Numbers ---------------------------------------------------------------------------------------------------------


def check_rows() -> Iterator[Row]:
    """Every op's cases, in every dtype and layout, with every gradient, by each implementation."""

    def row(make: Callable[[str], Subject], name: str) -> Row:
        return Row("check", name, lambda device, _budget_s: checked(make(device)), make)

    for case in rnn_cases.CASES:
        yield row(lambda device, case=case: Rnn(case, True, device), f"rnn {case}")
    for case in conv2d_cases.CASES:
        for dtype, last, integers in (
            ("float32", False, True),
            ("bfloat16", True, True),
            ("float16", False, True),
            ("float32", True, False),
        ):
            name = f"conv2d {case.name} {'NHWC' if last else 'NCHW'} {dtype} {'integers' if integers else 'normal'}"
            yield row(
                lambda device, given=(case, dtype, last, integers): Conv(*given, training=True, device=device), name
            )
    for case in linear_cases.CASES:
        yield row(lambda device, case=case: Linear(case, device), f"linear_int8 {case.name}")


def checked(subject: Subject) -> dict[str, Any]:
    """Each implementation's outcome: "right", what is wrong, or why it does not take the call."""
    found: dict[str, Any] = {}
    wrong = []
    for name, reason in subject.able().items():
        if reason is None:
            told = subject.wrong(name, subject.call(name))
            found[name] = told or "right"
            wrong += [f"{name}: {told}"] if told else []
        else:
            found[name] = f"refused: {reason}"
    return {"outcomes": found} | ({"failed": "; ".join(wrong)} if wrong else {})


# ---- Barriers --------------------------------------------------------------------------------------------------------


def stress_rows() -> Iterator[Row]:
    """Grids that fill the device, whose programs wait for each other at each of many steps."""
    yield Row("stress", "small tiles on every processor", lambda device, _budget_s: stressed_barriers(device))
    for name, hidden, layers, directions, training in (
        ("one layer", 256, 1, 1, True),
        ("two directions", 256, 1, 2, True),
        ("a wavefront of four layers", 256, 4, 1, True),
        ("many units", 512, 1, 1, False),
    ):
        run = functools.partial(stressed, hidden=hidden, layers=layers, directions=directions, training=training)
        yield Row("stress", f"{name}, tiles by the rule", run)


def stressed_barriers(device: str) -> dict[str, Any]:
    """`perfkit.kernels.rnn.triton_stress`: as many programs as processors, of tiles as small as can be."""
    if device != "cuda":
        return {"refused": NO_GRID}
    from perfkit.kernels.rnn.triton_stress import barrier_stress

    found = barrier_stress(device, STRESS_STEPS)
    row = {
        "repeats": min(stress.repeats for stress in found),
        "steps": STRESS_STEPS,
        "programs": min(stress.programs for stress in found),
        "processors": torch.cuda.get_device_properties(device).multi_processor_count,
    }
    unequal = [stress.kind for stress in found if not stress.equal]
    return row | ({"failed": f"{', '.join(unequal)}: other bits than step by step"} if unequal else {})


def stressed(
    device: str, budget_s: float, hidden: int, layers: int, directions: int, training: bool, steps: int = STRESS_STEPS
) -> dict[str, Any]:
    """One launch for all steps, several times over, against one launch for each step: the same bits.

    The batch is as large as fills all processors with programs that wait.
    """
    if device != "cuda":
        return {"refused": NO_GRID}
    from perfkit.kernels.rnn import triton_kernel

    processors = torch.cuda.get_device_properties(device).multi_processor_count
    case = rnn_cases.Case(
        *("LSTM", steps, 16, 16, hidden, layers), bidirectional=directions == 2, dtype="bfloat16", initial=False
    )
    rule = dict(triton_kernel.candidates(case.problem("torch", device, training))[0])
    jobs = layers if rule["wavefront"] else directions
    tiles = processors // (-(-hidden // rule["block_h"]) * jobs)
    if not tiles:
        return {"refused": f"{processors} processors do not hold one tile of rows"}
    case = dataclasses.replace(case, batch=tiles * rule["block_b"])
    subject = Rnn(case, training, device)

    def run(persistent: int) -> list[torch.Tensor]:
        configuration = tuple(sorted((rule | {"persistent": persistent}).items()))
        with _autotune.assume("rnn", subject.problem, "triton", configuration):
            return subject.call("triton")

    began, expected, repeats = time.monotonic(), run(0), 0
    while repeats < REPEATS and (repeats == 0 or time.monotonic() - began < budget_s):
        for index, (one, other) in enumerate(zip(expected, run(1), strict=True)):
            if not torch.equal(one, other):
                return {"failed": f"result {index} differs in repeat {repeats}", "batch": case.batch}
        repeats += 1
    programs = tiles * -(-hidden // rule["block_h"]) * jobs
    return {"repeats": repeats, "steps": steps, "batch": case.batch, "programs": programs, "processors": processors}


# ---- Tile sizes ------------------------------------------------------------------------------------------------------


def tune_rows(folder: Path = SHIPPED) -> list[Row]:
    """The ops' benchmark cases, forward alone and with every gradient; the ones thought to gain most come first."""
    found: list[Row] = []

    def add(op: str, name: str, make: Callable[[str], Subject]) -> None:
        found.append(Row("tune", f"{op} {name}", lambda device, budget_s: tuned(make(device), budget_s, folder), make))

    for training in (False, True):
        told = "training" if training else "inference"
        for name, case in wide_first(rnn_cases.BENCHMARKS):
            add("rnn", f"{name}, {told}", lambda device, given=(case, training): Rnn(*given, device))
        for case in conv2d_cases.BENCHMARKS:
            for dtype in ("float32", "bfloat16"):
                given = case, dtype, dtype == "bfloat16", True, training
                add("conv2d", f"{case.name} {dtype}, {told}", lambda device, given=given: Conv(*given, device))
    for case in linear_cases.BENCHMARKS:
        add("linear_int8", case.name, lambda device, case=case: Linear(case, device))
    first = ("wide", "KernelBench", "packed", "N1024")
    return sorted(found, key=lambda row: not any(word in row.name for word in first))


def compile_rows() -> list[Row]:
    """The rows of "tune", but that every candidate is called once, so that Triton's cache has its kernels."""
    return [
        dataclasses.replace(row, part="compile", run=lambda device, s, make=row.make: compiled(make(device), s))
        for row in tune_rows()
    ]


def compiled(subject: Subject, budget_s: float) -> dict[str, Any]:
    """Call every candidate once; what cannot run is told, and is no fault: a device may be too small for it."""
    refused, done, end = {}, 0, time.monotonic() + budget_s
    tried = candidates(subject)
    for name, configuration in tried:
        if done and time.monotonic() > end:
            break
        try:
            with _autotune.assume(subject.op.name, subject.problem, name, configuration):
                subject.call(name)
        except Exception as error:  # of whatever kind: the others are still to be compiled
            refused[f"{name} {dict(configuration)}"] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        done += 1
    return {"compiled": done - len(refused), "late": len(tried) - done, "dropped": refused}


def wide_first(cases: dict[str, Any]) -> list[tuple[str, Any]]:
    """The recurrent cases made for GPUs before the reference models."""
    return sorted(cases.items(), key=lambda item: item[1].hidden <= 128)


def tuned(subject: Subject, budget_s: float, folder: Path) -> dict[str, Any]:
    """Time an op's implementations, kernels in every configuration they propose; keep the fastest that is right."""
    tried = candidates(subject)
    _ = subject.expected  # which takes its time, and is not to be taken from the budget
    about = {"environment": dataclasses.asdict(environment()), "date": dt.date.today().isoformat()}
    trials = _tune.tune(
        subject.op.name,
        subject.problem,
        tried,
        subject.call,
        budget_s=budget_s,
        verify=subject.wrong,
        folder=folder,
        **about,
    )
    best = min(trials, key=lambda candidate: trials[candidate].ms)
    told = {f"{name} {dict(tiles)}": trial.wrong or trial.refused for (name, tiles), trial in trials.items()}
    row = {
        "problem": subject.problem.bucket,
        "fastest": best[0],
        "configuration": dict(best[1]),
        "ms": {name: min(trials[found].ms for found in tried if found[0] == name) for name, _ in tried},
        "tried": sum(trial.ms < math.inf for trial in trials.values()),
        "dropped": {name: reason for name, reason in told.items() if reason},
    }
    row["ms"] = {name: ms for name, ms in row["ms"].items() if ms < math.inf}
    # what a device cannot run is dropped, and told; what runs and is wrong is a fault
    wrong = [f"{name} {dict(tiles)}: {trial.wrong}" for (name, tiles), trial in trials.items() if trial.wrong]
    return row | ({"failed": "; ".join(wrong)} if wrong else {})


def candidates(subject: Subject) -> list[_tune.Candidate]:
    """Who can compute a call: each by its own rule, then the kernels with whatever else they propose."""
    op = subject.op.name
    able = [name for name, reason in subject.able().items() if reason is None and name != "reference"]
    found: list[_tune.Candidate] = [(name, ()) for name in able]
    for name in able:
        if name != "library":
            module = importlib.import_module(f"perfkit.kernels.{op}.{name}_kernel")
            proposed = list(getattr(module, "candidates", lambda _problem: ())(subject.problem))
            found += [(name, tuple(configuration)) for configuration in proposed[1:]]  # the first is the rule
    return found
