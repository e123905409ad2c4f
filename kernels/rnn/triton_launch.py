"""How the recurrent Triton kernels are launched on torch tensors: where rows are, and which spans of steps."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from perfkit.kernels import _triton
from perfkit.kernels.rnn.problem import Problem
from perfkit.kernels.rnn.triton_backward import backward_span
from perfkit.kernels.rnn.triton_configuration import Device, Tiles
from perfkit.kernels.rnn.triton_forward import forward_span

MOST_TILES = 65535
"""How many programs there may be on a grid's last axis."""


class Rows(NamedTuple):
    """Where the rows of each step are, on the device.

    Args:
        count: R, rows of all steps.
        lengths: (B,), int32, how many steps each row has; None where all have all.
        starts: (T,), int64, the first row of each step of packed data; None where steps have B rows each.
        last: (B,), int64, the row of each batch row's last step.
    """

    count: int
    lengths: Tensor | None
    starts: Tensor | None
    last: Tensor


class Span(NamedTuple):
    """One launch: `tiles` tiles of batch rows from `first_tile` on, steps [first, last), waiting by counters or not."""

    first_tile: int
    tiles: int
    first: int
    last: int
    counted: bool


def device_of(x: Tensor) -> Device:
    """The GPU that `x` is on; in the interpreter one like an H100."""
    return _device(x.get_device()) if x.is_cuda else Device()


@functools.cache
def _device(index: int) -> Device:
    about = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return Device(about.multi_processor_count, 65536, exact_float32=True)
    return Device(about.multi_processor_count, about.shared_memory_per_block_optin)


def tf32(x: Tensor) -> bool:
    """Whether torch's settings let products round float32 to TF32 first: by default they do not."""
    return x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def place(problem: Problem, rows: Tensor | None, device: torch.device) -> Rows:
    """Where the rows of each step are; `rows` as in `torch_stack`."""
    steps, batch = problem.steps, problem.batch
    b = torch.arange(batch, device=device if rows is None else "cpu")
    if rows is None:
        return Rows(steps * batch, None, None, (steps - 1) * batch + b)
    rows = rows.cpu()
    if problem.ragged == "lengths":
        last = (rows - 1) * batch + b
        return Rows(steps * batch, rows.to(device, torch.int32), None, last.to(device))
    lengths, starts = (rows > b[:, None]).sum(1), rows.cumsum(0) - rows
    last = starts[lengths - 1] + b
    return Rows(int(rows.sum()), lengths.to(device, torch.int32), starts.to(device), last.to(device))


def before(batch_sizes: Tensor) -> Tensor:
    """(2, P): of each packed row, that of the step before and that of the one after; itself where there is none."""
    steps = batch_sizes.size(0)
    starts = batch_sizes.cumsum(0) - batch_sizes
    t = torch.repeat_interleave(torch.arange(steps), batch_sizes)
    itself = torch.arange(t.size(0))
    b = itself - starts[t]
    earlier, later = (t - 1).clamp_min(0), (t + 1).clamp_max(steps - 1)
    return torch.stack([
        torch.where(t > 0, starts[earlier] + b, itself),
        torch.where((t + 1 < steps) & (b < batch_sizes[later]), starts[later] + b, itself),
    ])  # fmt: skip


def strides(x: Tensor, batch_first: bool, batch: int) -> tuple[int, int]:
    """From step to step and from row to row, in elements; of (T, B, .), (B, T, .), or (R, .) time-major."""
    if x.dim() == 2:
        return batch * x.stride(0), x.stride(0)
    return (x.stride(1), x.stride(0)) if batch_first else (x.stride(0), x.stride(1))


def spans(
    parts: int, jobs: int, tiles: int, steps: int, waits: bool, persistent: bool, device: Device
) -> Iterator[Span]:
    """The launches, in order.

    Args:
        parts, jobs, tiles: of hidden units, of directions or layers, of batch rows: the grid.
        steps: of the whole pass.
        waits: programs need what others computed at the step before.
        persistent: they may wait for each other within a launch, if all of them run at once. Tiles of rows do not, so
            where there are too many of them, some come after the others.
    """
    at_once = device.processors // (parts * jobs)
    if not waits:
        for first in range(0, tiles, MOST_TILES):
            yield Span(first, min(MOST_TILES, tiles - first), 0, steps, False)
    elif persistent and at_once:
        for first in range(0, tiles, at_once):
            yield Span(first, min(at_once, tiles - first), 0, steps, True)
    else:
        for step in range(steps):
            for first in range(0, tiles, MOST_TILES):
                yield Span(first, min(MOST_TILES, tiles - first), step, step + 1, False)


def launch_forward(
    problem: Problem,
    tiles: Tiles,
    persistent: bool,
    lay: Rows,
    batch_first: bool,
    inputs: Tensor,
    y: Tensor,
    h0: Tensor,
    w_hh: Tensor,
    *,
    state: Tensor | None,
    bias_hn: Tensor | None,
    gates: Tensor | None,
    cells: Tensor | None,
    inner: Tensor | None = None,
    w_ih: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    """Run one layer's directions, or with `inner` all layers as a wavefront; `forward_span` has the arguments."""
    jobs, wavefront = w_hh.size(0), inner is not None
    parts, all_tiles = -(-problem.hidden // tiles.block_h), -(-problem.batch // tiles.block_b)
    steps = problem.steps + (jobs - 1 if wavefront else 0)
    persistent = persistent and (parts == 1 or not _triton.interpreted())  # programs in order can wait for no later one
    waits = wavefront or parts > 1
    with _current(y):
        for span in spans(parts, jobs, all_tiles, steps, waits, persistent, device_of(y)):
            counters = _counters(span, jobs, all_tiles, problem.steps, y)
            forward_span[parts, jobs, span.tiles](
                inputs, y, inner, gates, cells, state, h0, w_hh, w_ih, bias, bias_hn, lay.lengths, lay.starts, counters,
                span.first_tile, all_tiles, span.first, span.last, problem.steps, problem.batch, lay.count,
                inputs.stride(-3), *strides(y, batch_first, problem.batch),
                JOBS=jobs, WAVEFRONT=wavefront, **_options(problem, tiles, span, y, backward=False),
            )  # fmt: skip


def launch_backward(
    problem: Problem,
    tiles: Tiles,
    persistent: bool,
    lay: Rows,
    d_y: Tensor,
    d_first: bool,
    y: Tensor | None,
    y_first: bool,
    gates: Tensor,
    cells: Tensor | None,
    d_gates: Tensor,
    d_h: Tensor,
    d_c: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    w_hh: Tensor,
) -> None:
    """Run one layer's directions; `backward_span` has the arguments. `d_first`, `y_first`: those are (B, T, .)."""
    jobs, parts = w_hh.size(0), -(-problem.hidden // tiles.block_h)
    all_tiles = -(-problem.batch // tiles.block_b)
    persistent = persistent and not _triton.interpreted()
    steps = problem.steps + (0 if tiles.alone(problem.hidden) else 1)
    with _current(d_y):
        for span in spans(parts, jobs, all_tiles, steps, parts > 1, persistent, device_of(d_y)):
            counters = _counters(span, jobs, all_tiles, problem.steps + 1, d_y)
            of_y = (0, 0) if y is None else strides(y, y_first, problem.batch)
            backward_span[parts, jobs, span.tiles](
                d_y, gates, cells, y, d_gates, d_h, d_c, h0, c0, w_hh, lay.lengths, lay.starts, counters,
                span.first_tile, all_tiles, span.first, span.last, problem.steps, problem.batch, lay.count,
                *of_y, *strides(d_y, d_first, problem.batch),
                **_options(problem, tiles, span, d_gates, backward=True),
            )  # fmt: skip


def _counters(span: Span, jobs: int, tiles: int, steps: int, like: Tensor) -> Tensor | None:
    return like.new_zeros((jobs, tiles, steps), dtype=torch.int32) if span.counted else None


def _options(problem: Problem, tiles: Tiles, span: Span, like: Tensor, backward: bool) -> dict[str, Any]:
    """What is constant while a kernel is compiled."""
    constants = tiles.constants(problem, span.counted, tf32(like), _triton.interpreted())
    # a grid of more programs than run at once is refused then, instead of waiting for ever
    cooperative = {"launch_cooperative_grid": True} if span.counted else {}
    return constants | tiles.options(problem.mode, backward, amd=torch.version.hip is not None) | cooperative


def _current(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
