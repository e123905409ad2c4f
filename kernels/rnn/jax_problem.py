"""What the arrays of a call must be in JAX: checked when it is traced, before any kernel sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from perfkit._errors import InvalidInputError
from perfkit.kernels._jax import device_of
from perfkit.kernels.rnn.problem import GATES, Problem

DTYPES = ("float32", "bfloat16", "float16", "float64")
PARTS = ("w_ih", "w_hh", "b_ih", "b_hh")


def problem_of(
    x: Array,
    mode: str,
    weights: Sequence[Sequence[Array]],
    h0: Array | None,
    c0: Array | None,
    lengths: Any,
    batch_first: bool,
    bidirectional: bool,
    training: bool,
) -> Problem:
    """The problem that these arguments of `perfkit.kernels.rnn.lstm` are.

    Raises:
        InvalidInputError: they do not fit together.
    """
    if x.ndim != 3:
        layout = "(batch, time, features)" if batch_first else "(time, batch, features)"
        raise InvalidInputError(f"x has shape {list(x.shape)}: expected {layout}; a single sequence is a batch of 1")
    if x.dtype.name not in DTYPES:
        raise InvalidInputError(f"x is {x.dtype}: expected {', '.join(DTYPES)}")
    directions = 2 if bidirectional else 1
    layers, rest = divmod(len(weights), directions)
    if rest or not layers:
        each = "layer and direction, forward and reverse in turn" if bidirectional else "layer"
        raise InvalidInputError(f"{len(weights)} groups of weights: expected one for each {each}, at least one layer")
    counts = {len(group) for group in weights}
    if counts not in ({2}, {4}):
        raise InvalidInputError(
            f"groups of {' and '.join(map(str, sorted(counts)))} weights: expected (w_ih, w_hh), or "
            "(w_ih, w_hh, b_ih, b_hh), for each layer and direction, all alike"
        )
    steps, batch = (x.shape[1], x.shape[0]) if batch_first else x.shape[:2]
    w_hh = weights[0][1]
    problem = Problem(
        framework="jax",
        device=device_of(x),
        dtype=x.dtype.name,
        mode=mode,
        steps=steps,
        batch=batch,
        inputs=x.shape[2],
        hidden=w_hh.shape[-1] if w_hh.ndim == 2 else 0,
        layers=layers,
        directions=directions,
        ragged="no" if lengths is None else "lengths",
        needs_grad=training,
    )
    _check_weights(problem, x, weights)
    states = (layers * directions, batch, problem.hidden)
    for name, state in (("h0", h0), ("c0", c0)):
        if state is not None and (state.shape != states or state.dtype != x.dtype):
            raise InvalidInputError(
                f"{name} is {_told(state)}: expected {x.dtype} {list(states)}, (layers * directions, batch, hidden)"
            )
    if mode != "LSTM" and c0 is not None:
        raise InvalidInputError("c0 is of an LSTM, not of other cells")
    return problem


def lengths_of(problem: Problem, lengths: Any) -> Array | None:
    """`lengths` as int32, checked where they are numbers yet.

    In a program that is being traced they are not. The kernel for CPU looks at them when it runs, and fails then. With
    the others those above T count as T, and those below 1 as 0: a row of zeros, with its initial states as final ones.

    Raises:
        InvalidInputError: not one integer for each row; or one that is not in 1..T.
    """
    if lengths is None:
        return None
    if not isinstance(lengths, Array):
        lengths = np.asarray(lengths)
    if lengths.shape != (problem.batch,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise InvalidInputError(
            f"lengths are {_told(lengths)}: expected one integer for each of the {problem.batch} rows"
        )
    if not isinstance(lengths, jax.core.Tracer):
        known = np.asarray(lengths)  # jit traces an operation on any of JAX's arrays
        shortest, longest = int(known.min()), int(known.max())
        if shortest < 1 or longest > problem.steps:
            raise InvalidInputError(
                f"lengths from {shortest} to {longest}: expected 1 to {problem.steps}, the number of steps; "
                "leave out rows without any"
            )
    return jnp.asarray(lengths).astype(jnp.int32)


def _check_weights(problem: Problem, x: Array, weights: Sequence[Sequence[Array]]) -> None:
    channels, hidden = GATES[problem.mode] * problem.hidden, problem.hidden
    for i, group in enumerate(weights):
        layer, way = divmod(i, problem.directions)
        inputs = hidden * problem.directions if layer else problem.inputs
        shapes = ((channels, inputs), (channels, hidden), (channels,), (channels,))
        for name, weight, shape in zip(PARTS, group, shapes, strict=False):
            if weight.shape != shape or weight.dtype != x.dtype:
                raise InvalidInputError(
                    f"{name} of layer {layer}{', reverse' if way else ''} is {_told(weight)}: expected {x.dtype} "
                    f"{list(shape)}, for {problem.mode}, {inputs} inputs and {hidden} hidden units"
                )


def _told(array: Any) -> str:
    return f"{array.dtype} {list(array.shape)}"
