"""Training a reference model as `perfkit.optimize` made it: in one process or several, with checkpoints."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from perfkit import backends
from perfkit._chain import Chain, chain_of
from perfkit._optimize import optimize
from perfkit._report import Report
from perfkit.backends.adapter import Finished
from perfkit.parallel import heartbeat, world
from perfkit.parallel.batch import dealer
from perfkit.parallel.checkpoint import Checkpoints

from ._catalog import card
from ._load import Framework, Task


@dataclass(frozen=True)
class Run:
    """A training that is under way.

    Args:
        finished: the model as it is trained.
        report: what the recipe brought; None without one.
        losses: of each step that this run took, over the whole batch.
        seconds: that they took.
        after: the number of steps that the model has behind it.
    """

    finished: Finished
    report: Report | None
    losses: tuple[float, ...]
    seconds: float
    after: int


def run(
    task: Task,
    rows: Iterable,
    *,
    steps: int,
    recipe: str | None,
    budget_s: float | None,
    seed: int,
    checkpoints: Checkpoints | None,
    every: int | None,
    resume: bool,
    progress: Callable[[int, int, float], None] | None,
) -> Run:
    """Train on whole batches, each process on its part; every process calls it with the same arguments.

    Args:
        rows: whole batches, from the first step on; those that a resumed training has had are left out.
        every: steps from one checkpoint to the next; the last step is followed by one in any case.
        progress: called on rank 0 alone.
    """
    chain = suited(chain_of(recipe), task.name) if recipe else Chain(())
    if checkpoints and not resume:
        checkpoints.refuse_others()
    finished, report = _prepared(task, chain, budget_s, seed)
    done = checkpoints.restore(finished) if checkpoints and resume else 0
    found, deal = world.of(task.framework), dealer(chain, task.framework)
    losses, started = [], time.perf_counter()
    for step, batch in enumerate(itertools.islice(rows, done, None), start=done + 1):
        heartbeat.beat(step)
        losses.append(finished.train_step(deal(batch)))
        if progress is not None and found.leads:
            progress(step, steps, float(losses[-1]))
        if checkpoints and (step == steps or (every and step % every == 0)):
            checkpoints.save(finished, step)
    if finished.rounds is not None:
        finished.rounds.settle()
    heartbeat.rest()
    curve = tuple(map(float, losses))
    return Run(finished, report, curve, time.perf_counter() - started, done + len(curve))


def suited(chain: Chain, name: str) -> Chain:
    """The chain with what it must know about the model: sequences lie in time first, so their batch is dimension 1."""
    if card(name).kind != "sequences":
        return chain

    def told(recipe: Any) -> Any:
        takes = any(item.name == "batch_dim" for item in fields(recipe))
        return replace(recipe, batch_dim=1) if takes else recipe

    return Chain(tuple(map(told, chain)))


def _prepared(task: Task, chain: Chain, budget_s: float | None, seed: int) -> tuple[Finished, Report | None]:
    companions: dict[str, Any] = {"loss": task.loss, "targets": task.targets, "optimizer": task.optimizer}
    if list(chain):
        result = optimize(
            task.model,
            chain,
            example_inputs=task.example_inputs,
            mode="training",
            budget_s=budget_s,
            seed=seed,
            **companions,
        )
        return result.finished, result.report
    backend = backends.backend(task.framework)
    work = backend.bind(task.model, None, task.example_inputs, mode="training", seed=seed, **companions)
    return backend.finish(work), None


def checkpoints_of(folder: str | Path, name: str, framework: Framework, batch_size: int, seed: int) -> Checkpoints:
    """The checkpoints in that folder, of this training."""
    return Checkpoints(Path(folder), framework, {"model": name, "batch_size": batch_size, "seed": seed})
