"""Judging any model on the held-out rows of a reference model's data."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ._catalog import BATCH_SIZE, METRICS, Kind, card, dataset
from ._checks import at_least, unfit
from ._load import Framework, framework_side
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
