"""Functions that read single steps of single rows of a layer's output that waits (`torch_deferred.py`).

Each takes a function's arguments and returns what that would, or None where it is better computed of the whole output:
other indices, nearly all steps, or what torch has something to say about.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from perfkit.backends.torch_deferred import Deferred
    from perfkit.backends.torch_waiting import Waiting

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8)


class Cells(NamedTuple):
    """Single steps of single rows, one after the other, of a tensor of them of some shape; none is negative."""

    shape: tuple[int, ...]
    rows: list[int]
    steps: list[int]


def indexed(y: Deferred, index: Any) -> Tensor | None:
    """`y[rows, steps]`, also with a full slice of features behind."""
    call = y.call
    if not isinstance(index, tuple) or len(index) not in (2, 3):
        return None
    if len(index) == 3 and not (index[2] is Ellipsis or (isinstance(index[2], slice) and index[2] == slice(None))):
        return None
    rows, steps = _integers(index[call.batch]), _integers(index[call.time])
    if rows is None or steps is None:
        return None
    try:
        rows, steps = torch.broadcast_tensors(rows, steps.to(rows.device))
    except RuntimeError:
        return None
    of_rows, of_steps = _from_ends(rows, call.rows), _from_ends(steps, call.steps)
    return None if of_rows is None or of_steps is None else call.read(Cells(tuple(rows.shape), of_rows, of_steps))


def gathered(input: Deferred, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Tensor | None:
    """`input.gather(dim, index)`, dim that of time."""
    call = input.call
    if sparse_grad or not _along(call, dim, index) or index.size(2) > input.size(2):
        return None
    if index.size(2) == 1 or index.stride(2) == 0:  # one step for all features
        cells = _cells(call, index[..., 0])
        found = None if cells is None else call.read(cells)
        return None if found is None else found[..., : index.size(2)]
    cells = _cells(call, index.amax(2)) if int(index.min()) >= 0 else None
    padded = None if cells is None else call.padded(cells)
    return None if padded is None else torch.gather(padded, dim, index)


def taken_along(input: Deferred, indices: Tensor, dim: int | None = None) -> Tensor | None:
    """`torch.take_along_dim(input, indices, dim)`, dim that of time."""
    call = input.call
    if dim is None or not _along(call, dim, indices) or indices.size(2) != 1 or indices.size(call.batch) != call.rows:
        return None
    cells = _cells(call, indices[..., 0] % call.steps)  # it counts on from the beginning, as torch does here
    return None if cells is None else call.read(cells)


def dropped(input: Deferred, p: float = 0.5, training: bool = True, **_inplace: bool) -> Tensor | None:
    """Dropout that does nothing."""
    return None if training and p else input


READERS: dict[Callable, Callable[..., Tensor | None]] = {
    Tensor.__getitem__: indexed,
    Tensor.gather: gathered,
    torch.gather: gathered,
    Tensor.take_along_dim: taken_along,
    torch.take_along_dim: taken_along,
    functional.dropout: dropped,
}


def _along(call: Waiting, dim: int, index: Any) -> bool:
    """Whether `index` is of steps for each row."""
    if type(index) is not Tensor or index.dtype not in _INTEGERS or index.dim() != 3 or not index.numel():
        return False
    return dim % 3 == call.time and index.size(call.batch) <= call.rows


def _cells(call: Waiting, steps: Tensor) -> Cells | None:
    """The steps (K, B), or (B, K), of each row; None where one is not there."""
    of_steps = steps.flatten().tolist()
    if min(of_steps) < 0 or max(of_steps) >= call.steps:
        return None
    rows = torch.arange(steps.size(call.batch)).unsqueeze(1 - call.batch).expand(steps.shape)
    return Cells(tuple(steps.shape), rows.flatten().tolist(), of_steps)


def _integers(index: Any) -> Tensor | None:
    """An index as a tensor, where it is of whole numbers."""
    if isinstance(index, (list, range)):
        index = torch.tensor(index) if all(type(each) is int for each in index) else None
    return index if type(index) is Tensor and index.dtype in _INTEGERS and index.numel() and index.dim() else None


def _from_ends(index: Tensor, size: int) -> list[int] | None:
    """An index as a list, the negative ones counted from behind; None where one is not there."""
    numbers = index.flatten().tolist()
    low, high = min(numbers), max(numbers)
    if low < -size or high >= size:
        return None
    return [number % size for number in numbers] if low < 0 else numbers
