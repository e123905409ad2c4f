"""Training the reference models and judging any model on the held-out rows."""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ._catalog import BATCH_SIZE, METRICS, Kind, card, dataset
from ._checks import at_least, unfit
from ._load import Framework, framework_side, task
from .data import Dataset


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How well a model does on held-out rows.

    Attributes:
        metric: "accuracy", a share in 0..1, higher is better; or "mse", the mean squared error, lower is better.
        value: the metric of the model.
        baseline: the metric of the best constant answer: the largest class's share, or the variance of the targets.
        count: number of rows judged.
    """

    metric: Literal["accuracy", "mse"]
    value: float
    baseline: float
    count: int


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


def evaluate(
    name: str,
    model: Callable[..., Any],
    *,
    framework: Framework | None = None,
    batch_size: int = BATCH_SIZE,
    data: Dataset | None = None,
) -> Evaluation:
    """Judge a model on held-out rows.

    Every call has exactly `batch_size` rows, the last one filled up with rows that are not counted, so that a model
    compiled or exported for one shape can be judged too.

    Args:
        name: the reference model whose inputs and outputs `model` has.
        model: a torch module in inference mode, a flax module, or any function from the same inputs to the same
            outputs. Inputs go to the device of a torch module's parameters, otherwise to the framework's default.
        framework: "torch" or "jax", the kind of arrays that `model` takes; None to tell by the type of a module.
        batch_size: rows in each call.
        data: what to judge on; None for the model's default.

    Returns:
        Evaluation.

    Raises:
        ValueError: An unknown name or framework, a number below 1, data of a kind that the model cannot read, or no
            framework named for a model that is not a module.
        ImportError: The framework is not installed, or scikit-learn for the digits.

    Example:
        >>> model, _ = load("cnn")
        >>> evaluate("cnn", model).value < 0.5  # untrained
        True
    """
    side, kind = framework_side(framework or framework_of(model)), card(name).kind
    at_least(batch_size, 1, what="batch_size")
    held_out = dataset(name, data).test
    predict = side.predictor(model)
    outputs = []
    for start in range(0, len(held_out), batch_size):
        inputs, _ = held_out.rows((start + np.arange(batch_size)) % len(held_out))
        outputs.append(predict(*side.model_inputs(kind, inputs)))
    return judge(kind, np.concatenate(outputs)[: len(held_out)], held_out.targets)


def judge(kind: Kind, outputs: np.ndarray, targets: np.ndarray) -> Evaluation:
    """Score outputs (N, C) or (N, 1) against the targets of a split, in float64."""
    if kind == "sequences":
        value = float(np.mean((outputs.astype(np.float64) - targets) ** 2))
        baseline = float(np.var(targets, dtype=np.float64))
    else:
        answers = outputs.argmax(axis=1) if kind == "images" else outputs > 0
        value = float(np.mean(answers == targets))
        _, counts = np.unique(targets, return_counts=True)
        baseline = float(counts.max() / len(targets))
    return Evaluation(metric=METRICS[kind], value=value, baseline=baseline, count=len(targets))


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


def framework_of(model: Any) -> Framework:
    """Tell a module's framework by its type. A framework that was never imported cannot have made the model."""
    torch, nnx = sys.modules.get("torch"), sys.modules.get("flax.nnx")
    if torch is not None and isinstance(model, torch.nn.Module):
        return "torch"
    if nnx is not None and isinstance(model, nnx.Module):
        return "jax"
    raise unfit(
        f"the model is a {type(model).__name__} and no framework was named",
        expected="a torch or flax module, or a framework",
        remedy="name the kind of arrays it takes with framework='torch' or framework='jax'",
    )
