"""Cutting a batch by rows, whatever its tensors or arrays are nested in."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from perfkit._errors import InvalidInputError


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


def even_rows(leaves: Iterable[Any], batch_dim: int, parts: int) -> int:
    """Rows of a batch: the length of its first tensor along `batch_dim`.

    Raises:
        InvalidInputError: they cannot be cut into `parts` of the same length.
    """
    first = next((leaf for leaf in leaves if hasattr(leaf, "shape")), None)
    if first is None or len(first.shape) <= batch_dim:
        raise InvalidInputError(f"the first input has no dimension {batch_dim} to cut: set batch_dim=")
    rows = int(first.shape[batch_dim])
    if rows % parts:
        raise InvalidInputError(
            f"a batch of {rows} rows (dimension {batch_dim}) cannot be cut into {parts} micro-batches of one size: "
            "drop the last batch of an epoch where it is smaller, or fill it up"
        )
    return rows
