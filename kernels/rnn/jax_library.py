"""cuDNN's LSTM, as `jax.experimental.rnn` has it: NVIDIA GPUs, float32."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jax.experimental import rnn

from perfkit.kernels.rnn.jax_layer import Weights
from perfkit.kernels.rnn.problem import Problem


def refusal(problem: Problem) -> str | None:
    """Why it cannot take `problem`; None where it can."""
    if problem.mode != "LSTM":
        return f"jax.experimental.rnn has LSTMs alone, and this is {problem.mode}"
    if problem.dtype != "float32":
        return f"jax.experimental.rnn takes float32, and the arrays are {problem.dtype}"
    return None


def layers(
    x: Array, groups: Sequence[Weights], h0: Array, c0: Array, lengths: Array | None, directions: int
) -> tuple[Array, Array, Array]:
    """A stack of LSTM layers in one call.

    Args:
        x: (T, B, I), float32.
        groups: the weights of each layer and direction.
        h0, c0: (layers * directions, B, H).
        lengths: (B,), int32, from 0 to T; None for all steps.

    Returns:
        y (T, B, H D), zero past a row's length, and the final states.
    """
    steps, batch, inputs = x.shape
    # One vector: all matrices, layer by layer, then all biases. Gates are in torch's order.
    parts = [part.ravel() for group in groups for part in group[:2]]
    parts += [part for group in groups for part in group[2:]]
    y, hn, cn = rnn.lstm(
        jnp.swapaxes(x, 0, 1),
        h0,
        c0,
        jnp.concatenate(parts),
        jnp.full(batch, steps, jnp.int32) if lengths is None else jnp.maximum(lengths, 1),
        inputs,
        h0.shape[-1],
        len(groups) // directions,
        0.0,
        directions == 2,
    )
    y = jnp.swapaxes(y, 0, 1)
    if lengths is not None:  # cuDNN does not promise what is past a length, and knows no row without steps
        y = jnp.where(jnp.arange(steps)[:, None, None] < lengths[:, None], y, 0)
        hn, cn = (jnp.where(lengths[:, None] > 0, *states) for states in ((hn, h0), (cn, c0)))
    return y, hn, cn
