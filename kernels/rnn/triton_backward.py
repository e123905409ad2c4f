"""The backward pass of recurrent layers, in Triton: from gradients of outputs and states to those of pre-activations.

The programs are those of `triton_forward.py`, and go through the steps the other way round. A program's part of W_hh is
a tile for each gate: the gradient of h is the sum of their products with the gradients of all gates at the step after,
which the other programs have written. The gradients of weights and inputs are products over all steps at once, and not
made here.

Letters: T steps, B batch rows, R rows of all steps, H hidden units, S numbers kept by unit and step, J directions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from perfkit.kernels.rnn.triton_cells import (
    arrive,
    blocks,
    multiply_add,
    place,
    product,
    sources,
    tanh,
    transposed,
    wait,
    within,
)


@triton.jit
def of_gate(
    sums, w_blocks, w, d, gate, plane, unit, own, there,
    H: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """sums + W^T d of one gate of W, whose gradients are at `plane` of the rows that `d` points to."""
    w, d = w + gate * H * H, d + plane * H
    return product(sums, w_blocks, w, unit, own, d, there, None, None, None, H, BLOCK_K, H, AHEAD, PRECISION, WIDEN)


@triton.jit(do_not_specialize=["first_tile", "tiles", "first", "last", "steps", "batch", "rows"])
def backward_span(
    d_y, gates, cells, y, d_gates, d_h, d_c, h0, c0, w_hh, lengths, starts, counters,
    first_tile, tiles, first, last, steps, batch, rows, y_step, y_row, d_step, d_row,
    MODE: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
    RESIDENT: tl.constexpr, PERSISTENT: tl.constexpr, AHEAD: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Steps [first, last) of T + 1, the pass's last one first; the one more hands the gradient of h over to d_h.

    With one tile of hidden units, resident, T are all.

    Args:
        d_y: (R, J H), or (T, B, J H), rows `d_row` and steps `d_step` apart.
        gates: (J, R, S, H), cells: (J, R, H), as `forward_span` left them; cells None but for an LSTM.
        y: (R, J H), or (T, B, J H), rows `y_row` and steps `y_step` apart; of a GRU, else None.
        d_gates: (J, R, S, H), of the pre-activations; of a GRU those of r, z, n of x, n of h. May be `gates`.
        d_h: (J, B, H), float32: the gradient of the last h, and after all steps that of h0.
        d_c: (J, B, H), float32, the same of c; None but for an LSTM.
        h0: (J, B, H), of a GRU, else None. c0: (J, B, H), in cells' dtype, of an LSTM, else None.
        w_hh: (J, G H, H).
        lengths, starts, BLOCK_K, RESIDENT, AHEAD: see `forward_span`.
        counters: (J, tiles, T + 1), int32, zeros, if PERSISTENT; else None.
    """
    part, job = tl.program_id(0), tl.program_id(1)
    tile = first_tile + tl.program_id(2)
    PARTS: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    CARRY: tl.constexpr = RESIDENT and PARTS == 1 and BLOCK_K == BLOCK_H  # gradients of gates stay in the program
    EACH: tl.constexpr = 1 if MODE == "RNN_TANH" or MODE == "RNN_RELU" else 4
    GATES: tl.constexpr = 3 if MODE == "GRU" else EACH
    N_PLANE: tl.constexpr = 3 if MODE == "GRU" else 2  # where d_gates holds what W_hh's third gate is to be given
    reverse = job == 1
    job64 = tl.cast(job, tl.int64)
    unit = part * BLOCK_H + tl.arange(0, BLOCK_H)
    b = tile * BLOCK_B + tl.arange(0, BLOCK_B)
    row64 = b.to(tl.int64)
    own = unit < H
    kind = d_gates.dtype.element_ty

    w = w_hh + job64 * GATES * H * H
    w0, w1, w2, w3 = None, None, None, None
    if RESIDENT:
        w0 = blocks(w, unit, own, H, BLOCK_K, H)
        if EACH == 4:
            w1 = blocks(w + H * H, unit, own, H, BLOCK_K, H)
            w2 = blocks(w + 2 * H * H, unit, own, H, BLOCK_K, H)
        if MODE == "LSTM":
            w3 = blocks(w + 3 * H * H, unit, own, H, BLOCK_K, H)

    if lengths is None:
        length = tl.where(b < batch, steps, 0)
        longest = steps
    else:
        length = tl.load(lengths + b, mask=b < batch, other=0)
        longest = tl.max(length, 0)
    more = 0 if CARRY else 1
    begin = tl.maximum(first, tl.where(reverse, 0, steps - longest))
    end = tl.minimum(last, tl.where(reverse, longest, steps) + more)
    back = tl.where(reverse, 1, -1)  # from a step to the one that the forward pass made before it
    counter = counters
    if PERSISTENT:
        counter = counters + (job64 * tiles + tile) * (steps + 1)

    inside = own[:, None] & (b < batch)[None, :]
    states = job64 * batch * H + row64[None, :] * H + unit[:, None]
    dh = tl.load(d_h + states, mask=inside, other=0.0)
    if MODE == "LSTM":
        dc = tl.load(d_c + states, mask=inside, other=0.0)

    for s in range(begin, end):
        t = tl.where(reverse, s, steps - 1 - s)
        there = within(t, length)
        mask = own[:, None] & there[None, :]
        row = job64 * rows + place(t, starts, steps, batch, 1)
        before = t + back
        seen, fresh, any_fresh = sources(before, there, length, lengths, steps)
        at = (row + row64[None, :]) * (EACH * H) + unit[:, None]

        # What does not depend on the other programs is asked for before the wait.
        g0 = tl.load(gates + at, mask=mask, other=0.0).to(tl.float32)
        if EACH == 4:
            g1 = tl.load(gates + at + H, mask=mask, other=0.0).to(tl.float32)
            g2 = tl.load(gates + at + 2 * H, mask=mask, other=0.0).to(tl.float32)
            g3 = tl.load(gates + at + 3 * H, mask=mask, other=0.0).to(tl.float32)
        if MODE == "LSTM":
            c = tl.load(cells + (row + row64[None, :]) * H + unit[:, None], mask=mask, other=0.0).to(tl.float32)
            of_before = cells + (job64 * rows + place(before, starts, steps, batch, 1) + row64) * H
            first_c = c0 + (job64 * batch + row64) * H
            c_before = transposed(of_before, seen, first_c, fresh, any_fresh, unit, H).to(tl.float32)
        if MODE == "GRU":
            of_before = y + job64 * H + place(before, starts, steps, y_step, y_row) + row64 * y_row
            first_h = h0 + (job64 * batch + row64) * H
            h_before = transposed(of_before, seen, first_h, fresh, any_fresh, unit, H).to(tl.float32)
        of_y = d_y + job64 * H + place(t, starts, steps, d_step, d_row) + row64[None, :] * d_row + unit[:, None]
        dy = tl.load(of_y, mask=mask, other=0.0).to(tl.float32)

        if not CARRY:
            if PERSISTENT:  # noqa: SIM102 - a condition of the compiler's, and one of the program's
                if s > begin:
                    wait(counter + s - 1, PARTS)
            after = within(t - back, length)
            d = d_gates + (job64 * rows + place(t - back, starts, steps, batch, 1) + row64) * (EACH * H)
            sums = tl.zeros((BLOCK_H, BLOCK_B), tl.float32)
            sums = of_gate(sums, w0, w, d, 0, 0, unit, own, after, H, BLOCK_K, AHEAD, PRECISION, WIDEN)
            if EACH == 4:
                sums = of_gate(sums, w1, w, d, 1, 1, unit, own, after, H, BLOCK_K, AHEAD, PRECISION, WIDEN)
                sums = of_gate(sums, w2, w, d, 2, N_PLANE, unit, own, after, H, BLOCK_K, AHEAD, PRECISION, WIDEN)
            if MODE == "LSTM":
                sums = of_gate(sums, w3, w, d, 3, 3, unit, own, after, H, BLOCK_K, AHEAD, PRECISION, WIDEN)
            dh += sums

        total = dh + dy
        direct = tl.zeros((BLOCK_H, BLOCK_B), tl.float32)
        if MODE == "LSTM":
            tanh_c = tanh(c)
            of_c = dc + total * g3 * (1.0 - tanh_c * tanh_c)
            d0, d1 = of_c * g2 * g0 * (1.0 - g0), of_c * c_before * g1 * (1.0 - g1)
            d2, d3 = of_c * g0 * (1.0 - g2 * g2), total * tanh_c * g3 * (1.0 - g3)
            dc = tl.where(there[None, :], of_c * g1, dc)
        elif MODE == "GRU":
            d2 = total * (1.0 - g1) * (1.0 - g2 * g2)
            d0, d1 = d2 * g3 * g0 * (1.0 - g0), total * (h_before - g2) * g1 * (1.0 - g1)
            d3 = d2 * g0
            direct = total * g1
        elif MODE == "RNN_TANH":
            d0 = total * (1.0 - g0 * g0)
        else:
            d0 = tl.where(g0 > 0.0, total, 0.0)

        d0 = d0.to(kind)
        tl.store(d_gates + at, d0, mask=mask)
        if EACH == 4:
            d1, d2, d3 = d1.to(kind), d2.to(kind), d3.to(kind)
            tl.store(d_gates + at + H, d1, mask=mask)
            tl.store(d_gates + at + 2 * H, d2, mask=mask)
            tl.store(d_gates + at + 3 * H, d3, mask=mask)
        if CARRY:
            direct = multiply_add(w0[0], d0, direct, PRECISION, WIDEN)
            if EACH == 4:
                direct = multiply_add(w1[0], d1, direct, PRECISION, WIDEN)
                direct = multiply_add(w2[0], d3 if MODE == "GRU" else d2, direct, PRECISION, WIDEN)
            if MODE == "LSTM":
                direct = multiply_add(w3[0], d3, direct, PRECISION, WIDEN)
        elif PARTS == 1:
            tl.debug_barrier()
        if PERSISTENT:
            arrive(counter + s)
        dh = tl.where(there[None, :], direct, dh)

    tl.store(d_h + states, dh, mask=inside)
    if MODE == "LSTM":
        tl.store(d_c + states, dc, mask=inside)
