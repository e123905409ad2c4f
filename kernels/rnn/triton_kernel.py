"""The recurrent op in Triton: `forward`, `backward` and `refusal` as `torch_stack` wants them, on a stack of layers.

The product of the inputs with W_ih is one for all steps, before the kernel; those that give the gradients of weights
and inputs come after it: the library's, all of them. No sum is made of atomic operations: results repeat bit for bit.

- `triton_forward.py`, `triton_backward.py`: the kernels; `triton_cells.py`: what they share.
- `triton_launch.py`: how they are launched; `triton_configuration.py`: their tile sizes.
- `triton_compilations.py`: the list that `python -m bench.aot` compiles.

Never run on a GPU so far: numbers are from Triton's interpreter, resources from its compiler.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from perfkit.kernels import _triton
from perfkit.kernels.rnn import triton_configuration
from perfkit.kernels.rnn.problem import GATES, SAVED, Problem

if TYPE_CHECKING:
    from perfkit.kernels._triton import Compilation
    from perfkit.kernels.rnn.triton_configuration import Configuration
    from perfkit.kernels.rnn.triton_launch import Rows

DTYPES = ("float32", "bfloat16", "float16")
Weights = Sequence[Sequence[Tensor]]
Given = Mapping[str, int] | Iterable[tuple[str, int]]


def refusal(problem: Problem) -> str | None:
    """Why the kernel cannot take `problem`; None where it can."""
    if reason := _triton.missing():
        return reason
    if problem.dtype not in DTYPES:
        return f"it takes {', '.join(DTYPES)}, and the tensors are {problem.dtype}"
    if problem.device == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return "it is made for compute capability 8.0 (Ampere) and later"
    return None


def compilations() -> Iterable[Compilation]:
    """Every kernel and configuration that is shipped, for `python -m bench.aot`."""
    from perfkit.kernels.rnn import triton_compilations

    return triton_compilations.compilations()


def candidates(problem: Problem) -> list[tuple[tuple[str, int], ...]]:
    """The configurations that a tuner tries for `problem` on the current device, the one taken without it first."""
    from perfkit.kernels.rnn.triton_launch import device_of, tf32

    x = torch.empty(0, dtype=getattr(torch, problem.dtype), device=problem.device)
    return list(triton_configuration.candidates(problem, device_of(x), tf32(x)))


def forward(
    problem: Problem,
    x: Tensor,
    rows: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    weights: Weights,
    batch_first: bool,
    gates: Tensor | None,
    cells: Tensor | None,
    inner: Tensor | None,
    configuration: Given = (),
) -> tuple[Tensor, Tensor, Tensor | None]:
    """All layers and directions; see `torch_stack` for the arguments.

    Returns:
        y, hn in x's dtype, cn in float32; cn is None but for LSTM.

    Raises:
        InvalidInputError: `configuration` has a name or value that is none.
    """
    from perfkit.kernels.rnn import triton_launch as launch

    chosen = _configure(problem, x, configuration)
    lay = launch.place(problem, rows, x.device)
    zeros = problem.ragged == "lengths"  # nothing is written past a row's length
    features, h0 = problem.hidden * problem.directions, h0.contiguous()
    state = {"LSTM": c0, "GRU": h0}.get(problem.mode)
    state = None if state is None else state.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    y = _room((*x.shape[:-1], features), x, zeros)
    if inner is None and problem.layers > 1:
        inner = _room((problem.layers - 1, lay.count, features), x, zeros)
    elif zeros and inner is not None:
        inner.zero_()
    layer_x, hn = by_rows(x, batch_first), []
    together = problem.layers if chosen.wavefront else problem.directions
    for first in range(0, len(weights), together):
        jobs = slice(first, first + together)
        layer = first // problem.directions
        of_jobs, last = weights[jobs], jobs.stop == len(weights)
        kept = None if gates is None else gates[jobs]
        out, out_first = (y, batch_first) if last else (inner[layer], False)
        more = {}
        if chosen.wavefront:
            # the first layer's are in its inputs, and w_ih may have another size
            bias = torch.stack([_bias(problem, direction, h0) for direction in of_jobs])
            bias[0] = 0
            w_ih = _stacked([direction[0] for direction in (of_jobs[1], *of_jobs[1:])])
            more = {"inner": inner, "w_ih": w_ih, "bias": bias.float()}
        launch.launch_forward(
            problem, chosen.forward, bool(chosen.persistent), lay, out_first,
            _inputs(problem, layer_x, of_jobs[: problem.directions], kept, h0), out, h0[jobs],
            _stacked([direction[1] for direction in of_jobs]),
            state=None if state is None else state[jobs], bias_hn=_hidden_bias(problem, of_jobs, h0),
            gates=kept, cells=cells[jobs] if kept is not None and problem.mode == "LSTM" else None, **more,
        )  # fmt: skip
        if chosen.wavefront:
            hn = [end for below in inner for end in _ends(problem, lay, below, False)]
        hn += _ends(problem, lay, out, out_first)
        layer_x = out
    return y, torch.stack(hn), state if problem.mode == "LSTM" else None


def backward(
    problem: Problem,
    x: Tensor,
    rows: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    weights: Weights,
    batch_first: bool,
    y: Tensor,
    gates: Tensor,
    cells: Tensor | None,
    inner: Tensor | None,
    d_y: Tensor,
    d_hn: Tensor,
    d_cn: Tensor | None,
    configuration: Given = (),
) -> tuple[Tensor, Tensor, Tensor | None, list[tuple[Tensor, Tensor, Tensor, Tensor]]]:
    """The gradients of `forward`; see `torch_stack` for the arguments.

    Returns:
        d_x in x's dtype, d_h0 and d_c0 (None but for LSTM) in float32, and of each layer and direction those of (w_ih,
        w_hh, b_ih, b_hh), the biases' in float32.

    Raises:
        InvalidInputError: `configuration` has a name or value that is none.
    """
    from perfkit.kernels.rnn import triton_launch as launch

    chosen = _configure(problem, x, configuration)
    lay = launch.place(problem, rows, x.device)
    mode, hidden, ways = problem.mode, problem.hidden, problem.directions
    gates, h0 = gates.contiguous(), h0.contiguous()
    d_h = d_hn.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    d_c = None
    if mode == "LSTM":
        d_c = d_cn.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        cells, c0 = cells.contiguous(), c0.to(cells.dtype).contiguous()
    before = launch.before(rows) if problem.ragged == "packed" else None
    gradients = [()] * len(weights)
    d_out, d_first = d_y if d_y.stride(-1) == 1 else d_y.contiguous(), batch_first
    for layer in reversed(range(problem.layers)):
        jobs = slice(layer * ways, (layer + 1) * ways)
        out, out_first = (y, batch_first) if layer == problem.layers - 1 else (inner[layer], False)
        layer_x = by_rows(x, batch_first) if layer == 0 else inner[layer - 1]
        d_gates = _room((ways, lay.count, SAVED[mode], hidden), x, zeros=problem.ragged == "lengths")
        launch.launch_backward(
            problem, chosen.backward, bool(chosen.persistent), lay, d_out, d_first, out if mode == "GRU" else None,
            out_first, gates[jobs], None if d_c is None else cells[jobs], d_gates, d_h[jobs],
            None if d_c is None else d_c[jobs], h0[jobs] if mode == "GRU" else None,
            None if d_c is None else c0[jobs], _stacked([direction[1] for direction in weights[jobs]]),
        )  # fmt: skip
        d_x, out = layer_x.new_zeros(layer_x.shape), by_rows(out, out_first)
        for way in range(ways):
            i, of_way = jobs.start + way, d_gates[way].flatten(1)
            of_x = of_way[:, : GATES[mode] * hidden]
            # a GRU's n of h is not that of x
            of_h = [of_way[:, : 2 * hidden], of_way[:, 3 * hidden :]] if mode == "GRU" else [of_x]
            states = out[:, way * hidden : (way + 1) * hidden]
            d_x.addmm_(of_x, weights[i][0])
            gradients[i] = (
                of_x.t() @ layer_x,
                torch.cat([_recurrent(lay, d, states, h0[i], way, before) for d in of_h]),
                of_x.sum(0, dtype=torch.float32),
                torch.cat([d.sum(0, dtype=torch.float32) for d in of_h]),
            )
        d_out, d_first = d_x, False
    if batch_first and x.dim() == 3:
        d_x = d_x.view(problem.steps, problem.batch, -1).transpose(0, 1)
    return d_x.reshape(x.shape), d_h, d_c, gradients


def by_rows(x: Tensor, batch_first: bool) -> Tensor:
    """(R, features), time-major; a copy only where it must be."""
    return (x.transpose(0, 1) if batch_first and x.dim() == 3 else x).flatten(0, -2)


def _configure(problem: Problem, x: Tensor, given: Given) -> Configuration:
    from perfkit.kernels.rnn.triton_launch import device_of, tf32

    return triton_configuration.configure(problem, device_of(x), tf32(x), dict(given))


def _room(shape: tuple[int, ...], like: Tensor, zeros: bool) -> Tensor:
    return like.new_zeros(shape) if zeros else like.new_empty(shape)


def _stacked(matrices: Sequence[Tensor]) -> Tensor:
    """The matrices of all jobs in one tensor; of one it is no copy."""
    return matrices[0].contiguous()[None] if len(matrices) == 1 else torch.stack(list(matrices))


def _bias(problem: Problem, direction: Sequence[Tensor], like: Tensor) -> Tensor:
    """What is added to W_ih x: both biases, but for a GRU's n only b_ih."""
    if len(direction) == 2:
        return like.new_zeros(GATES[problem.mode] * problem.hidden)
    _, _, b_ih, b_hh = direction
    if problem.mode != "GRU":
        return b_ih + b_hh
    both = 2 * problem.hidden
    return torch.cat([b_ih[:both] + b_hh[:both], b_ih[both:]])


def _hidden_bias(problem: Problem, jobs: Weights, like: Tensor) -> Tensor | None:
    """(J, H), float32: b_hh of a GRU's n; None of other cells."""
    if problem.mode != "GRU":
        return None
    if len(jobs[0]) == 2:
        return like.new_zeros((len(jobs), problem.hidden), dtype=torch.float32)
    return torch.stack([direction[3][2 * problem.hidden :] for direction in jobs]).float()


def _inputs(problem: Problem, layer_x: Tensor, directions: Weights, gates: Tensor | None, like: Tensor) -> Tensor:
    """W_ih x + b of each direction, (D, R, ., H), in the room of `gates` where they are of the same dtype."""
    count, hidden = GATES[problem.mode], problem.hidden
    layer_x = by_rows(layer_x, False)
    if gates is None or gates.dtype != layer_x.dtype:
        gates = layer_x.new_empty((len(directions), layer_x.size(0), count, hidden))
    for room, direction in zip(gates, directions, strict=False):  # a wavefront's first layer alone
        product = room.flatten(1)[:, : count * hidden]
        torch.addmm(_bias(problem, direction, like), layer_x, direction[0].t(), out=product)
    return gates


def _ends(problem: Problem, lay: Rows, out: Tensor, batch_first: bool) -> list[Tensor]:
    """h after the last step of each row, in the reverse direction that after its first one."""
    first, last = torch.arange(problem.batch, device=out.device), lay.last
    if batch_first and out.dim() == 3:
        first, last = first * problem.steps, first * problem.steps + last // problem.batch
    rows = out.flatten(0, -2)
    ends = [rows[last, : problem.hidden]]
    return ends if problem.directions == 1 else [*ends, rows[first, problem.hidden :]]


def _recurrent(lay: Rows, d: Tensor, states: Tensor, h0: Tensor, way: int, before: Tensor | None) -> Tensor:
    """The gradient of rows of W_hh: of each row of `d` times the state before it.

    Args:
        d: (R, .), gradients of pre-activations, zero where a row has no step.
        states: (R, H), what the direction `way` put out.
        before: (2, R), by direction, the row of the step before in packed data; None in padded data.
    """
    batch = h0.size(0)
    fresh = slice(batch) if way == 0 else lay.last  # rows at their first step
    if before is not None:
        previous = states[before[way].to(d.device)]
        previous[fresh] = h0
        return d.t() @ previous
    found = d[fresh].t() @ h0
    if len(d) > batch:
        later, earlier = (d[batch:], states[:-batch]) if way == 0 else (d[:-batch], states[batch:])
        found.addmm_(later.t(), earlier)
    return found
