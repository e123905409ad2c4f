"""A training step in micro-batches: what it needs of the batch and of the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from perfkit._batch import axis_of, even_rows, other_dim, sliced
from perfkit._errors import InvalidInputError, UnsupportedError, first_line
from perfkit._report import Effect
from perfkit._workload import Workload

ROUNDING = 1e-5
"""Relative distance, in float32, between a mean over the batch and the mean of its micro-batches' means."""

TOGETHER = 3e-2
"""Relative distance of the same rows' outputs, alone and in the whole batch, that computing in 16 bits may bring."""


def refusal(work: Workload, micro_batches: int, batch_dim: int) -> str | None:
    """Why the example batch cannot be cut; None where it can."""
    if not work.trains:
        return "it cuts training steps: for inference use smaller batches"
    if reason := other_dim(work.samples, batch_dim):
        return reason
    shared = work.layout.size("data") if work.layout is not None and work.framework == "torch" else 1
    try:
        _rows(work, batch_dim, micro_batches * shared)
    except InvalidInputError as error:
        return str(error)
    return None


def accumulated(
    work: Workload,
    micro_batches: int,
    batch_dim: int,
    call: Callable[..., Any],
    rounding: Callable[[Any], float],
    mapped: Callable,
    apart: list[str],
) -> tuple[Workload, Effect]:
    """The workload, trained in micro-batches.

    Args:
        call: the model, on inputs of its own.
        rounding: distance of the dtype of such outputs from 1 to the next number.
        mapped: `mapped(function, tree)`: the tree with the function of each tensor.
        apart: what in the model looks at a batch as a whole.

    Raises:
        UnsupportedError: the loss is no mean over the batch, or the model does not run on a part of it.
    """
    training, outputs = work.training, call(*work.inputs.args, **work.inputs.kwargs)
    rows = _rows(work, batch_dim, micro_batches)
    if _leaves(work, training.targets) and not _cut(work, training.targets, rows, batch_dim):
        raise UnsupportedError(
            f"accumulate cuts the batch of {rows} rows along dimension {batch_dim} of the inputs, and no target "
            f"has that many: set batch_dim= to the batch's dimension"
        )
    if _cut(work, outputs, rows, batch_dim):
        whole = float(training.loss(outputs, training.targets))
        parts = [sliced(rows, micro_batches, index, batch_dim) for index in range(micro_batches)]
        mean = sum(float(training.loss(mapped(of, outputs), mapped(of, training.targets))) for of in parts)
        mean /= micro_batches
        if not abs(whole - mean) <= max(ROUNDING, 16 * rounding(outputs)) * max(abs(whole), abs(mean)):
            raise UnsupportedError(
                f"the loss of the whole batch is {whole:.6g}, and its {micro_batches} micro-batches have {mean:.6g} on "
                "average: accumulate needs a loss that is a mean over the batch (no sum, and no mean over tokens "
                "whose number differs from row to row)"
            )
        apart = apart or _computed_together(work, call, partial(mapped, parts[0]), outputs, rows // micro_batches)
        notes = apart
    else:
        notes = [*apart, "the outputs could not be cut: whether the loss is a mean is told by the loss curves alone"]
    work = work.replace(training=replace(training, micro_batches=micro_batches, batch_dim=batch_dim))
    told = f"each step runs {micro_batches} micro-batches of {rows // micro_batches} rows and adds up their gradients"
    return work, Effect(("training step",), notes=(told, *notes), apart=tuple(apart))


def _computed_together(work: Workload, call: Callable, first: Callable, outputs: Any, rows: int) -> list[str]:
    """What tells that a micro-batch has other outputs than its rows have in the whole batch.

    Raises:
        UnsupportedError: the model does not run on it.
    """
    try:
        args, kwargs = first((work.inputs.args, dict(work.inputs.kwargs)))
        alone = call(*args, **kwargs)
    except Exception as error:  # whatever code raises that gets fewer rows than it counts on
        raise UnsupportedError(
            f"{work.backend.model_name(work)} does not run on a micro-batch, the first {rows} rows of the example "
            f"batch ({type(error).__name__}: {first_line(error)})"
        ) from error
    found, wanted = (_numbers(work, tree) for tree in (alone, first(outputs)))
    if [each.shape for each in found] != [each.shape for each in wanted]:
        return ["outputs of a micro-batch have other shapes than its rows have in the whole batch"]
    pairs = zip(found, wanted, strict=True)
    away = max(
        (float(np.linalg.norm(one - other) / (np.linalg.norm(other) or 1.0)) for one, other in pairs), default=0.0
    )
    if away <= TOGETHER:
        return []
    return [
        f"outputs of a micro-batch are {away:.0%} away from what its rows have in the whole batch: the model computes "
        "rows together, or draws random numbers, so losses differ from the whole batch's"
    ]


def _numbers(work: Workload, tree: Any) -> list[np.ndarray]:
    kinds = ("float", "complex")
    return [work.backend.numpy(leaf) for leaf in _leaves(work, tree) if any(kind in str(leaf.dtype) for kind in kinds)]


def _rows(work: Workload, batch_dim: int, parts: int) -> int:
    inputs = _leaves(work, work.inputs.args, dict(work.inputs.kwargs))
    return even_rows(inputs, batch_dim, parts, _leaves(work, work.training.targets))


def _leaves(work: Workload, *trees: Any) -> list[Any]:
    return list(work.backend.leaves(trees))


def _cut(work: Workload, tree: Any, rows: int, batch_dim: int) -> bool:
    """Whether every tensor with dimensions has the batch's rows in one, and there is such a tensor."""
    shapes = [tuple(leaf.shape) for leaf in _leaves(work, tree) if len(leaf.shape)]
    return bool(shapes) and all(axis_of(shape, rows, batch_dim) is not None for shape in shapes)
