"""Which part of a batch is whose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from perfkit._batch import other_dim, rows_of, sliced
from perfkit._chain import Chain
from perfkit._recipe import ParallelRecipe
from perfkit._workload import Inputs, Workload
from perfkit.parallel import world
from perfkit.parallel.layout import layout


def indivisible(work: Workload, batch_dim: int) -> str | None:
    """Why the example batch cannot be shared out evenly along the "data" axis; None where it can."""
    if work.inputs is None or work.layout is None:
        return None
    parts = work.layout.size("data")
    if reason := other_dim(work.samples, batch_dim):
        return reason
    rows = length(work, batch_dim)
    if rows is None:
        return f"no input has a dimension {batch_dim} to share out: set batch_dim="
    if rows % parts:
        return f"a batch of {rows} rows (dimension {batch_dim}) cannot be shared by {parts} devices evenly"
    return None


def length(work: Workload, batch_dim: int) -> int | None:
    """Rows of the example batch; None where no input has a dimension `batch_dim`. See `rows_of`."""
    leaves, training = work.backend.leaves, work.training
    targets = () if training is None else leaves(training.targets)
    return rows_of(leaves((work.inputs.args, dict(work.inputs.kwargs))), batch_dim, targets)


def part(work: Workload, batch_dim: int, index: int, mapped: Callable[[Callable[[Any], Any], Any], Any]) -> Workload:
    """The workload on one part of its example batch.

    Args:
        index: which part.
        mapped: `mapped(function, tree)`: the tree with the function of each tensor.
    """
    if work.inputs is None:
        return work
    rows, parts = length(work, batch_dim), work.layout.size("data")
    of = sliced(rows, parts, index, batch_dim)
    args, kwargs = mapped(of, (work.inputs.args, dict(work.inputs.kwargs)))
    from dataclasses import replace

    training = replace(work.training, targets=mapped(of, work.training.targets))
    return work.replace(inputs=Inputs(args, kwargs), training=training)


def dealer(chain: Chain, framework: str) -> Callable[[tuple[tuple, Any]], tuple[tuple, Any]]:
    """What makes of a whole batch, (inputs, targets), the one that this process' `train_step` takes.

    In torch that is the process' part of it where the chain shares batches out; in JAX, and elsewhere, the whole.
    """
    sharing = [recipe for recipe in chain if isinstance(recipe, ParallelRecipe) and recipe.axis == "data"]
    found = world.of(framework)
    mesh = layout(chain, found)
    if framework != "torch" or not sharing or mesh is None:
        return lambda batch: batch
    from perfkit.backends.torch_surgery import map_tensors

    batch_dim, place, parts = getattr(sharing[0], "batch_dim", 0), mesh.place("data", found.rank), mesh.size("data")

    def deal(batch: tuple[tuple, Any]) -> tuple[tuple, Any]:
        rows = batch[0][0].shape[batch_dim]
        return map_tensors(sliced(rows, parts, place, batch_dim), batch)

    return deal
