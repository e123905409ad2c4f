"""One of the two processes of `python -m bench.fresh_memory`: answers questions in JSON, line by line."""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

from perfkit import backends, reference

WARM = 4
"""Training steps before the first that is timed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("batch_size", type=int)
    options = parser.parse_args()
    step, temporary = stepping(options.model, options.batch_size)
    for line in sys.stdin:
        question, *given = json.loads(line)
        if question == "begin":
            steps(step, WARM)
            answer: dict[str, Any] = steps(step, WARM) | {"temporary_bytes": temporary}
        elif question == "steps":
            answer = steps(step, *given)
        else:
            answer = {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        print(json.dumps(answer), flush=True)


def stepping(model: str, batch_size: int) -> tuple[Callable[[], Any], int]:
    """One synchronized training step as perfkit compiles it, and the bytes of temporary memory that it takes."""
    task = reference.task(model, framework="jax", batch_size=batch_size)
    backend = backends.of(task.model, task.example_inputs)
    companions = {"loss": task.loss, "targets": task.targets, "optimizer": task.optimizer}
    work = backend.bind(task.model, None, task.example_inputs, mode="training", seed=0, **companions)
    finished = backend.finish(work)
    call = backend.caller(work, finished)
    call()
    return call, finished.program().memory_analysis().temp_size_in_bytes


def steps(step: Callable[[], Any], number: int) -> dict[str, Any]:
    """Milliseconds and minor page faults of one of so many steps."""
    faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
    for _ in range(number):
        step()
    taken = time.perf_counter() - start
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    return {"step_ms": taken * 1e3 / number, "faults": faults / number}


if __name__ == "__main__":
    main()
