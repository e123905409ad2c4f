"""The two Triton kernels of linear_int8: rows of floats to integers, and the integer product with all that follows it.

Letters: M rows, N outputs, K inputs.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def quantize_rows(x, q, scale, inputs, BLOCK_K: tl.constexpr):
    """One row of x, any float dtype, as integers and their scale; see the package's head.

    Args:
        x, q: (M, inputs), contiguous; q int8.
        scale: (M,), float32.
        BLOCK_K: inputs at a time; the row is read twice.
    """
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    most = tl.zeros((BLOCK_K,), tl.float32)
    nan = tl.zeros((BLOCK_K,), tl.int32)
    for start in range(0, inputs, BLOCK_K):
        value = tl.abs(tl.load(x + row * inputs + start + k, start + k < inputs, 0.0).to(tl.float32))
        nan = tl.where(value != value, 1, nan)  # which a maximum passes over
        most = tl.where(value > most, value, most)
    largest = tl.max(most, axis=0)
    finite = (largest < float("inf")) & (tl.max(nan, axis=0) == 0)
    usable = finite & (largest > 1e-30)
    inverse = tl.where(usable, tl.div_rn(127.0, tl.where(usable, largest, 1.0)), 0.0)
    tl.store(scale + row, tl.where(usable, tl.div_rn(largest, 127.0), tl.where(finite, 0.0, float("nan"))))
    for start in range(0, inputs, BLOCK_K):
        inside = start + k < inputs
        value = tl.load(x + row * inputs + start + k, inside, 0.0).to(tl.float32)
        value = tl.where(usable, value, 0.0) * inverse
        rounded = (value + 12582912.0) - 12582912.0  # 1.5 * 2^23: nearest, ties to even
        tl.store(q + row * inputs + start + k, rounded.to(tl.int8), inside)


@triton.jit
def product(
    x,
    x_scale,
    weight,
    weight_scale,
    bias,
    y,
    rows,
    outputs,
    inputs,
    ONE_SCALE: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One tile of y.

    Args:
        x: (rows, inputs), int8, contiguous; weight: (outputs, inputs), int8, contiguous.
        x_scale: (rows,), or (1,) with ONE_SCALE; weight_scale: (outputs,); bias: (outputs,) or None; float32.
        y: (rows, outputs), contiguous, any float dtype.
        GROUP_M: tiles of rows that programs take before they go on to the next outputs, to find weights in the cache.
    """
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(outputs, BLOCK_N)
    program = tl.program_id(0)
    first = program // (GROUP_M * tiles_n) * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    m = (first + program % (GROUP_M * tiles_n) % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = program % (GROUP_M * tiles_n) // height * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    in_rows = m < rows
    in_outputs = n < outputs
    x_row = x + m.to(tl.int64)[:, None] * inputs
    weight_row = weight + n.to(tl.int64)[None, :] * inputs

    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(0, inputs, BLOCK_K):
        inside = start + k < inputs
        a = tl.load(x_row + (start + k)[None, :], in_rows[:, None] & inside[None, :], 0)
        b = tl.load(weight_row + (start + k)[:, None], in_outputs[None, :] & inside[:, None], 0)
        sums = tl.dot(a, b, sums, out_dtype=tl.int32)

    if ONE_SCALE:
        value = sums.to(tl.float32) * tl.load(x_scale)
    else:
        value = sums.to(tl.float32) * tl.load(x_scale + m, in_rows, 0.0)[:, None]
    value = value * tl.load(weight_scale + n, in_outputs, 0.0)[None, :]
    if bias is not None:
        value += tl.load(bias + n, in_outputs, 0.0)[None, :]
    if RELU:
        value = tl.where(value < 0.0, 0.0, value)  # which keeps NaN
    offset = m.to(tl.int64)[:, None] * outputs + n[None, :]
    tl.store(y + offset, value.to(y.dtype.element_ty), in_rows[:, None] & in_outputs[None, :])
