"""Gradients of convolution, bias, ReLU and max-pool in Triton, straight from the pooled outputs' gradient.

The gradient before the pool, d_z, is d_y where a place gave its window's output and 0 elsewhere; made tile by tile
as it is read and never written. `argmax` tells which place that was; none has the code that ReLU leaves. Where nothing
is pooled and there is no ReLU it is None, and d_z is d_y.

Both are implicit GEMMs. Sums over images are split into slabs of fixed size, each written on its own: no atomics, the
same call gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _before_pool(d_y, argmax, offset, mask, place):
    """d_z at `offset` into d_y, at a `place` of the window."""
    d_z = tl.load(d_y + offset, mask, 0.0)
    if argmax is not None:
        d_z = tl.where(tl.load(argmax + offset, mask, 0).to(tl.int32) == place, d_z, 0.0)
    return d_z


@triton.jit
def conv_pool_weight(
    x,
    d_y,
    argmax,
    d_weight,
    d_bias,
    batch,
    out_channels,
    groups,
    height,
    width,
    pooled_height,
    pooled_width,
    slab,
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
    FLAT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of output channels × (tap, input channel) of one group, summed over one slab of places.

    Args:
        x: (batch, groups * CHANNELS, height, width) with the strides `x_*`.
        d_y, argmax: (batch, groups * out_channels, pooled_height, pooled_width) with the strides `y_*`.
        d_weight: (slabs, groups * out_channels, KERNEL_H * KERNEL_W * CHANNELS), float32, contiguous; the last with
            channels last, or first with FLAT.
        d_bias: (slabs, groups * out_channels), float32, or None.
        slab: places before the pool that one program sums over, a multiple of BLOCK_K.
        BLOCK_M: output channels; BLOCK_N: taps and input channels; BLOCK_K: places at a time.
    """
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    SIZE: tl.constexpr = TAPS * CHANNELS
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK_N - 1) // BLOCK_N
    TILES_N: tl.constexpr = (SIZE + BLOCK_N - 1) // BLOCK_N if FLAT else TAPS * BLOCKS
    tiles_m = tl.cdiv(out_channels, BLOCK_M)
    program = tl.program_id(0)
    tile_n = program % TILES_N
    tile_m = program // TILES_N % tiles_m
    group = program // TILES_N // tiles_m % groups
    part = program // TILES_N // tiles_m // groups

    out = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    in_out = out < out_channels
    columns = tl.arange(0, BLOCK_N)
    if FLAT:
        index = tile_n * BLOCK_N + columns
        tap = index % TAPS
        channel = index // TAPS
        in_columns = index < SIZE
    else:
        tap = tile_n // BLOCKS + columns * 0
        channel = tile_n % BLOCKS * BLOCK_N + columns
        index = tap * CHANNELS + channel
        in_columns = channel < CHANNELS
    i = tap // KERNEL_W * DILATION_H - PADDING_H
    j = tap % KERNEL_W * DILATION_W - PADDING_W
    x_tap = x + (group * CHANNELS + channel).to(tl.int64) * x_channel + i.to(tl.int64) * x_row + j * x_column
    d_y_out = (group * out_channels + out).to(tl.int64) * y_channel

    conv_height = pooled_height * POOL
    conv_width = pooled_width * POOL
    total = batch * conv_height * conv_width
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    bias = tl.zeros((BLOCK_M,), tl.float32)
    for step in range(0, slab, BLOCK_K):
        place = part * slab + step + tl.arange(0, BLOCK_K)
        alive = place < total
        image = (place // (conv_height * conv_width)).to(tl.int64)
        p = place // conv_width % conv_height
        q = place % conv_width
        offset = image * y_image + (p // POOL).to(tl.int64) * y_row + q // POOL * y_column
        d_z = _before_pool(
            d_y,
            argmax,
            offset[:, None] + d_y_out[None, :],
            alive[:, None] & in_out[None, :],
            (p % POOL * POOL + q % POOL)[:, None],
        )
        row = p * STRIDE_H
        col = q * STRIDE_W
        offset = image * x_image + row.to(tl.int64) * x_row + col.to(tl.int64) * x_column
        r = row[:, None] + i[None, :]
        c = col[:, None] + j[None, :]
        inside = (r >= 0) & (r < height) & (c >= 0) & (c < width) & alive[:, None] & in_columns[None, :]
        a = tl.load(x_tap[None, :] + offset[:, None], inside, 0.0)
        sums = tl.dot(tl.trans(d_z), a, sums, input_precision=PRECISION)
        if d_bias is not None:
            bias += tl.sum(d_z.to(tl.float32), axis=0)

    line = part.to(tl.int64) * groups * out_channels + group * out_channels + out
    tl.store(d_weight + line[:, None] * SIZE + index[None, :], sums, in_out[:, None] & in_columns[None, :])
    if d_bias is not None:
        tl.store(d_bias + line, bias, in_out & (tile_n == 0))


@triton.jit
def conv_pool_input(
    d_y,
    argmax,
    weight,
    d_x,
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
    FLAT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of input positions × input channels of one group, gathered from the outputs that read them.

    Positions of a tile are equal modulo the stride: so a tap reads outputs for all of them or for none.

    Args:
        d_y, argmax: (batch, groups * out_channels, pooled_height, pooled_width) with the strides `y_*`.
        weight: of each output channel KERNEL_H * KERNEL_W * CHANNELS numbers, channels last; with FLAT channels first.
        d_x: (batch, groups * CHANNELS, height, width) with the strides `x_*`.
        BLOCK_M: positions; BLOCK_N: input channels; BLOCK_K: output channels at a time.
    """
    PHASES: tl.constexpr = STRIDE_H * STRIDE_W
    TILES_N: tl.constexpr = (CHANNELS + BLOCK_N - 1) // BLOCK_N
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    program = tl.program_id(0)
    tile_n = program % TILES_N
    group = program // TILES_N % groups
    phase = program // TILES_N // groups % PHASES
    position = program // TILES_N // groups // PHASES * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.cdiv(height, STRIDE_H)
    columns = tl.cdiv(width, STRIDE_W)
    image = position // (rows * columns)
    row = position // columns % rows * STRIDE_H + phase // STRIDE_W
    col = position % columns * STRIDE_W + phase % STRIDE_W
    alive = (image < batch) & (row < height) & (col < width)
    channel = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_channel = channel < CHANNELS
    W_TAP: tl.constexpr = 1 if FLAT else CHANNELS
    W_CHANNEL: tl.constexpr = TAPS if FLAT else 1
    w_channel = weight + group.to(tl.int64) * out_channels * TAPS * CHANNELS + channel * W_CHANNEL
    start = image.to(tl.int64) * y_image + group.to(tl.int64) * out_channels * y_channel

    blocks = tl.cdiv(out_channels, BLOCK_K)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(TAPS * blocks):
        tap = step // blocks
        above = PADDING_H - tap // KERNEL_W * DILATION_H
        left = PADDING_W - tap % KERNEL_W * DILATION_W
        hit = True
        if PHASES > 1:
            hit = ((phase // STRIDE_W + above) % STRIDE_H == 0) & ((phase % STRIDE_W + left) % STRIDE_W == 0)
        if hit:
            p = row + above
            q = col + left
            inside = alive & (p >= 0) & (q >= 0)
            p = p // STRIDE_H
            q = q // STRIDE_W
            inside = inside & (p < pooled_height * POOL) & (q < pooled_width * POOL)
            out = step % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
            in_out = out < out_channels
            offset = start + (p // POOL).to(tl.int64) * y_row + q // POOL * y_column
            d_z = _before_pool(
                d_y,
                argmax,
                offset[:, None] + (out.to(tl.int64) * y_channel)[None, :],
                inside[:, None] & in_out[None, :],
                (p % POOL * POOL + q % POOL)[:, None],
            )
            w = tl.load(
                w_channel[None, :] + (out * (TAPS * CHANNELS) + tap * W_TAP)[:, None],
                in_out[:, None] & in_channel[None, :],
                0.0,
            )
            sums = tl.dot(d_z, w, sums, input_precision=PRECISION)

    offset = image.to(tl.int64) * x_image + row.to(tl.int64) * x_row + col.to(tl.int64) * x_column
    offset = offset[:, None] + ((group * CHANNELS + channel).to(tl.int64) * x_channel)[None, :]
    tl.store(d_x + offset, sums.to(d_x.dtype.element_ty), alive[:, None] & in_channel[None, :])
