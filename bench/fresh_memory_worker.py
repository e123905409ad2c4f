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
from perfkit.measure import kept_memory

WARM = 4
"""Calls before the first that is timed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("framework", choices=("jax", "torch"))
    parser.add_argument("mode", choices=("inference", "training"))
    parser.add_argument("model")
    parser.add_argument("batch_size", type=int)
    options = parser.parse_args()
    call, temporary = calling(options.framework, options.mode, options.model, options.batch_size)
    for line in sys.stdin:
        question, *given = json.loads(line)
        if question == "begin":
            steps(call, WARM)
            answer: dict[str, Any] = steps(call, WARM) | {"temporary_bytes": temporary()}
        elif question == "steps":
            answer = steps(call, *given)
        else:
            answer = {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        print(json.dumps(answer), flush=True)


def calling(framework: str, mode: str, model: str, batch_size: int) -> tuple[Callable[[], Any], Callable[[], int]]:
    """One synchronized call or training step, in JAX as perfkit compiles it; and the bytes that it takes of the system.

    Those are in JAX the program's temporary memory, in torch the pages that a call touches for the first time.
    """
    task = reference.task(model, framework=framework, batch_size=batch_size)
    backend = backends.of(task.model, task.example_inputs)
    companions = {"loss": task.loss, "targets": task.targets, "optimizer": task.optimizer}
    if mode == "inference":
        companions = dict.fromkeys(companions)
    work = backend.bind(task.model, None, task.example_inputs, mode=mode, seed=0, **companions)
    finished = backend.finish(work)
    call = backend.caller(work, finished)
    call()
    if framework == "torch":
        return call, lambda: kept_memory.touched_anew(call)
    return call, lambda: finished.program().memory_analysis().temp_size_in_bytes


def steps(call: Callable[[], Any], number: int) -> dict[str, Any]:
    """Milliseconds and minor page faults of one of so many calls."""
    faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
    for _ in range(number):
        call()
    taken = time.perf_counter() - start
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    return {"step_ms": taken * 1e3 / number, "faults": faults / number}


if __name__ == "__main__":
    main()
