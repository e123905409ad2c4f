"""How a reshape carries labels: in runs of dimensions that hold the same elements before and after."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from perfkit.pruning.jax_labels import Axes, Labels, given, given_axes


def reshaped(labels: Labels, axes: Axes, before: Sequence[int], after: Sequence[int]) -> Axes:
    """The axes of a value of the shape `before`, none of it 0, in the shape `after`."""
    result: Axes = [None] * len(after)
    for sources, targets in _blocks(before, after):
        flat = _flattened(labels, [axes[dim] for dim in sources], [before[dim] for dim in sources])
        for dim, axis in zip(targets, _split_up(labels, flat, [after[dim] for dim in targets]), strict=True):
            result[dim] = axis
    return result


def _blocks(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Runs of dimensions before and after a reshape that hold the same elements; dimensions of size 1 left out."""
    runs, sources, targets = [], [], []
    left, right = ([dim for dim, size in enumerate(shape) if size != 1] for shape in (before, after))
    while left or right:
        behind = math.prod(before[dim] for dim in sources) <= math.prod(after[dim] for dim in targets)
        sources, targets = (
            ([*sources, left.pop(0)], targets)
            if left and (behind or not right)
            else (sources, [*targets, right.pop(0)])
        )
        if math.prod(before[dim] for dim in sources) == math.prod(after[dim] for dim in targets):
            runs.append((sources, targets))
            sources, targets = [], []
    return runs


def _flattened(labels: Labels, axes: Axes, sizes: Sequence[int]) -> np.ndarray | None:
    """One dimension out of several: at most one of them may consist of units."""
    if all(axis is None for axis in axes):
        return None
    alive = [dim for dim, axis in enumerate(axes) if labels.live(axis).any()]
    if len(alive) > 1:
        labels.freeze_all([axes], "it is flattened together with other units")
    if len(alive) != 1:
        return axes[0] if len(axes) == 1 else given(math.prod(sizes))
    (dim,) = alive
    shape = [size if at == dim else 1 for at, size in enumerate(sizes)]
    return np.broadcast_to(axes[dim].reshape(shape), sizes).reshape(-1)


def _split_up(labels: Labels, flat: np.ndarray | None, sizes: Sequence[int]) -> Axes:
    """Several dimensions out of one: all units must lie along one of them."""
    if flat is None or len(sizes) == 1:
        return [flat] * len(sizes)
    if labels.live(flat).any():
        grid = labels.roots(flat).reshape(sizes)
        for dim in range(len(sizes)):
            line = np.moveaxis(grid, dim, -1).reshape(-1, sizes[dim])
            if (line == line[0]).all():
                return [line[0] if at == dim else given(size) for at, size in enumerate(sizes)]
        labels.freeze(flat, "it is reshaped into groups")
    return given_axes(sizes)
