"""The recurrent op in JAX: layers and directions of a stack, one after the other, by whom `OP.choose` picks.

Works under jit, vmap, scan, shard_map and in sharded programs, and has every gradient once (twice: "reference" alone).
"library", cuDNN's LSTM as JAX has it, cannot be mapped by vmap.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from perfkit._errors import InvalidInputError
from perfkit.kernels import rnn as op
from perfkit.kernels._jax import alike
from perfkit.kernels.rnn import jax_reference
from perfkit.kernels.rnn.jax_layer import Direction, Weights, layer
from perfkit.kernels.rnn.jax_problem import lengths_of, problem_of
from perfkit.kernels.rnn.problem import Problem

Layers = Callable[[Array, Sequence[Weights], Array, Array, Array | None], tuple[Array, Array, Array]]
"""(x, weights of each layer and direction, h0, c0, lengths) -> y, hn, cn."""


def run(
    x: Array,
    mode: str,
    weights: Sequence[Sequence[Array]],
    h0: Array | None = None,
    c0: Array | None = None,
    lengths: Any = None,
    batch_first: bool = False,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    key: Array | None = None,
    recompute: bool = False,
    implementation: str | None = None,
) -> tuple[Array, Array, Array | None]:
    """See `perfkit.kernels.rnn.lstm`.

    Returns:
        y, hn, and cn or, but for LSTM, None.
    """
    problem = problem_of(x, mode, weights, h0, c0, lengths, batch_first, bidirectional, training)
    lengths = lengths_of(problem, lengths)
    drop = dropout if training and problem.layers > 1 else 0.0
    if not 0.0 <= dropout <= 1.0:
        raise InvalidInputError(f"dropout is {dropout}: expected a probability, from 0 to 1")
    if drop and key is None:
        raise InvalidInputError(f"dropout={dropout} in training needs key=, a JAX PRNG key: jax.random.key(0)")
    choice = op.OP.choose(problem, implementation)
    zeros = jnp.zeros((problem.layers * problem.directions, problem.batch, problem.hidden), x.dtype)
    h0, c0 = zeros if h0 is None else h0, zeros if c0 is None else c0
    groups = [_with_biases(group) for group in weights]
    layers = _layers(problem, choice.implementation, batch_first, recompute)
    arrays = alike((x, groups, h0, c0, lengths))
    y, hn, cn = _with_dropout(layers, *arrays, drop, key, problem.directions)
    return y, hn.astype(x.dtype), cn.astype(x.dtype) if mode == "LSTM" else None


def _with_dropout(layers: Layers, x, groups, h0, c0, lengths, drop, key, directions):
    """The whole stack at once, or layer after layer where there is dropout between them."""
    if not drop:
        return layers(x, groups, h0, c0, lengths)
    h_n, c_n = [], []
    for first in range(0, len(groups), directions):
        if first:
            kept = jax.random.bernoulli(jax.random.fold_in(key, first), 1.0 - drop, x.shape)
            x = jnp.where(kept, x / max(1.0 - drop, 1e-9), 0).astype(x.dtype)
        of_layer = slice(first, first + directions)
        x, h, c = layers(x, groups[of_layer], h0[of_layer], c0[of_layer], lengths)
        h_n.append(h)
        c_n.append(c)
    return x, jnp.concatenate(h_n), jnp.concatenate(c_n)


def _layers(problem: Problem, implementation: str, batch_first: bool, recompute: bool) -> Layers:
    """All layers that it is given, by `implementation`."""
    mode, directions = problem.mode, problem.directions
    if implementation == "cpu":
        from perfkit.kernels.rnn import jax_cpu

        return functools.partial(jax_cpu.layers, jax_cpu.Stack(mode, directions, batch_first, recompute))
    if implementation == "library":
        from perfkit.kernels.rnn import jax_library

        return _time_major(functools.partial(jax_library.layers, directions=directions), batch_first)
    if implementation == "pallas":
        from perfkit.kernels.rnn.pallas_kernel import Pallas

        kernel = Pallas(problem.device)

        def one(x, weights, h0, c0, lengths, reverse):
            return layer(Direction(kernel, mode, reverse, recompute), x, weights, h0, c0, lengths)
    else:
        one = functools.partial(jax_reference.layer, mode)
        one = jax.checkpoint(one, static_argnums=(5,)) if recompute else one
    return _time_major(functools.partial(_one_by_one, one, directions), batch_first)


def _time_major(layers: Layers, batch_first: bool) -> Layers:
    """`layers`, which take (T, B, features) and may read x anywhere, as `run` is asked for them."""

    def given(x, groups, h0, c0, lengths):
        x = jnp.swapaxes(x, 0, 1) if batch_first else x
        if lengths is not None:
            lengths = jnp.clip(lengths, 0, len(x))
            # zero times what x may hold there, a NaN for instance, is no zero
            x = jnp.where(jnp.arange(len(x))[:, None, None] < lengths[:, None], x, 0)
        y, hn, cn = layers(x, groups, h0, c0, lengths)
        return jnp.swapaxes(y, 0, 1) if batch_first else y, hn, cn

    return given


def _one_by_one(one: Callable[..., Any], directions: int, x, groups, h0, c0, lengths):
    """Layer after layer, direction after direction."""
    h_n, c_n, sides = [], [], []
    for i, weights in enumerate(groups):
        y, h, c = one(x, weights, h0[i], c0[i], lengths, i % directions == 1)
        sides.append(y)
        h_n.append(h)
        c_n.append(c)
        if len(sides) == directions:
            x, sides = jnp.concatenate(sides, -1), []
    return x, jnp.stack(h_n), jnp.stack(c_n)


def _with_biases(group: Sequence[Array]) -> Weights:
    w_ih, w_hh, *biases = group
    zeros = jnp.zeros(w_ih.shape[0], w_ih.dtype)
    return (w_ih, w_hh, *(biases or (zeros, zeros)))
