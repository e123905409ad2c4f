"""The recurrent kernels for GPU, through Triton: a program carries a tile of rows through all steps, without a barrier.

Letters: T time steps, B batch rows (a multiple of `ROWS`), H hidden units (a power of two), G gates, S values saved of
each unit and step. The recurrent weights are in one program's memory, which is what limits H.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from perfkit.kernels._jax import shaped_like
from perfkit.kernels.rnn import pallas_cells
from perfkit.kernels.rnn.problem import GATES, SAVED

ROWS = 16
"""Rows of a tile: the fewest that a tensor core's product takes, for the most programs."""

LEAST_HIDDEN, MOST_HIDDEN = 16, 128


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
    interpret: bool = False,
) -> tuple[Array, ...]:
    """One direction of one layer; arguments and results as of `pallas_tpu.forward`, but for the blocks."""
    steps, batch, _ = x_parts.shape
    hidden = w.shape[0]
    lstm, gru = mode == "LSTM", mode == "GRU"
    inputs = {"x": x_parts, "w": w, "h0": h0}
    inputs |= ({"c0": c0} if lstm else {}) | ({"bias_hn": bias_hn} if gru else {})
    inputs |= {"lengths": lengths} if lengths is not None else {}
    wide = shaped_like(x_parts, (batch, hidden), jnp.float32)
    outputs = {"y": shaped_like(x_parts, (steps, batch, hidden), x_parts.dtype), "h": wide}
    outputs |= {"c": wide} if lstm else {}
    if save and (lstm or gru):
        outputs |= {"gates": shaped_like(x_parts, (steps, batch, SAVED[mode] * hidden), x_parts.dtype)}
        outputs |= {"cells": shaped_like(x_parts, (steps, batch, hidden), jnp.float32)} if lstm else {}

    def kernel(ref: dict[str, Any], rows: Any) -> None:
        weights = [ref["w"][:, pl.ds(g * hidden, hidden)] for g in range(GATES[mode])]
        bias = ref["bias_hn"][...] if gru else None
        there = _lengths(ref, rows, hidden)

        def one(i, states):
            t = steps - 1 - i if reverse else i
            h, c = states
            of_x = [part.astype(jnp.float32) for part in _parts(ref["x"], t, rows, hidden, GATES[mode])]
            of_h = [jnp.dot(h.astype(w.dtype), each, preferred_element_type=jnp.float32) for each in weights]
            if gru:
                of_h[2] = of_h[2] + bias
            after, new_c, saved = pallas_cells.step(mode, of_x, of_h, h, c if lstm else None)
            y, new_c = after, new_c if lstm else c
            if there is not None:
                after, y = jnp.where(there > t, after, h), jnp.where(there > t, after, 0.0)
                new_c = jnp.where(there > t, new_c, c) if lstm else c
            ref["y"][t, rows, :] = y.astype(x_parts.dtype)
            if "cells" in ref:
                ref["cells"][t, rows, :] = c
            if "gates" in ref:
                for s, values in enumerate(saved):
                    ref["gates"][t, rows, pl.ds(s * hidden, hidden)] = values.astype(x_parts.dtype)
            return after, new_c

        h = ref["h0"][rows, :]
        h, c = lax.fori_loop(0, steps, one, (h, ref["c0"][rows, :] if lstm else jnp.zeros_like(h)))
        ref["h"][rows, :] = h
        if lstm:
            ref["c"][rows, :] = c

    return _call(f"{mode.lower()}_forward", kernel, inputs, outputs, hidden, batch, interpret)


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
    interpret: bool = False,
) -> tuple[Array, ...]:
    """`forward` backwards; arguments and results as of `pallas_tpu.backward`, but for the blocks."""
    steps, batch, hidden = d_y.shape
    lstm, gru = mode == "LSTM", mode == "GRU"
    inputs = {"w": w, "saved": saved, "d_y": d_y, "d_h": d_h}
    inputs |= ({"cells": cells, "d_c": d_c} if lstm else {}) | ({"before": before} if gru else {})
    inputs |= {"lengths": lengths} if lengths is not None else {}
    wide = shaped_like(d_y, (batch, hidden), jnp.float32)
    outputs = {"d_gates": shaped_like(d_y, (steps, batch, SAVED[mode] * hidden), d_y.dtype), "d_h0": wide}
    outputs |= {"d_c0": wide} if lstm else {}

    def kernel(ref: dict[str, Any], rows: Any) -> None:
        weights = [ref["w"][pl.ds(g * hidden, hidden), :] for g in range(GATES[mode])]
        there = _lengths(ref, rows, hidden)

        def one(i, states):
            t = i if reverse else steps - 1 - i
            dh, dc = states
            gates = [part.astype(jnp.float32) for part in _parts(ref["saved"], t, rows, hidden, SAVED[mode])]
            h = ref["before"][t, rows, :].astype(jnp.float32) if gru else gates[0]
            c = ref["cells"][t, rows, :] if lstm else None
            d_hidden = dh + ref["d_y"][t, rows, :].astype(jnp.float32)
            d, through, new_dc = pallas_cells.back(mode, gates, h, c, d_hidden, dc if lstm else None)
            if there is not None:
                d = tuple(jnp.where(there > t, values, 0.0) for values in d)
            d = tuple(values.astype(d_y.dtype) for values in d)
            for s, values in enumerate(d):
                ref["d_gates"][t, rows, pl.ds(s * hidden, hidden)] = values
            d_before = through if through is not None else jnp.zeros_like(dh)
            for g, each in enumerate(weights):
                d_before += jnp.dot(d[3 if gru and g == 2 else g], each, preferred_element_type=jnp.float32)
            new_dc = new_dc if lstm else dc
            if there is not None:
                d_before = jnp.where(there > t, d_before, dh)
                new_dc = jnp.where(there > t, new_dc, dc)
            return d_before, new_dc

        dh = ref["d_h"][rows, :]
        dh, dc = lax.fori_loop(0, steps, one, (dh, ref["d_c"][rows, :] if lstm else jnp.zeros_like(dh)))
        ref["d_h0"][rows, :] = dh
        if lstm:
            ref["d_c0"][rows, :] = dc

    return _call(f"{mode.lower()}_backward", kernel, inputs, outputs, hidden, batch, interpret)


def _call(
    name: str, kernel, inputs: dict[str, Array], outputs: dict[str, Any], hidden: int, batch: int, interpret: bool
):
    """Call `kernel` with its references by name, once for each tile of rows."""
    names = (*inputs, *outputs)

    def named(*refs):
        kernel(dict(zip(names, refs, strict=True)), pl.ds(pl.program_id(0) * ROWS, ROWS))

    # Which compiler `pallas_call` means by default has changed from version to version: these parameters name Triton.
    warps = 4 if hidden <= 32 else 8 if hidden <= 64 else 16
    return pl.pallas_call(
        named,
        out_shape=tuple(outputs.values()),
        grid=(batch // ROWS,),
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
        name=f"perfkit_rnn_{name}",
    )(*inputs.values())


def _parts(ref: Any, t: Any, rows: Any, hidden: int, count: int) -> list[Array]:
    return [ref[t, rows, pl.ds(i * hidden, hidden)] for i in range(count)]


def _lengths(ref: dict[str, Any], rows: Any, hidden: int) -> Array | None:
    """The length of each row, over all units."""
    return jnp.broadcast_to(ref["lengths"][rows, :], (ROWS, hidden)) if "lengths" in ref else None
