"""What sending takes between the processes of a torch.distributed group."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from perfkit.parallel.links import Measured

SIZES = (4, 1 << 14, 1 << 18, 1 << 21, 1 << 24)
"""Bytes that are sent."""

ROWS = 64
"""Of a layer's output, when its columns are gathered."""


def operations(device: str) -> dict[tuple[str, int], Callable[[], Any]]:
    """The operations between all processes, by kind and size; each returns when it is done."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    found: dict[tuple[str, int], Callable[[], Any]] = {}
    for size in SIZES:
        values = max(size // 4, ranks)
        whole = torch.zeros(values // ranks * ranks, device=device)
        part = torch.zeros(values // ranks, device=device)
        alone = torch.zeros(max(size // 4, 1), device=device)
        found["all_reduce", size] = partial(dist.all_reduce, alone)
        found["average", size] = partial(_average, torch.zeros_like(alone), alone, ranks)
        found["all_gather", size] = partial(_ALL_GATHER, whole, part)
        found["gather_inside", size] = partial(_gather_inside, whole, part, ranks)
        found["reduce_scatter", size] = partial(_REDUCE_SCATTER, part, whole)
        found["send", size] = partial(_exchange, alone, torch.zeros_like(alone), rank, ranks)
    return found


_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _average(gradient: torch.Tensor, bucket: torch.Tensor, ranks: int) -> None:
    """As DistributedDataParallel does it: each gradient is new in each step, and goes into its bucket first."""
    torch.mul(gradient, 1 / ranks, out=bucket)
    dist.all_reduce(bucket)


def _gather_inside(whole: torch.Tensor, part: torch.Tensor, ranks: int) -> None:
    """As a layer split by columns does it: gather, and put the parts of each row side by side."""
    _ALL_GATHER(whole, part)
    rows = math.gcd(part.numel(), ROWS)
    torch.cat(whole.view(ranks, rows, -1).unbind(0), dim=1)


def _exchange(outgoing: torch.Tensor, incoming: torch.Tensor, rank: int, ranks: int) -> None:
    """As a pipeline's neighbours do it, both ways at once; with an odd number of processes the last one has nobody.

    A message that the other end sits and waits for would take longer by as much as waking it does.
    """
    other = rank ^ 1
    if other >= ranks:
        return
    both = [dist.P2POp(dist.isend, outgoing, other), dist.P2POp(dist.irecv, incoming, other)]
    for work in dist.batch_isend_irecv(both):
        work.wait()


def link_of(times: Mapping[Any, float]) -> Measured:
    """The link that times of `operations` show."""
    points: dict[str, list[tuple[float, float]]] = {}
    for (kind, size), seconds in times.items():
        points.setdefault(kind, []).append((size, seconds / (2 if kind == "send" else 1)))
    return Measured(dist.get_world_size(), points)
