"""The cells' equations, forward and backward, as the Pallas kernels compute them on the gates of a block of rows.

`step` takes the input and hidden parts of the gates, biases in them, and returns the states after a step and what the
backward pass needs of it. `back` takes that and the gradients of the states after the step.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)) by tanh, which every device has an instruction or a routine for."""
    return 0.5 * jnp.tanh(0.5 * x) + 0.5


def step(
    mode: str, of_x: Sequence[Array], of_h: Sequence[Array], h: Array, c: Array | None
) -> tuple[Array, Array | None, tuple[Array, ...]]:
    """Returns h and c after the step, and what is saved: i f g o; r z n and n's hidden part; nothing."""
    if mode == "LSTM":
        x_i, x_f, x_g, x_o = (x + u for x, u in zip(of_x, of_h, strict=True))
        i, f, g, o = sigmoid(x_i), sigmoid(x_f), jnp.tanh(x_g), sigmoid(x_o)
        c = f * c + i * g
        return o * jnp.tanh(c), c, (i, f, g, o)
    if mode == "GRU":
        r, z = sigmoid(of_x[0] + of_h[0]), sigmoid(of_x[1] + of_h[1])
        n = jnp.tanh(of_x[2] + r * of_h[2])
        return n + z * (h - n), c, (r, z, n, of_h[2])
    x = of_x[0] + of_h[0]
    return jnp.tanh(x) if mode == "RNN_TANH" else jnp.maximum(x, 0.0), c, ()


def back(
    mode: str, saved: Sequence[Array], h: Array, c: Array | None, dh: Array, dc: Array | None
) -> tuple[tuple[Array, ...], Array | None, Array | None]:
    """One step backwards.

    Args:
        saved: as `step` returned it.
        h: the hidden state before the step (GRU), or after it (RNN); not used for LSTM.
        c: the cell before the step (LSTM).
        dh, dc: gradients of the states after the step.

    Returns:
        The gradients of the gates before their functions: i f g o; r z n and n's hidden part; the only one. The part of
        dh that reaches the hidden state before the step past the weights, None where there is none. dc before the step.
    """
    if mode == "LSTM":
        i, f, g, o = saved
        t = jnp.tanh(f * c + i * g)
        dc = dc + dh * o * (1.0 - t * t)
        d_o = dh * t * o * (1.0 - o)
        return (dc * g * i * (1.0 - i), dc * c * f * (1.0 - f), dc * i * (1.0 - g * g), d_o), None, dc * f
    if mode == "GRU":
        r, z, n, hidden = saved
        d_n = dh * (1.0 - z) * (1.0 - n * n)
        return (d_n * hidden * r * (1.0 - r), dh * (h - n) * z * (1.0 - z), d_n, d_n * r), dh * z, dc
    return (dh * (1.0 - h * h) if mode == "RNN_TANH" else jnp.where(h > 0.0, dh, 0.0),), None, dc
