"""Cutting a batch by rows, whatever its tensors or arrays are nested in."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

from perfkit._errors import InvalidInputError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Samples:
    """How many samples a call is of, and along which dimension of the inputs they lie.

    Args:
        assumed: that this dimension is the batch is what is usual, and nothing in the model tells it.
    """

    count: int
    dim: int
    assumed: bool = False


class Mixing(Enum):
    """What becomes of the entries along a dimension of an input."""

    APART = "none has to do with another"
    IN_ORDER = "later ones depend on earlier ones, or the other way round"
    ANY = "they depend on each other"


def samples_of(
    inputs: Iterable[Shape],
    outputs: Iterable[Shape],
    sequences: Callable[[], set[tuple[int, int]]],
    mixing: Callable[[int, int], Mixing | None] | None = None,
) -> Samples | None:
    """How many samples a call is of; None where that cannot be told.

    Along an input's second dimension, where the model reads it as sequences with time first, else along its first one;
    outputs must have as many. A sequence alone is no batch.

    Args:
        inputs, outputs: their shapes; targets are among the outputs.
        sequences: tells (steps, rows) of what the model reads step by step, rows being 0 without a batch; asked where
            it matters.
        mixing: tells what becomes of the entries of an input along a dimension, by the numbers of both, or None where
            that is not known; asked where shapes and sequences leave two dimensions open.
    """
    outputs = list(outputs)
    firsts, leading = {shape[0] for shape in outputs if shape}, {size for shape in outputs for size in shape[:2]}
    for number, shape in enumerate(inputs):
        open_ = len(shape) > 1 and shape[1] in leading and shape[0] != shape[1]
        if open_ and _time_first(shape, sequences()):
            return Samples(shape[1], 1)
        if shape and shape[0] in firsts:
            if (shape[0], 0) in sequences():
                return None
            if open_ and mixing is not None and (shape[1], shape[0]) not in sequences():
                return _by_mixing(shape, partial(mixing, number))
            return Samples(shape[0], 0)
    return None


def _by_mixing(shape: Shape, mixing: Callable[[int], Mixing | None]) -> Samples | None:
    """Which of the first two dimensions is the batch: the one whose entries have nothing to do with each other."""
    first = mixing(0)
    if first in (Mixing.APART, None):
        return Samples(shape[0], 0, assumed=first is None)
    if mixing(1) is Mixing.APART:
        return Samples(shape[1], 1)
    return None if first is Mixing.IN_ORDER else Samples(shape[0], 0, assumed=True)


def _time_first(shape: Shape, sequences: set[tuple[int, int]]) -> bool:
    """Whether one of the sequences is this input, or a part of it in time, such as the one step that a cell reads."""
    return any(rows == shape[1] and steps <= shape[0] and (steps > 1 or len(shape) > 2) for steps, rows in sequences)


def other_dim(samples: Samples | None, batch_dim: int) -> str | None:
    """Why `batch_dim` is not the dimension to cut or to repeat; None where nothing is known against it."""
    if samples is None or samples.assumed or samples.dim <= batch_dim:
        return None
    return (
        f"the batch is the {samples.count} rows along dimension {samples.dim} of the inputs, and not dimension "
        f"{batch_dim}: set batch_dim={samples.dim}"
    )


def axis_of(shape: tuple[int, ...], rows: int, batch_dim: int) -> int | None:
    """The dimension of a tensor to cut: `batch_dim`, else the first one, where it has `rows` there."""
    for dim in (batch_dim, 0):
        if len(shape) > dim and shape[dim] == rows:
            return dim
    return None


def sliced(rows: int, parts: int, index: int, batch_dim: int) -> Callable[[Any], Any]:
    """A function that takes part number `index` of `parts` out of a tensor of a batch of `rows`."""
    each = rows // parts

    def of(tensor: Any) -> Any:
        dim = axis_of(tuple(tensor.shape), rows, batch_dim)
        if dim is None:
            return tensor
        return tensor[(*(slice(None),) * dim, slice(index * each, (index + 1) * each))]

    return of


def rows_of(leaves: Iterable[Any], batch_dim: int, targets: Iterable[Any] = ()) -> int | None:
    """Rows of a batch: the length of its first tensor along `batch_dim`; None where no tensor has that dimension.

    Keys of random numbers, masks and tables may come before the data: the first one of a length that a target has, too,
    is taken, where there is one.
    """
    lengths = [int(leaf.shape[batch_dim]) for leaf in leaves if hasattr(leaf, "shape") and len(leaf.shape) > batch_dim]
    shapes = [tuple(leaf.shape) for leaf in targets if hasattr(leaf, "shape")]
    shared = (rows for rows in lengths if any(axis_of(shape, rows, batch_dim) is not None for shape in shapes))
    return next(shared, next(iter(lengths), None))


def even_rows(leaves: Iterable[Any], batch_dim: int, parts: int, targets: Iterable[Any] = ()) -> int:
    """See `rows_of`.

    Raises:
        InvalidInputError: they cannot be cut into `parts` of the same length.
    """
    rows = rows_of(leaves, batch_dim, targets)
    if rows is None:
        raise InvalidInputError(f"no input has a dimension {batch_dim} to cut: set batch_dim=")
    if rows % parts:
        raise InvalidInputError(
            f"a batch of {rows} rows (dimension {batch_dim}) cannot be cut into {parts} micro-batches of one size: "
            "drop the last batch of an epoch where it is smaller, or fill it up"
        )
    return rows
