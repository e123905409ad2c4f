"""One direction of one recurrent layer as a differentiable function of JAX, whichever kernel computes it.

The kernel's two passes are calls that `vmap` folds into the batch and a sharded `jit` splits along it, as rows are
independent of each other. The weights' gradients are matrix products over all steps, left to XLA.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from perfkit.kernels._jax import by_rows
from perfkit.kernels.rnn.problem import GATES

Weights = tuple[Array, Array, Array, Array]


class Kernel(Protocol):
    """The two passes of one implementation: a hashable value. All arrays are time-major.

    `forward` returns y (T, B, H) in x's dtype, zero past a row's length; h and c (B, H), float32, c as it likes but for
    LSTM; and, with `save`, what `backward` needs: arrays (T, B, ...).

    `backward` is told `before`, the hidden state before each step, (T, B, H), and returns the gradients of the gates
    before their functions, (T, B, S, H), with S of `problem.SAVED`: i f g o; r z n and n's hidden part; the only one;
    zero past a row's length; and those of h0 and c0, float32.
    """

    def forward(
        self, mode: str, x: Array, weights: Weights, h0: Array, c0: Array, lengths: Array | None, reverse: bool,
        save: bool,
    ) -> tuple[Array, Array, Array, tuple[Array, ...]]: ...  # fmt: skip

    def backward(
        self, mode: str, weights: Weights, lengths: Array | None, reverse: bool, y: Array, before: Array,
        saved: tuple[Array, ...], d_y: Array, d_h: Array, d_c: Array,
    ) -> tuple[Array, Array, Array]: ...  # fmt: skip


@dataclass(frozen=True)
class Direction:
    """What is fixed when a call is traced.

    Args:
        kernel: who computes.
        mode: "LSTM", "GRU", "RNN_TANH" or "RNN_RELU".
        reverse: from the last step to the first.
        recompute: save only the inputs for the backward pass, and run the forward pass again in it.
    """

    kernel: Kernel
    mode: str
    reverse: bool
    recompute: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def layer(
    of: Direction, x: Array, weights: Weights, h0: Array, c0: Array, lengths: Array | None
) -> tuple[Array, Array, Array]:
    """One direction of one layer: arguments and results as of `jax_reference.layer`."""
    y, h, c, _ = _forward(of, False)(x, weights, h0, c0, lengths)
    return y, h, c


def _layer_forward(of: Direction, x, weights, h0, c0, lengths):
    y, h, c, saved = _forward(of, not of.recompute)(x, weights, h0, c0, lengths)
    return (y, h, c), (x, weights, h0, c0, lengths, None if of.recompute else (y, saved))


def _layer_backward(of: Direction, kept, gradients):
    x, weights, h0, c0, lengths, done = kept
    if done is None:
        y, _, _, saved = _forward(of, True)(x, weights, h0, c0, lengths)
    else:
        y, saved = done
    d_y, d_h, d_c = gradients
    before = hidden_before(y, h0, lengths, of.reverse)
    d_gates, d_h0, d_c0 = _backward(of)(weights, lengths, y, before, saved, d_y, d_h, d_c)
    gates = GATES[of.mode]
    of_x = d_gates[..., :gates, :]
    of_h = jnp.concatenate((d_gates[..., :2, :], d_gates[..., 3:, :]), -2) if of.mode == "GRU" else of_x
    of_x, of_h = (part.reshape(*part.shape[:2], -1) for part in (of_x, of_h))

    def product(equation, *arrays, like):
        return jnp.einsum(equation, *arrays, preferred_element_type=jnp.float32).astype(like.dtype)

    w_ih, w_hh, b_ih, b_hh = weights
    d_weights = (
        product("tbg,tbi->gi", of_x, x, like=w_ih),
        product("tbg,tbh->gh", of_h, before, like=w_hh),
        jnp.sum(of_x, (0, 1), dtype=jnp.float32).astype(b_ih.dtype),
        jnp.sum(of_h, (0, 1), dtype=jnp.float32).astype(b_hh.dtype),
    )
    d_x = product("tbg,gi->tbi", of_x, w_ih, like=x)
    # lengths are integers: they have no gradient
    return d_x, d_weights, d_h0.astype(h0.dtype), d_c0.astype(c0.dtype), None


layer.defvjp(_layer_forward, _layer_backward)


def hidden_before(y: Array, h0: Array, lengths: Array | None, reverse: bool) -> Array:
    """The hidden state before each step, (T, B, H) in y's dtype; anything past a row's length."""
    h0 = h0.astype(y.dtype)[None]
    if not reverse:
        return jnp.concatenate((h0, y[:-1]))
    before = jnp.concatenate((y[1:], h0))
    if lengths is None:
        return before
    first = jnp.arange(y.shape[0])[:, None, None] == lengths[None, :, None] - 1
    return jnp.where(first, h0, before)


@functools.cache
def _forward(of: Direction, save: bool) -> Callable[..., Any]:
    def forward(x, weights, h0, c0, lengths):
        return of.kernel.forward(of.mode, x, weights, h0, c0, lengths, of.reverse, save)

    return by_rows(forward, (1, None, 0, 0, 0), (1, 0, 0, 1))


@functools.cache
def _backward(of: Direction) -> Callable[..., Any]:
    def backward(weights, lengths, y, before, saved, d_y, d_h, d_c):
        return of.kernel.backward(of.mode, weights, lengths, of.reverse, y, before, saved, d_y, d_h, d_c)

    return by_rows(backward, (None, 0, 1, 1, 1, 1, 0, 0), (1, 0, 0))
