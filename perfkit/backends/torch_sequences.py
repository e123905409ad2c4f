"""Which dimensions of a torch model's inputs are time and batch: layers with time first tell."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence


@contextmanager
def sequences_seen(model: nn.Module) -> Iterator[set[tuple[int, int]]]:
    """Within it (steps, rows) are collected of what recurrent layers, and others with time first, are given."""
    found: set[tuple[int, int]] = set()

    def see(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if seen := _sequence(module, next(iter((*args, *kwargs.values())), None)):
            found.add(seen)

    sequential = [
        part
        for part in model.modules()
        if isinstance(part, (nn.RNNBase, nn.RNNCellBase)) or getattr(part, "batch_first", True) is False
    ]
    handles = [part.register_forward_pre_hook(see, with_kwargs=True) for part in sequential]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _sequence(module: nn.Module, x: Any) -> tuple[int, int] | None:
    if isinstance(x, PackedSequence):
        return len(x.batch_sizes), int(x.batch_sizes[0])
    if not isinstance(x, torch.Tensor):
        return None
    if isinstance(module, nn.RNNCellBase):
        return (1, x.shape[0]) if x.dim() == 2 else None
    if x.dim() == 2:
        return x.shape[0], 0
    return (x.shape[0], x.shape[1]) if x.dim() == 3 and not module.batch_first else None
