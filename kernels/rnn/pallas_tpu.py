"""The recurrent kernels for TPU: the recurrent weights and the states stay in VMEM, time goes by in blocks.

Letters: T time steps, B batch rows, H hidden units (a multiple of 128), G gates, S values saved of each unit and step.
Grid: blocks of rows, which are independent of each other, by blocks of steps, one after the other. The last blocks may
be ragged: steps past T are not run, and rows past B go nowhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from perfkit.kernels._jax import shaped_like
from perfkit.kernels.rnn import pallas_cells
from perfkit.kernels.rnn.problem import GATES, SAVED

LANES = 128
MIB = 1 << 20
MOST_ROWS = 256
MOST_STEPS = 16


class Blocks(NamedTuple):
    """How much a program holds at a time.

    Args:
        rows, steps: of a block.
        vmem_bytes: how much VMEM it may use.
    """

    rows: int
    steps: int
    vmem_bytes: int


def blocks(mode: str, dtype: str, batch: int, steps: int, hidden: int, vmem_bytes: int) -> Blocks | None:
    """The blocks with which both passes fit into VMEM: the most rows that leave room for some steps. None: none do.

    Args:
        hidden: a multiple of `LANES`.
        vmem_bytes: of a core.
    """
    tile = sublanes(dtype)
    usable = vmem_bytes * 7 // 8  # the compiler keeps some for itself
    for least in (4, 1):
        rows = min(-(-batch // tile) * tile, MOST_ROWS)
        while rows >= tile:
            for block in (size for size in (MOST_STEPS, 8, 4, 2, 1) if size >= min(least, steps)):
                if block < 2 * steps and needed(mode, dtype, rows, block, hidden) <= usable:
                    return Blocks(rows, block, usable)
            rows = rows // 2 // tile * tile
    return None


def sublanes(dtype: str) -> int:
    """How many rows a tile of VMEM has."""
    return 8 if dtype == "float32" else 16


def needed(mode: str, dtype: str, rows: int, steps: int, hidden: int) -> int:
    """Bytes of VMEM, of the pass that needs more: the weights, two buffers of each block, scratch, and the gates of a
    step with what becomes of them."""
    size, gates, saved = jnp.dtype(dtype).itemsize, GATES[mode], SAVED[mode]
    unit = rows * hidden
    weights = gates * hidden * hidden * size
    states = (4 * 2 + 2) * unit * 4  # in and out, twice each, and scratch
    forward = steps * unit * ((gates + saved + 1) * size + 4)
    backward = steps * unit * ((2 * saved + 2) * size + 4)
    return weights + states + 2 * max(forward, backward) + 3 * gates * unit * 4


def forward(
    mode: str,
    x_parts: Array,
    w: Array,
    bias_hn: Array | None,
    h0: Array,
    c0: Array | None,
    lengths: Array | None,
    reverse: bool,
    save: bool,
    given: Blocks,
    interpret: Any = False,
) -> tuple[Array, ...]:
    """One direction of one layer.

    Args:
        x_parts: (T, B, G H), the gates' input parts with their biases, but for that of GRU's n inside of the product.
        w: (H, G H), the recurrent weights, in x_parts' dtype.
        bias_hn: (1, H), float32; GRU only.
        h0, c0: (B, H), float32; c0 for LSTM only.
        lengths: (B, 1), int32; None for all steps.
        save: keep what the backward pass needs.
        interpret: as `pallas_call` takes it.

    Returns:
        y (T, B, H) in x_parts' dtype; h and, for LSTM, c (B, H), float32; with `save` the gates (T, B, S H) in
        x_parts' dtype, but for RNN, and for LSTM the cells before each step (T, B, H), float32.
    """
    steps, batch, _ = x_parts.shape
    hidden = w.shape[0]
    lstm, gru = mode == "LSTM", mode == "GRU"
    place = _Places(given, steps, batch, reverse)
    wide = shaped_like(x_parts, (batch, hidden), jnp.float32)
    inputs = {"x": (x_parts, place.steps(x_parts.shape[2])), "w": (w, _whole(w))}
    inputs |= {"bias_hn": (bias_hn, _whole(bias_hn))} if gru else {}
    inputs |= {"lengths": (lengths, place.rows(1))} if lengths is not None else {}
    inputs |= {"h0": (h0, place.rows(hidden))} | ({"c0": (c0, place.rows(hidden))} if lstm else {})
    rows = functools.partial(_like, x_parts, batch)
    outputs = {"y": (rows(hidden), place.steps(hidden)), "h": (wide, place.rows(hidden))}
    outputs |= {"c": (wide, place.rows(hidden))} if lstm else {}
    if save and (lstm or gru):
        outputs |= {"gates": (rows(SAVED[mode] * hidden), place.steps(SAVED[mode] * hidden))}
        outputs |= {"cells": (rows(hidden, jnp.float32), place.steps(hidden))} if lstm else {}

    def kernel(ref: dict[str, Any], of_block: Callable[[Callable[[Any, Any], None]], None], block: Any) -> None:
        h, c = ref["h_now"], ref.get("c_now")

        @pl.when(block == 0)
        def _begin():
            h[...] = ref["h0"][...]
            if lstm:
                c[...] = ref["c0"][...]

        def one(at, t):
            before, cell = h[...], c[...] if lstm else None
            u = jnp.dot(before.astype(w.dtype), ref["w"][...], preferred_element_type=jnp.float32)
            of_x, of_h = (_split(values, hidden) for values in (ref["x"][at].astype(jnp.float32), u))
            if gru:
                of_h[2] = of_h[2] + ref["bias_hn"][...]
            after, new_cell, saved = pallas_cells.step(mode, of_x, of_h, before, cell)
            y = after
            if lengths is not None:
                there = _there(ref["lengths"], t, before.shape)
                after, y = jnp.where(there, after, before), jnp.where(there, after, 0.0)
                new_cell = jnp.where(there, new_cell, cell) if lstm else None
            h[...] = after
            ref["y"][at] = y.astype(x_parts.dtype)
            if lstm:
                c[...] = new_cell
            if "cells" in ref:
                ref["cells"][at] = cell
            if "gates" in ref:
                ref["gates"][at] = jnp.concatenate(saved, 1).astype(x_parts.dtype)

        of_block(one)

        @pl.when(block == place.blocks - 1)
        def _end():
            ref["h"][...] = h[...]
            if lstm:
                ref["c"][...] = c[...]

    scratch = ("h_now", "c_now") if lstm else ("h_now",)
    return _call(f"{mode.lower()}_forward", kernel, inputs, outputs, scratch, hidden, place, interpret)


def backward(
    mode: str,
    w: Array,
    before: Array | None,
    saved: Array,
    cells: Array | None,
    lengths: Array | None,
    reverse: bool,
    d_y: Array,
    d_h: Array,
    d_c: Array | None,
    given: Blocks,
    interpret: Any = False,
) -> tuple[Array, ...]:
    """`forward` backwards.

    Args:
        w: (G H, H), the recurrent weights.
        before: (T, B, H), the hidden states before each step; GRU only.
        saved: the gates as `forward` returned them; of RNN its y.
        cells: as `forward` returned them; LSTM only.
        d_y: (T, B, H), in y's dtype.
        d_h, d_c: (B, H), float32, of the final states; d_c for LSTM only.

    Returns:
        Gradients of the gates before their functions, (T, B, S H) in d_y's dtype: i f g o; r z n and n's hidden part;
        the only one. Zero past a row's length. Gradients of h0 and, for LSTM, c0.
    """
    steps, batch, hidden = d_y.shape
    lstm, gru = mode == "LSTM", mode == "GRU"
    place = _Places(given, steps, batch, not reverse)
    inputs = {"w": (w, _whole(w)), "saved": (saved, place.steps(saved.shape[2])), "d_y": (d_y, place.steps(hidden))}
    inputs |= {"before": (before, place.steps(hidden))} if gru else {}
    inputs |= {"cells": (cells, place.steps(hidden))} if lstm else {}
    inputs |= {"lengths": (lengths, place.rows(1))} if lengths is not None else {}
    inputs |= {"d_h": (d_h, place.rows(hidden))} | ({"d_c": (d_c, place.rows(hidden))} if lstm else {})
    wide = shaped_like(d_y, (batch, hidden), jnp.float32)
    width = SAVED[mode] * hidden
    outputs = {"d_gates": (_like(d_y, batch, width), place.steps(width)), "d_h0": (wide, place.rows(hidden))}
    outputs |= {"d_c0": (wide, place.rows(hidden))} if lstm else {}

    def kernel(ref: dict[str, Any], of_block: Callable[[Callable[[Any, Any], None]], None], block: Any) -> None:
        dh, dc = ref["dh_now"], ref.get("dc_now")

        @pl.when(block == 0)
        def _begin():
            dh[...] = ref["d_h"][...]
            if lstm:
                dc[...] = ref["d_c"][...]

        def one(at, t):
            d_after, d_cell = dh[...], dc[...] if lstm else None
            gates = _split(ref["saved"][at].astype(jnp.float32), hidden)
            h = ref["before"][at].astype(jnp.float32) if gru else gates[0]
            c = ref["cells"][at] if lstm else None
            d_hidden = d_after + ref["d_y"][at].astype(jnp.float32)
            d, through, new_d_cell = pallas_cells.back(mode, gates, h, c, d_hidden, d_cell)
            d_gates = jnp.concatenate(d, 1).astype(d_y.dtype)
            of_h = jnp.concatenate((d[0], d[1], d[3]), 1).astype(d_y.dtype) if gru else d_gates
            d_before = jnp.dot(of_h, ref["w"][...], preferred_element_type=jnp.float32)
            if through is not None:
                d_before = d_before + through
            if lengths is not None:
                d_gates = jnp.where(_there(ref["lengths"], t, d_gates.shape), d_gates, jnp.zeros_like(d_gates))
                there = _there(ref["lengths"], t, d_after.shape)
                d_before = jnp.where(there, d_before, d_after)
                new_d_cell = jnp.where(there, new_d_cell, d_cell) if lstm else None
            ref["d_gates"][at] = d_gates
            dh[...] = d_before
            if lstm:
                dc[...] = new_d_cell

        of_block(one)

        @pl.when(block == place.blocks - 1)
        def _end():
            ref["d_h0"][...] = dh[...]
            if lstm:
                ref["d_c0"][...] = dc[...]

    scratch = ("dh_now", "dc_now") if lstm else ("dh_now",)
    return _call(f"{mode.lower()}_backward", kernel, inputs, outputs, scratch, hidden, place, interpret)


class _Places:
    """Where the block of a program is."""

    def __init__(self, given: Blocks, steps: int, batch: int, reverse: bool):
        self.given, self.all_steps, self.reverse = given, steps, reverse
        self.blocks = -(-steps // given.steps)
        self.grid = (-(-batch // given.rows), self.blocks)

    def steps(self, width: int) -> pl.BlockSpec:
        """The block of an array (T, B, width)."""
        last = self.blocks - 1
        place = (lambda b, t: (last - t, b, 0)) if self.reverse else (lambda b, t: (t, b, 0))
        return pl.BlockSpec((self.given.steps, self.given.rows, width), place)

    def rows(self, width: int) -> pl.BlockSpec:
        """The block of an array (B, width)."""
        return pl.BlockSpec((self.given.rows, width), lambda b, _t: (b, 0))

    def each_step(self, block: Any, one: Callable[[Any, Any], None]) -> None:
        """`one(place in the block, time)` for the steps of a block, in the order of this direction."""
        size = self.given.steps
        first = (self.blocks - 1 - block if self.reverse else block) * size
        count = jnp.minimum(size, self.all_steps - first) if self.all_steps % size else size

        def body(i, carry):
            at = count - 1 - i if self.reverse else i
            one(at, first + at)
            return carry

        lax.fori_loop(0, count, body, 0)


def _call(name, kernel, inputs, outputs, scratch, hidden, place: _Places, interpret) -> tuple[Array, ...]:
    """Call `kernel` with its references by name, over the grid."""
    names = (*inputs, *outputs, *scratch)

    def named(*refs):
        block = pl.program_id(1)
        kernel(dict(zip(names, refs, strict=True)), functools.partial(place.each_step, block), block)

    return pl.pallas_call(
        named,
        out_shape=tuple(shape for shape, _ in outputs.values()),
        grid=place.grid,
        in_specs=[spec for _, spec in inputs.values()],
        out_specs=tuple(spec for _, spec in outputs.values()),
        scratch_shapes=[pltpu.VMEM((place.given.rows, hidden), jnp.float32) for _ in scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=place.given.vmem_bytes
        ),
        interpret=interpret,
        name=f"perfkit_rnn_{name}",
    )(*(array for array, _ in inputs.values()))


def _whole(array: Array) -> pl.BlockSpec:
    """All of an array, once: it does not change from one program to the next."""
    return pl.BlockSpec(array.shape, lambda _b, _t: (0, 0), pipeline_mode=pl.Buffered(1))


def _like(x: Array, batch: int, width: int, dtype: Any = None) -> jax.ShapeDtypeStruct:
    return shaped_like(x, (x.shape[0], batch, width), dtype or x.dtype)


def _split(gates: Array, hidden: int) -> list[Array]:
    return [gates[:, i : i + hidden] for i in range(0, gates.shape[1], hidden)]


def _there(lengths: Any, t: Any, shape: tuple[int, int]) -> Array:
    """Which rows have a step t, over all columns."""
    return jnp.broadcast_to(lengths[...], shape) > t
