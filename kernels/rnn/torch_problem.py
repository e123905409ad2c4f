"""What the tensors of a call must be: checked once for each kind of call, before any kernel sees a pointer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from perfkit._errors import InvalidInputError
from perfkit.kernels.rnn.problem import GATES, Problem

DTYPES = {getattr(torch, name): name for name in ("float32", "bfloat16", "float16", "float64")}


def problem_of(
    x: Tensor,
    rows: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    mode: str,
    bias: bool,
    bidirectional: bool,
    batch_first: bool,
    needs_grad: bool,
) -> Problem:
    """The problem that these arguments of `torch.ops.perfkit.rnn` are; states may be None, for zeros.

    Raises:
        InvalidInputError: they do not fit together.
    """
    if mode not in GATES:
        raise InvalidInputError(f"mode is {mode!r}: expected one of {', '.join(GATES)}")
    packed = rows is not None and x.dim() == 2
    if x.dim() != 3 and not packed:
        layout = "(batch, time, features)" if batch_first else "(time, batch, features)"
        raise InvalidInputError(f"x has shape {list(x.shape)}: expected {layout}; a single sequence is a batch of 1")
    if x.dtype not in DTYPES or x.layout != torch.strided:
        raise InvalidInputError(f"x is {x.dtype}, {x.layout}: expected a dense tensor of {', '.join(DTYPES.values())}")
    each, directions = 4 if bias else 2, 2 if bidirectional else 1
    layers, rest = divmod(len(weights), each * directions)
    if rest or not layers:
        raise InvalidInputError(
            f"{len(weights) / each:g} groups of weights: expected one for each layer"
            f"{' and direction, forward and reverse in turn' if bidirectional else ''}, at least one layer"
        )
    if rows is not None and (rows.dim() != 1 or rows.dtype != torch.int64 or rows.device.type != "cpu"):
        kind = "batch_sizes" if packed else "lengths"
        raise InvalidInputError(f"{kind} are {_told(rows)}: expected one dimension of torch.int64 on cpu")
    if packed:
        steps, batch = rows.size(0), h0.size(1) if h0 is not None and h0.dim() == 3 else int(rows[0])
    else:
        batch, steps = (x.size(0), x.size(1)) if batch_first else (x.size(1), x.size(0))
        if rows is not None and rows.size(0) != batch:
            raise InvalidInputError(f"{rows.size(0)} lengths for a batch of {batch}: expected one for each row")
    hidden = weights[1].size(-1) if weights[1].dim() == 2 else 0
    problem = Problem(
        framework="torch",
        device=x.device.type,
        dtype=DTYPES[x.dtype],
        mode=mode,
        steps=steps,
        batch=batch,
        inputs=x.size(-1),
        hidden=hidden,
        layers=layers,
        directions=directions,
        ragged="packed" if packed else "no" if rows is None else "lengths",
        needs_grad=needs_grad,
    )
    _check_weights(problem, x, weights, each)
    states = (layers * directions, batch, hidden)
    for name, state in (("h0", h0), ("c0", c0)):
        if state is not None and (state.shape != states or not _alike(state, x)):
            raise InvalidInputError(
                f"{name} is {_told(state)}: expected {_expected(states, x)}, (layers * directions, batch, hidden)"
            )
    if mode != "LSTM" and c0 is not None:
        raise InvalidInputError(f"c0 was given to {mode}: only LSTM has cells")
    return problem


def check_rows(problem: Problem, rows: Tensor | None, count: int) -> None:
    """Refuse lengths, or batch sizes, that lead outside of the `count` rows of x: at every call, as they are numbers.

    Raises:
        InvalidInputError: lengths not in 1..T; batch sizes that rise, or whose sum is not the number of rows.
    """
    if problem.ragged == "lengths":
        shortest, longest = (int(length) for length in rows.aminmax())
        if shortest < 1 or longest > problem.steps:
            raise InvalidInputError(
                f"lengths from {shortest} to {longest}: expected 1 to {problem.steps}, the number of steps; "
                "leave out rows without any"
            )
    elif problem.ragged == "packed":
        sizes = rows.tolist()
        falling = all(sizes[t] >= sizes[t + 1] for t in range(len(sizes) - 1))
        if not falling or sizes[-1] < 1 or sizes[0] != problem.batch or sum(sizes) != count:
            told = sizes if len(sizes) < 9 else [*sizes[:4], "...", *sizes[-4:]]
            raise InvalidInputError(
                f"batch_sizes are {told}: expected to begin with the batch of {problem.batch}, never to rise, to end "
                f"with 1 or more, and to sum to x's {count} rows; torch.nn.utils.rnn.pack_padded_sequence makes such"
            )


def _check_weights(problem: Problem, x: Tensor, weights: Sequence[Tensor], each: int) -> None:
    channels, hidden = GATES[problem.mode] * problem.hidden, problem.hidden
    for i, weight in enumerate(weights):
        group, kind = divmod(i, each)
        first = group < problem.directions
        inputs = problem.inputs if first else hidden * problem.directions
        expected = ((channels, inputs), (channels, hidden), (channels,), (channels,))[kind]
        if weight.shape != expected or not _alike(weight, x):
            name = ("w_ih", "w_hh", "b_ih", "b_hh")[kind]
            layer, way = divmod(group, problem.directions)
            raise InvalidInputError(
                f"{name} of layer {layer}{', reverse' if way else ''} is {_told(weight)}: expected "
                f"{_expected(expected, x)} for {problem.mode}, {inputs} inputs and {hidden} hidden units"
            )


def _alike(tensor: Tensor, x: Tensor) -> bool:
    return tensor.dtype == x.dtype and tensor.device == x.device and tensor.layout == torch.strided


def _told(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"


def _expected(shape: tuple[int, ...], x: Tensor) -> str:
    return f"{x.dtype} {list(shape)} on {x.device}, as x,"
