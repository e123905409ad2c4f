"""Reference models with realistic inputs, ready to be optimized."""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, NamedTuple

import numpy as np

from ._catalog import BATCH_SIZE, FRAMEWORKS, METRICS, card, dataset
from ._checks import at_least, known, require
from .data import Split

Framework = Literal["torch", "jax"]


class Loaded(NamedTuple):
    """A model in inference mode and a tuple of inputs it can be called with."""

    model: Any
    example_inputs: tuple[Any, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class Task:
    """All that one training step needs.

    Attributes:
        name: of the reference model.
        framework: "torch" or "jax".
        model: `torch.nn.Module` or `flax.nnx.Module`, in training mode.
        example_inputs: one batch of training inputs; `model(*example_inputs)` is the forward pass.
        targets: what the outputs should be.
        loss: `loss(outputs, targets)`, the mean over the batch.
        optimizer: for torch a function of the parameters that makes the optimizer, for JAX an `optax` transformation.
        metric: "accuracy" (higher is better) or "mse" (lower is better).
    """

    name: str
    framework: Framework
    model: Any
    example_inputs: tuple[Any, ...]
    targets: Any
    loss: Callable[[Any, Any], Any]
    optimizer: Any
    metric: Literal["accuracy", "mse"]


def load(name: str, *, framework: Framework = "torch", batch_size: int | None = None, seed: int = 0) -> Loaded:
    """Make a reference model, untrained, with a batch of real inputs.

    | name | model | inputs in torch | inputs in JAX |
    |---|---|---|---|
    | cnn | one convolution | images (B, 1, 28, 28) float32 | images (B, 28, 28, 1) float32 |
    | cnn2 | two convolutions | the same | the same |
    | rnn, lstm | one recurrent layer | sequences (28, B, 10) float32 | the same |
    | text_rnn, text_lstm | embedding, two recurrent layers | ids (B, 128), lengths (B,), int64 | the same in int32 |

    Args:
        name: one of `MODELS`.
        framework: "torch" or "jax".
        batch_size: rows of the inputs; None for 64. Beyond the held-out rows of the data set they begin again.
        seed: of the weights.

    Returns:
        (model, example_inputs). The model is in inference mode and on the framework's default device.

    Raises:
        ValueError: An unknown name or framework, or a batch size below 1.
        ImportError: The framework is not installed, or scikit-learn for the digits.

    Example:
        >>> model, example_inputs = load("lstm")
        >>> model(*example_inputs).shape
        torch.Size([64, 1])
    """
    side, kind = framework_side(framework), card(name).kind
    inputs, _ = example_rows(dataset(name, None).test, batch_size)
    model = side.build(name, seed=seed)
    side.set_mode(model, training=False)
    return Loaded(model, side.model_inputs(kind, inputs))


def task(name: str, *, framework: Framework = "torch", batch_size: int | None = None, seed: int = 0) -> Task:
    """Make a reference model, untrained, with all that one training step needs.

    Args:
        name: one of `MODELS`.
        framework: "torch" or "jax".
        batch_size: rows of the batch; None for 64. Beyond the training rows of the data set they begin again.
        seed: of the weights.

    Returns:
        Task, with the model in training mode.

    Raises:
        ValueError: An unknown name or framework, or a batch size below 1.
        ImportError: The framework is not installed, or scikit-learn for the digits.

    Example:
        >>> work = task("cnn")
        >>> optimizer = work.optimizer(work.model.parameters())
        >>> work.loss(work.model(*work.example_inputs), work.targets).backward()
        >>> optimizer.step()
    """
    side, about = framework_side(framework), card(name)
    inputs, targets = example_rows(dataset(name, None).train, batch_size)
    model = side.build(name, seed=seed)
    side.set_mode(model, training=True)
    return Task(
        name=name,
        framework=framework,
        model=model,
        example_inputs=side.model_inputs(about.kind, inputs),
        targets=side.model_targets(targets),
        loss=side.LOSSES[about.kind],
        optimizer=side.optimizer(about),
        metric=METRICS[about.kind],
    )


def calibration(
    name: str, *, framework: Framework = "torch", batch_size: int = 64, batches: int = 8
) -> list[tuple[Any, ...]]:
    """Batches of real training inputs, for `perfkit.optimize(calibration=...)`.

    Args:
        name: one of `MODELS`.
        framework: "torch" or "jax".
        batch_size: rows of each batch.
        batches: how many; beyond the training rows of the data set they begin again.

    Returns:
        Tuples of inputs, each as `load` gives them.

    Raises:
        ValueError: An unknown name or framework, or a number below 1.
        ImportError: The framework is not installed, or scikit-learn for the digits.
    """
    side, about = framework_side(framework), card(name)
    split = dataset(name, None).train
    size, count = at_least(batch_size, 1, what="batch_size"), at_least(batches, 1, what="batches")
    rows = np.arange(size * count).reshape(count, size) % len(split)
    return [side.model_inputs(about.kind, split.rows(batch)[0]) for batch in rows]


def framework_side(framework: str) -> ModuleType:
    """The module that speaks to a framework, loaded only here, so that the other need not be installed."""
    known(framework, FRAMEWORKS, what="framework")
    if framework == "torch":
        require("torch", extra="torch")
        from . import _in_torch

        return _in_torch
    require("optax", extra="jax")  # before flax, which imports it too and would fail with an error of its own
    require("flax.nnx", extra="jax")
    from . import _in_jax

    return _in_jax


def example_rows(split: Split, batch_size: int | None) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """The first rows of a split, beginning again when it has too few."""
    count = BATCH_SIZE if batch_size is None else at_least(batch_size, 1, what="batch_size")
    return split.rows(np.arange(count) % len(split))
