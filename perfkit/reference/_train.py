"""Training the reference models."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ._catalog import BATCH_SIZE, card, dataset
from ._checks import at_least
from ._evaluate import evaluate
from ._load import Framework, framework_side, task
from .data import Dataset


@dataclass(frozen=True, eq=False, kw_only=True)
class Trained:
    """A trained model, and how it got there.

    Attributes:
        model: `torch.nn.Module` or `flax.nnx.Module`, in inference mode.
        metric: "accuracy" or "mse", as in `Evaluation`.
        value: the metric on held-out rows.
        baseline: the metric of the best constant answer on the same rows.
        train_seconds: wall-clock time of the steps, with compiling in JAX, without loading data and evaluating.
        losses: the training loss of each step that this run took.
        report: what the recipe brought, as `perfkit.optimize` tells it; None without a recipe.
        resumed_at: the number of steps that the model had behind it when this run began.
    """

    model: Any
    metric: Literal["accuracy", "mse"]
    value: float
    baseline: float
    train_seconds: float
    losses: tuple[float, ...]
    report: Any = None
    resumed_at: int = 0


def train(
    name: str,
    *,
    framework: Framework = "torch",
    steps: int | None = None,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    data: Dataset | None = None,
    progress: Callable[[int, int, float], None] | None = None,
    recipe: str | None = None,
    budget_s: float | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
) -> Trained:
    """Train a reference model and judge it on held-out rows.

    The same arguments give the same result on the same machine, libraries and number of threads. The batches depend on
    the seed alone, so both frameworks see the same ones; the initial weights follow each framework's own custom.

    Args:
        name: one of `MODELS`.
        framework: "torch" or "jax".
        steps: optimizer steps; None for the number that the model needs at batch size 64.
        batch_size: rows in each step.
        seed: of the weights and the order of the rows.
        data: what to learn and be judged on; None for the model's default, which needs no network.
        progress: called after every step as `progress(step, steps, loss)`; it makes each step wait for its result. Of
            several processes it is called in the first.
        recipe: train what `perfkit.optimize` makes of the model with this recipe; with one such as "data_parallel" each
            of several processes calls this function with the same arguments, and works on its part of each batch.
        budget_s: seconds to spend measuring the recipe.
        checkpoint: folder for checkpoints: one after the last step, and the one before it.
        checkpoint_every: steps from one checkpoint to the next.
        resume: go on from the last checkpoint there, which any number of processes may have written.

    Returns:
        Trained.

    Raises:
        ValueError: An unknown name or framework, a number below 1, data of a kind that the model cannot read, or
            checkpoints that are not there, or are and were not asked for.
        perfkit.PerfkitError: what `perfkit.optimize` raises about the recipe.
        ImportError: The framework is not installed, or scikit-learn for the digits.

    Example:
        >>> trained = train("cnn", steps=20)
        >>> trained.metric, trained.value > trained.baseline
        ('accuracy', True)
    """
    side, about = framework_side(framework), card(name)
    steps = about.steps if steps is None else at_least(steps, 1, what="steps")
    at_least(batch_size, 1, what="batch_size")
    data = dataset(name, data)
    if recipe or checkpoint:
        return _train_run(
            name,
            framework,
            {"steps": steps, "batch_size": batch_size, "seed": seed, "data": data},
            checkpoint,
            recipe=recipe,
            budget_s=budget_s,
            every=None if checkpoint_every is None else at_least(checkpoint_every, 1, what="checkpoint_every"),
            resume=resume,
            progress=progress,
        )
    model = side.build(name, seed=seed)
    side.set_mode(model, training=True)
    losses = []

    def report(step: int, loss: Any) -> None:
        losses.append(loss)
        if progress is not None:
            progress(step, steps, float(loss))

    started = time.perf_counter()
    rows = batches(name, framework=framework, steps=steps, batch_size=batch_size, seed=seed, data=data)
    side.fit(model, loss=side.LOSSES[about.kind], optimizer=side.optimizer(about), batches=rows, report=report)
    curve = tuple(float(loss) for loss in losses)  # waits for the last step, so it is part of the time
    train_seconds = time.perf_counter() - started

    side.set_mode(model, training=False)
    judged = evaluate(name, model, framework=framework, data=data)
    return Trained(
        model=model,
        metric=judged.metric,
        value=judged.value,
        baseline=judged.baseline,
        train_seconds=train_seconds,
        losses=curve,
    )


def _train_run(
    name: str, framework: Framework, about: dict[str, Any], checkpoint: str | Path | None, **how: Any
) -> Trained:
    from . import _train_run as runs

    if framework == "jax":
        from perfkit.parallel.jax_world import join

        join()  # before anything runs in JAX
    seed, batch_size, data = about["seed"], about["batch_size"], about["data"]
    where = runs.checkpoints_of(checkpoint, name, framework, batch_size, seed) if checkpoint else None
    work = task(name, framework=framework, batch_size=batch_size, seed=seed)
    rows = batches(name, framework=framework, **about)
    ran = runs.run(work, rows, steps=about["steps"], seed=seed, checkpoints=where, **how)
    side, model = framework_side(framework), ran.finished.model
    if framework == "torch":
        side.set_mode(model, training=False)
        judged = evaluate(name, model, framework=framework, data=data)
    else:
        judged = evaluate(name, ran.finished.call, framework=framework, data=data)
    return Trained(
        model=model,
        metric=judged.metric,
        value=judged.value,
        baseline=judged.baseline,
        train_seconds=ran.seconds,
        losses=ran.losses,
        report=ran.report,
        resumed_at=ran.after - len(ran.losses),
    )


def batches(
    name: str,
    *,
    framework: Framework = "torch",
    steps: int,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    data: Dataset | None = None,
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Training batches of a reference model, shuffled: what `train` trains on, for `result.train_step`.

    Args:
        name: one of `MODELS`.
        framework: "torch" or "jax".
        steps: how many batches.
        batch_size: rows of each.
        seed: of the order of the rows.
        data: None for the model's default.

    Returns:
        An iterator over (inputs, targets).

    Raises:
        ValueError: An unknown name or framework, a number below 1, or data of a kind that the model cannot read.
        ImportError: The framework is not installed, or scikit-learn for the digits.

    Example:
        >>> [len(targets) for inputs, targets in batches("cnn", steps=2)]
        [64, 64]
    """
    side, about = framework_side(framework), card(name)
    at_least(batch_size, 1, what="batch_size")
    at_least(steps, 1, what="steps")
    train = dataset(name, data).train

    def made() -> Iterator[tuple[tuple[Any, ...], Any]]:
        for indices in shuffled(len(train), batch_size=batch_size, steps=steps, seed=seed):
            inputs, targets = train.rows(indices)
            yield side.model_inputs(about.kind, inputs), side.model_targets(targets)

    return made()


def shuffled(count: int, *, batch_size: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    """Row numbers for each step, (batch_size,): one shuffle of all rows after another, cut into full batches."""
    generator = np.random.default_rng(seed)
    ahead = np.empty(0, dtype=np.int64)
    for _ in range(steps):
        while len(ahead) < batch_size:
            ahead = np.concatenate([ahead, generator.permutation(count)])
        yield ahead[:batch_size]
        ahead = ahead[batch_size:]
