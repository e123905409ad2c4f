"""What both Triton kernels of the recurrent op are made of: activations, products, tiles of gates, waiting.

Nothing here but what Triton's interpreter can run too: no libdevice, no inline assembly.
"""

from __future__ import annotations

import triton
import triton.language as tl

HAS_POLL = tl.constexpr(hasattr(tl, "atomic_poll"))
"""Triton 3.9 has one operation that waits for a value."""

# tanh(x) / x - 1 by powers of x^2, for |x| < 0.55: least squares on Chebyshev points
TANH_1 = tl.constexpr(-0.333332837)
TANH_2 = tl.constexpr(0.133280382)
TANH_3 = tl.constexpr(-0.0530990735)
TANH_4 = tl.constexpr(0.01716928)
TANH_NEAR = tl.constexpr(0.3025)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """Relative error below 3e-7 in float32; near 0 too, where a formula of exponentials alone has no digits left."""
    square = x * x
    near = (((TANH_4 * square + TANH_3) * square + TANH_2) * square + TANH_1) * square * x + x
    decay = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - decay) / (1.0 + decay)
    return tl.where(square < TANH_NEAR, near, tl.where(x < 0, -far, far))


@triton.jit
def multiply_add(a, b, sums, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """a b + sums in float32. WIDEN is for the interpreter, which multiplies bfloat16 as if it were integers."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision=PRECISION)


@triton.jit
def block(w, rows, mask, k, H: tl.constexpr, STRIDE: tl.constexpr):
    """Columns `k` of a matrix of H columns, STRIDE apart, whose rows start at `rows`."""
    return tl.load(w + rows[:, None] + k[None, :] * STRIDE, mask=mask[:, None] & (k < H)[None, :], other=0.0)


@triton.jit
def blocks(w, rows, mask, H: tl.constexpr, BLOCK_K: tl.constexpr, STRIDE: tl.constexpr):
    """All columns, BLOCK_K at a time: a product of more at once would hold too much in registers."""
    found = ()
    for i in tl.static_range((H + BLOCK_K - 1) // BLOCK_K):
        k = i * BLOCK_K + tl.arange(0, BLOCK_K)
        found = found + (block(w, rows, mask, k, H, STRIDE),)  # noqa: RUF005 - no star in Triton
    return found


@triton.jit
def product(
    sums, w_blocks, w, rows, mask, source, there, first, fresh, any_fresh, H: tl.constexpr, BLOCK_K: tl.constexpr,
    STRIDE: tl.constexpr, AHEAD: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """sums + W s^T: W as `blocks` gave it, or read again if that is None; s as `transposed` reads it.

    What is read is asked for before any of it is waited for: of s as much as registers hold where W is there, else of
    both AHEAD - 1 blocks.
    """
    if w_blocks is None:
        for start in tl.range(0, H, BLOCK_K, num_stages=AHEAD):
            k = start + tl.arange(0, BLOCK_K)
            right = transposed(source, there, first, fresh, any_fresh, k, H)
            sums = multiply_add(block(w, rows, mask, k, H, STRIDE), right, sums, PRECISION, WIDEN)
    else:
        COUNT: tl.constexpr = (H + BLOCK_K - 1) // BLOCK_K
        TOGETHER: tl.constexpr = ((1024 if sums.shape[1] <= 16 else 256) + BLOCK_K - 1) // BLOCK_K
        for start in tl.static_range(0, COUNT, TOGETHER):
            found = ()
            for i in tl.static_range(TOGETHER):
                if start + i < COUNT:
                    k = (start + i) * BLOCK_K + tl.arange(0, BLOCK_K)
                    found = found + (columns(source, there, k, H),)  # noqa: RUF005 - no star in Triton
            for i in tl.static_range(TOGETHER):
                if start + i < COUNT:
                    k = (start + i) * BLOCK_K + tl.arange(0, BLOCK_K)
                    right = with_first(found[i], first, fresh, any_fresh, k, H)
                    sums = multiply_add(w_blocks[start + i], right, sums, PRECISION, WIDEN)
    return sums


@triton.jit
def transposed(source, there, first, fresh, any_fresh, k, H: tl.constexpr):
    """Columns `k` of rows, as rows: of those of `source` where `there`, of those of `first` where `fresh`."""
    return with_first(columns(source, there, k, H), first, fresh, any_fresh, k, H)


@triton.jit
def columns(source, there, k, H: tl.constexpr):
    """Columns `k` of the rows that `source` points to, as rows, where `there`.

    They come past the first-level cache, which may hold what was there before another program wrote them.
    """
    return tl.load(
        source[None, :] + k[:, None], mask=(k < H)[:, None] & there[None, :], other=0.0, cache_modifier=".cg"
    )


@triton.jit
def with_first(found, first, fresh, any_fresh, k, H: tl.constexpr):
    """`found`, but the columns of `first` where `fresh`."""
    if first is not None:  # noqa: SIM102 - a condition of the compiler's, and one of the program's
        if any_fresh:
            # not pointers to one or the other: AMD's compiler does not take them
            others = tl.load(first[None, :] + k[:, None], mask=(k < H)[:, None] & fresh[None, :], other=0.0)
            found = tl.where(fresh[None, :], others, found)
    return found


@triton.jit
def within(t, length):
    """Which rows have a step `t`; a number for each row, as 3.9's interpreter combines no one condition with many."""
    t = t + tl.zeros_like(length)
    return (t >= 0) & (t < length)


@triton.jit
def sources(t, there, length, lengths, steps):
    """Of the rows that are `there`: which have a step `t`; which start from the first state instead; if any do.

    Of rows that all have the same length, all do or none.
    """
    seen = there & within(t, length)
    fresh = there ^ seen
    any_fresh = (t < 0) | (t >= steps) if lengths is None else tl.max(fresh.to(tl.int32), 0) > 0
    return seen, fresh, any_fresh


@triton.jit
def apart(tile, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr):
    """(4 BLOCK_H, BLOCK_B) with the four rows of a unit next to each other, as four (BLOCK_H, BLOCK_B)."""
    even, odd = tl.split(tl.permute(tl.reshape(tile, (BLOCK_H, 2, 2, BLOCK_B)), (0, 3, 1, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def wait(counter, arrivals):
    """Until `arrivals` programs have called `arrive`; what they stored before is seen after."""
    if HAS_POLL:
        tl.atomic_poll(counter, arrivals, sem="acquire")
    else:
        while tl.atomic_add(counter, 0, sem="acquire") < arrivals:
            pass


@triton.jit
def arrive(counter):
    """Tell those who `wait` that all threads of this program have stored what they had to."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release")


@triton.jit
def place(t, starts, steps, step, row):
    """Where step `t` starts, in elements, int64: rows are `row` apart, steps `step`, or as `starts` tells, in rows.

    Steps that are not there have some place that nothing may be read from.
    """
    if starts is None:
        offset = tl.cast(t, tl.int64) * step
    else:
        offset = tl.load(starts + t, mask=(t >= 0) & (t < steps), other=0) * row
    return offset
