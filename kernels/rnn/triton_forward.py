"""The forward pass of recurrent layers, in Triton: one kernel, over a span of time steps.

A program owns a tile of hidden units and a tile of batch rows of one job: a direction of a layer, or in a wavefront a
layer. Its rows of W_hh stay in shared memory for the whole span: they are the left operand of every product, h of the
step before, transposed, the right one. The four gates of a unit are rows next to each other, so that one product gives
all of them; a GRU's are r, z, and the two halves of n, one of h and one of x.

The span is the whole sequence, and programs that share rows wait for each other by counters, one for each step
(`PERSISTENT`: all programs must run at once); or it is one step, and the launches wait for each other. With one tile of
hidden units h never leaves the program. In a wavefront, step t of a layer waits for step t of the one below.

Letters: T steps, B batch rows, R rows of all steps, I inputs, H hidden units, S numbers kept by unit and step, J jobs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from perfkit.kernels.rnn.triton_cells import (
    apart,
    arrive,
    blocks,
    multiply_add,
    place,
    product,
    sigmoid,
    sources,
    tanh,
    transposed,
    wait,
    within,
)


@triton.jit(do_not_specialize=["first_tile", "tiles", "first", "last", "steps", "batch", "rows"])
def forward_span(
    inputs, y, inner, gates, cells, state, h0, w_hh, w_ih, bias, bias_hn, lengths, starts, counters,
    first_tile, tiles, first, last, steps, batch, rows, inputs_row, y_step, y_row,
    MODE: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
    RESIDENT: tl.constexpr, PERSISTENT: tl.constexpr, JOBS: tl.constexpr, WAVEFRONT: tl.constexpr,
    AHEAD: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Steps [first, last) of all jobs; in a wavefront those of the first layer, and each other one is a step later.

    Args:
        inputs: (J, R, .), W_ih x + b of each gate, rows `inputs_row` apart; in a wavefront of the first layer alone.
            May be `gates`: what a program reads there is what it overwrites.
        y: (R, J H), or (T, B, J H), rows `y_row` and steps `y_step` apart; in a wavefront (., H), of the last layer.
        inner: (J - 1, R, H), outputs of a wavefront's other layers; else None.
        gates: (J, R, S, H), what the backward pass needs; None where there is none.
        cells: (J, R, H), c after each step of an LSTM; None without `gates`.
        state: (J, B, H), float32: c, or h of a GRU, before the span, and after it. None for plain cells.
        h0: (J, B, H).
        w_hh: (J, G H, H).
        w_ih: (J, G H, H), bias: (J, G, H), float32, of a wavefront, the first layer's unused and zero; else None.
        bias_hn: (J, H), float32, of a GRU; else None.
        lengths: (B,), int32, how many steps a row has; None for all.
        starts: (T,), int64, the first row of each step of packed data; None where steps have B rows each.
        counters: (J, tiles, T), int32, zeros, if PERSISTENT; else None.
        BLOCK_K: columns of W in one product.
        RESIDENT: W stays in shared memory; else it is read again in each step, AHEAD - 1 blocks before they are used.
    """
    part, job = tl.program_id(0), tl.program_id(1)
    tile = first_tile + tl.program_id(2)
    PARTS: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    CARRY: tl.constexpr = RESIDENT and PARTS == 1 and BLOCK_K == BLOCK_H  # h stays in the program
    EACH: tl.constexpr = 1 if MODE == "RNN_TANH" or MODE == "RNN_RELU" else 4
    GATES: tl.constexpr = 3 if MODE == "GRU" else EACH
    SAVED: tl.constexpr = EACH
    reverse = (job == 1) & (not WAVEFRONT)
    # every offset within a tensor of steps is counted in int64
    job64 = tl.cast(job, tl.int64)
    unit = part * BLOCK_H + tl.arange(0, BLOCK_H)
    b = tile * BLOCK_B + tl.arange(0, BLOCK_B)
    own = unit < H

    # Whose output is where.
    state_rows = job64 * batch * H
    h0 += state_rows
    y_job, below = y, y
    if WAVEFRONT:
        last_job = job == JOBS - 1
        y_job = tl.where(last_job, y, inner + job64 * rows * H)
        below = inner + (job64 - 1) * rows * H
        y_step = tl.where(last_job, y_step, batch * H)
        y_row = tl.where(last_job, y_row, H)
    else:
        y_job = y + job64 * H
    row64 = b.to(tl.int64)

    # The rows of W of this tile, and what is added to each product.
    j = tl.arange(0, EACH * BLOCK_H)
    gate, w_unit = j % EACH, part * BLOCK_H + j // EACH
    of_h = (w_unit < H) & (gate < GATES)
    h_rows = job64 * GATES * H * H + (gate * H + w_unit) * H
    of_x, x_rows = of_h, h_rows
    if MODE == "GRU":  # n of x is a row of its own
        of_x = (w_unit < H) & (gate != 2)
        x_rows = job64 * GATES * H * H + (tl.minimum(gate, 2) * H + w_unit) * H
    w_h, w_x = None, None
    if RESIDENT:
        w_h = blocks(w_hh, h_rows, of_h, H, BLOCK_K, 1)
        if WAVEFRONT:
            w_x = blocks(w_ih, x_rows, of_x, H, BLOCK_K, 1)
    if MODE == "GRU":
        b_hn = tl.load(bias_hn + job * H + unit, mask=own, other=0.0)[:, None]

    # Which steps there are.
    if lengths is None:
        length = tl.where(b < batch, steps, 0)
        longest = steps
    else:
        length = tl.load(lengths + b, mask=b < batch, other=0)
        longest = tl.max(length, 0)
    x_length = length
    if WAVEFRONT:  # layers above the first have no inputs from before
        x_length = tl.where(job == 0, length, tl.zeros_like(length))
    lag = job if WAVEFRONT else 0
    begin = tl.maximum(first - lag, tl.where(reverse, steps - longest, 0))
    end = tl.minimum(last - lag, tl.where(reverse, steps, longest))
    back = tl.where(reverse, 1, -1)  # from a step to the one before
    counter = counters
    if PERSISTENT:
        counter = counters + (job64 * tiles + tile) * steps

    inside = own[:, None] & (b < batch)[None, :]
    states = state_rows + row64[None, :] * H + unit[:, None]
    if EACH == 4:
        c = tl.load(state + states, mask=inside, other=0.0)
    if CARRY:
        t = tl.where(reverse, steps - 1 - begin, begin) + back
        seen, fresh, any_fresh = sources(t, length > 0, length, lengths, steps)
        source = y_job + place(t, starts, steps, y_step, y_row) + row64 * y_row
        h = transposed(source, seen, h0 + row64 * H, fresh, any_fresh, tl.arange(0, BLOCK_K), H)

    for s in range(begin, end):
        t = tl.where(reverse, steps - 1 - s, s)
        there = within(t, length)
        mask = own[:, None] & there[None, :]
        row = place(t, starts, steps, batch, 1)
        y_now = y_job + place(t, starts, steps, y_step, y_row)

        # What does not depend on h is asked for before the wait.
        x_mask = own[:, None] & within(t, x_length)[None, :]
        x = inputs + (job64 * rows + row + row64[None, :]) * inputs_row + unit[:, None]
        a0 = tl.load(x, mask=x_mask, other=0.0).to(tl.float32)
        if EACH == 4:
            a1 = tl.load(x + H, mask=x_mask, other=0.0).to(tl.float32)
            a2 = tl.load(x + 2 * H, mask=x_mask, other=0.0).to(tl.float32)
        if MODE == "LSTM":
            a3 = tl.load(x + 3 * H, mask=x_mask, other=0.0).to(tl.float32)
        sums = tl.zeros((EACH * BLOCK_H, BLOCK_B), tl.float32)
        if WAVEFRONT:
            of_bias = bias + job * GATES * H + unit
            a0 += tl.load(of_bias, mask=own, other=0.0)[:, None]
            if EACH == 4:
                a1 += tl.load(of_bias + H, mask=own, other=0.0)[:, None]
                a2 += tl.load(of_bias + 2 * H, mask=own, other=0.0)[:, None]
            if MODE == "LSTM":
                a3 += tl.load(of_bias + 3 * H, mask=own, other=0.0)[:, None]
            if job > 0:
                if PERSISTENT:
                    wait(counter - tl.cast(tiles, tl.int64) * steps + s, PARTS)
                sums = product(
                    sums, w_x, w_ih, x_rows, of_x, below + (row + row64) * H, there, None, None, None,
                    H, BLOCK_K, 1, AHEAD, PRECISION, WIDEN,
                )  # fmt: skip

        if CARRY:
            sums = multiply_add(w_h[0], h, sums, PRECISION, WIDEN)
        else:
            if PERSISTENT and PARTS > 1:  # noqa: SIM102 - a condition of the compiler's, and one of the program's
                if s > begin:
                    wait(counter + s - 1, PARTS)
            seen, fresh, any_fresh = sources(t + back, there, length, lengths, steps)
            source = y_job + place(t + back, starts, steps, y_step, y_row) + row64 * y_row
            sums = product(
                sums, w_h, w_hh, h_rows, of_h, source, seen, h0 + row64 * H, fresh, any_fresh,
                H, BLOCK_K, 1, AHEAD, PRECISION, WIDEN,
            )  # fmt: skip

        if MODE == "LSTM":
            s0, s1, s2, s3 = apart(sums, BLOCK_H, BLOCK_B)
            a0, a1, a2, a3 = sigmoid(a0 + s0), sigmoid(a1 + s1), tanh(a2 + s2), sigmoid(a3 + s3)
            next_c = a1 * c + a0 * a2
            new = a3 * tanh(next_c)
            c = tl.where(there[None, :], next_c, c)
        elif MODE == "GRU":
            s0, s1, s2, s3 = apart(sums, BLOCK_H, BLOCK_B)
            a0, a1, a3 = sigmoid(a0 + s0), sigmoid(a1 + s1), s2 + b_hn
            a2 = tanh(a2 + s3 + a0 * a3)
            new = a2 + a1 * (c - a2)
            c = tl.where(there[None, :], new, c)
        elif MODE == "RNN_TANH":
            a0 = tanh(a0 + sums)
            new = a0
        else:
            a0 += sums
            a0 = tl.where(a0 < 0.0, 0.0, a0)  # NaN stays
            new = a0

        stored = new.to(y.dtype.element_ty)
        tl.store(y_now + row64[None, :] * y_row + unit[:, None], stored, mask=mask)
        if CARRY:
            h = tl.where(there[None, :], stored, h)
        elif PARTS == 1:
            tl.debug_barrier()
        if PERSISTENT:
            arrive(counter + s)
        if gates is not None:  # after the others were told to go on
            kept = gates + (job64 * rows + row + row64[None, :]) * (SAVED * H) + unit[:, None]
            kind = gates.dtype.element_ty
            tl.store(kept, a0.to(kind), mask=mask)
            if EACH == 4:
                tl.store(kept + H, a1.to(kind), mask=mask)
                tl.store(kept + 2 * H, a2.to(kind), mask=mask)
                tl.store(kept + 3 * H, a3.to(kind), mask=mask)
            if MODE == "LSTM":
                of_row = cells + (job64 * rows + row + row64[None, :]) * H + unit[:, None]
                tl.store(of_row, c.to(cells.dtype.element_ty), mask=mask)
    if EACH == 4:
        tl.store(state + states, c, mask=inside)
