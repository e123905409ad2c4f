"""The recurrent layer in plain JAX: what its kernels in JAX are tested against, and what runs where there is none.

Differentiable as often as you like, in both modes, and in float64 too where JAX has that enabled.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax


def layer(
    mode: str, x: Array, weights: tuple[Array, ...], h0: Array, c0: Array, lengths: Array | None, reverse: bool
) -> tuple[Array, Array, Array]:
    """One direction of one layer; the equations are at the top of `perfkit.kernels.rnn`.

    Args:
        mode: "LSTM", "GRU", "RNN_TANH" or "RNN_RELU".
        x: (T, B, I).
        weights: w_ih (G H, I), w_hh (G H, H), b_ih (G H,), b_hh (G H,), in x's dtype.
        h0, c0: (B, H); c0 is handed through but for LSTM.
        lengths: (B,), integers; None for all steps.
        reverse: from the last step to the first.

    Returns:
        y: (T, B, H), in x's dtype, zero past a row's length.
        h, c: (B, H), the final states. States and sums are float32, or float64 where x is; h is rounded to x's dtype
        on its way into a product.
    """
    w_ih, w_hh, b_ih, b_hh = weights
    wide = jnp.promote_types(x.dtype, jnp.float32)
    x_parts = jnp.einsum("tbi,gi->tbg", x, w_ih, preferred_element_type=wide) + b_ih.astype(wide)
    b_hh = b_hh.astype(wide)

    def step(states, now):
        h, c = states
        t, of_x = now
        of_h = jnp.einsum("bh,gh->bg", h.astype(w_hh.dtype), w_hh, preferred_element_type=wide) + b_hh
        new_h, new_c = cell(mode, of_x, of_h, h, c)
        y = new_h
        if lengths is not None:
            there = (t < lengths)[:, None]
            new_h, new_c, y = jnp.where(there, new_h, h), jnp.where(there, new_c, c), jnp.where(there, new_h, 0)
        return (new_h, new_c), y.astype(x.dtype)

    times = jnp.arange(x.shape[0], dtype=jnp.int32)
    (h, c), y = lax.scan(step, (h0.astype(wide), c0.astype(wide)), (times, x_parts), reverse=reverse)
    return y, h, c


def cell(mode: str, of_x: Array, of_h: Array, h: Array, c: Array) -> tuple[Array, Array]:
    """The states after a step, from the gates' input and hidden parts (..., G H), biases in them."""
    if mode == "LSTM":
        i, f, g, o = jnp.split(of_x + of_h, 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return jax.nn.sigmoid(o) * jnp.tanh(c), c
    if mode == "GRU":
        (x_r, x_z, x_n), (h_r, h_z, h_n) = jnp.split(of_x, 3, -1), jnp.split(of_h, 3, -1)
        n = jnp.tanh(x_n + jax.nn.sigmoid(x_r + h_r) * h_n)
        return n + jax.nn.sigmoid(x_z + h_z) * (h - n), c
    return jnp.tanh(of_x + of_h) if mode == "RNN_TANH" else jax.nn.relu(of_x + of_h), c
