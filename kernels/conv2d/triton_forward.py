"""Convolution, bias, ReLU and max-pool in one Triton kernel: an implicit GEMM over pooled outputs.

Rows of the product are the places of the pooling windows, columns output channels, the sum runs over taps and input
channels. What lies before the pool is never written. A window is taken in rounds of `WIDTH` places: those are rows of
one product, whose sums are reduced to the largest; later rounds keep the largest so far. The bias is added and ReLU
taken after the maximum: both are the same for a window's places, and neither changes which is largest.

Letters: M rows, N columns, K the sum; positions are pooled outputs of all images.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def conv_pool(
    x,
    weight,
    bias,
    y,
    argmax,
    batch,
    out_channels,
    groups,
    height,
    width,
    pooled_height,
    pooled_width,
    x_image,
    x_channel,
    x_row,
    x_column,
    y_image,
    y_channel,
    y_row,
    y_column,
    CHANNELS: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    POOL: tl.constexpr,
    RELU: tl.constexpr,
    DEAD: tl.constexpr,
    FLAT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of positions × output channels of one group.

    Args:
        x: (batch, groups * CHANNELS, height, width) with the strides `x_*`, in elements.
        weight: of each output channel KERNEL_H * KERNEL_W * CHANNELS numbers, channels last; with FLAT channels first.
        bias: (groups * out_channels,) or None.
        y: (batch, groups * out_channels, pooled_height, pooled_width) with the strides `y_*`.
        argmax: uint8 with y's strides, or None: which place of its window, counted by rows, gave an output; DEAD where
            ReLU made it 0.
        out_channels: of a group.
        FLAT: sum over taps and channels as one index, for few channels; else tap by tap.
        WIDTH: places of a window in one product, a power of 2.
        BLOCK_M: positions of a tile, so BLOCK_M * WIDTH rows.
    """
    tiles_n = tl.cdiv(out_channels, BLOCK_N)
    program = tl.program_id(0)
    tile_n = program % tiles_n
    group = program // tiles_n % groups
    first_position = program // tiles_n // groups * BLOCK_M

    rows = tl.arange(0, BLOCK_M * WIDTH)
    position = first_position + rows // WIDTH
    image = position // (pooled_height * pooled_width)
    pooled_row = position // pooled_width % pooled_height
    pooled_column = position % pooled_width
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_column = column < out_channels
    x_group = x + group.to(tl.int64) * CHANNELS * x_channel + image.to(tl.int64) * x_image
    w_group = weight + (group * out_channels + column).to(tl.int64) * (KERNEL_H * KERNEL_W * CHANNELS)

    best = tl.full((BLOCK_M, BLOCK_N), float("-inf"), tl.float32)
    where = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for first in range(0, POOL * POOL, WIDTH):
        place = first + rows % WIDTH
        row = (pooled_row * POOL + place // POOL) * STRIDE_H - PADDING_H
        col = (pooled_column * POOL + place % POOL) * STRIDE_W - PADDING_W
        alive = (image < batch) & (place < POOL * POOL)
        start = x_group + row.to(tl.int64) * x_row + col.to(tl.int64) * x_column
        sums = _products(
            start,
            row,
            col,
            alive,
            w_group,
            in_column,
            height,
            width,
            x_channel,
            x_row,
            x_column,
            CHANNELS,
            KERNEL_H,
            KERNEL_W,
            DILATION_H,
            DILATION_W,
            FLAT,
            PRECISION,
            BLOCK_M * WIDTH,
            BLOCK_N,
            BLOCK_K,
        )
        if WIDTH == 1:
            largest = sums
            found = tl.full((BLOCK_M, BLOCK_N), 0, tl.int32)
        else:
            largest, found = _largest(tl.reshape(sums, (BLOCK_M, WIDTH, BLOCK_N)), first, POOL, WIDTH)
        better = (largest > best) | ((largest != largest) & (best == best))  # the first of equals; NaN above all
        best = tl.where(better, largest, best)
        where = tl.where(better, first + found, where)

    if bias is not None:
        best += tl.load(bias + group * out_channels + column, in_column, 0.0).to(tl.float32)[None, :]
    if RELU:
        dead = best <= 0.0  # false for NaN, which stays
        best = tl.where(dead, 0.0, best)
        where = tl.where(dead, DEAD, where)

    position = first_position + tl.arange(0, BLOCK_M)
    image = position // (pooled_height * pooled_width)
    pooled_row = position // pooled_width % pooled_height
    pooled_column = position % pooled_width
    offset = image.to(tl.int64) * y_image + pooled_row.to(tl.int64) * y_row + pooled_column * y_column
    offset = offset[:, None] + ((group * out_channels + column).to(tl.int64) * y_channel)[None, :]
    mask = (image < batch)[:, None] & in_column[None, :]
    tl.store(y + offset, best.to(y.dtype.element_ty), mask)
    if argmax is not None:
        tl.store(argmax + offset, where.to(tl.uint8), mask)


@triton.jit
def _products(
    start,
    row,
    col,
    alive,
    w_group,
    in_column,
    height,
    width,
    x_channel,
    x_row,
    x_column,
    CHANNELS: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    FLAT: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The convolution's sums at the places whose first tap `start` points to: (ROWS, BLOCK_N), float32."""
    sums = tl.zeros((ROWS, BLOCK_N), tl.float32)
    k = tl.arange(0, BLOCK_K)
    if FLAT:
        TAPS: tl.constexpr = KERNEL_H * KERNEL_W
        for step in range(0, CHANNELS * TAPS, BLOCK_K):
            index = step + k
            tap = index % TAPS
            i = tap // KERNEL_W * DILATION_H
            j = tap % KERNEL_W * DILATION_W
            in_sum = index < CHANNELS * TAPS
            r = row[:, None] + i[None, :]
            c = col[:, None] + j[None, :]
            mask = alive[:, None] & in_sum[None, :] & (r >= 0) & (r < height) & (c >= 0) & (c < width)
            offset = (index // TAPS).to(tl.int64) * x_channel + i * x_row + j * x_column
            a = tl.load(start[:, None] + offset[None, :], mask, 0.0)
            b = tl.load(w_group[None, :] + index[:, None], in_sum[:, None] & in_column[None, :], 0.0)
            sums = tl.dot(a, b, sums, input_precision=PRECISION)
    else:
        BLOCKS: tl.constexpr = (CHANNELS + BLOCK_K - 1) // BLOCK_K
        for step in range(KERNEL_H * KERNEL_W * BLOCKS):
            tap = step // BLOCKS
            channel = step % BLOCKS * BLOCK_K + k
            i = tap // KERNEL_W * DILATION_H
            j = tap % KERNEL_W * DILATION_W
            in_sum = channel < CHANNELS
            r = row + i
            c = col + j
            inside = alive & (r >= 0) & (r < height) & (c >= 0) & (c < width)
            offset = channel.to(tl.int64) * x_channel
            a = tl.load(
                (start + (i * x_row + j * x_column))[:, None] + offset[None, :], inside[:, None] & in_sum[None, :], 0.0
            )
            b = tl.load(
                w_group[None, :] + (tap * CHANNELS + channel)[:, None], in_sum[:, None] & in_column[None, :], 0.0
            )
            sums = tl.dot(a, b, sums, input_precision=PRECISION)
    return sums


@triton.jit
def _largest(sums, first, POOL: tl.constexpr, WIDTH: tl.constexpr):
    """The largest along axis 1 of (M, WIDTH, N) and the first place that holds it; NaN counts as largest."""
    place = tl.arange(0, WIDTH)[None, :, None]
    nan = sums != sums
    clean = tl.where(nan, float("-inf"), sums)
    if POOL * POOL % WIDTH != 0:
        clean = tl.where(first + place < POOL * POOL, clean, float("-inf"))
    largest = tl.max(clean, axis=1, keep_dims=True)
    any_nan = tl.max(nan.to(tl.int32), axis=1, keep_dims=True) != 0
    found = tl.where(any_nan, nan, clean == largest)
    where = tl.min(tl.where(found, place, WIDTH - 1), axis=1)
    return tl.reshape(tl.where(any_nan, float("nan"), largest), where.shape), where
