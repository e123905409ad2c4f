"""Convolution, bias, ReLU and max-pool in one Pallas kernel for TPU; its gradients are XLA's convolutions.

XLA's own convolution is hard to beat: this saves the pass through memory between it and the pool, and is taken only
where an image fits into VMEM. Not yet measured on a TPU.

Rows and columns of the image are dealt out to phases, by their remainder modulo the pool's size times the stride. In a
phase, what one tap sees at one place of all windows is a plain shift of the image, laid out as one long line of pixels:
each is a product (pixels, channels) x (channels, outputs), without gathers. Pixels at the end of a row see the start of
the next one; those outputs are cut off.

Letters: N images, O output channels, P the pool's side.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from perfkit.kernels.conv2d.problem import DEAD, Problem

FEW_CHANNELS = 8
LANES = 128
TILE = 32
"""Pixels of a tile of VMEM, for bytes; fewer for wider numbers."""

MOST_PIXELS = 256
"""Of one product."""

MOST_PRODUCTS = 1024
"""They are written out one by one."""

MOST_VMEM_BYTES = 12 << 20
"""Of the 16 MiB that every TPU has."""


class Phases(NamedTuple):
    """How an image is dealt out; see the module's head.

    Args:
        rows, columns: how many phases there are: the pool's side times the stride.
        width: of a phase's lines.
        pixels: of an output, lines as wide as `width`, a multiple of `TILE`.
        height: of a phase, in lines that hold all that the last pixel sees.
    """

    rows: int
    columns: int
    width: int
    pixels: int
    height: int


def refusal(problem: Problem) -> str | None:
    """Why the kernel cannot, or should not, take `problem`; None where it can."""
    if problem.pool == 1:
        return "without a pool it saves no pass through memory, and XLA's convolution is faster"
    if problem.dtype not in ("float32", "bfloat16"):
        return f"TPUs multiply bfloat16 and float32, and the arrays are {problem.dtype}"
    if problem.groups > 1 or problem.inputs < FEW_CHANNELS:
        return f"{problem.inputs} channels in {problem.groups} groups leave the matrix unit idle"
    phases = _phases(problem)
    count = -(-phases.pixels // MOST_PIXELS) * problem.pool**2 * problem.kernel_height * problem.kernel_width
    if count > MOST_PRODUCTS:
        return f"it would be {count} products written out, and {MOST_PRODUCTS} are the most"
    if (needed := _vmem_bytes(problem, phases)) > MOST_VMEM_BYTES:
        return f"an image and its output take {needed >> 20} MiB of VMEM, and {MOST_VMEM_BYTES >> 20} are the most"
    return None


def forward(
    problem: Problem,
    x: Array,
    weight: Array,
    bias: Array | None,
    configuration: Sequence[tuple[str, int]] = (),
    interpret: Any = False,
) -> tuple[Array, Array | None]:
    """y and argmax; see the package's head. `interpret` is as `pallas_call` takes it."""
    _nothing_to_configure(configuration)
    phases, (height, width) = _phases(problem), problem.out_size
    block = problem.outputs if problem.outputs % LANES else LANES
    out = pl.BlockSpec((None, phases.pixels, block), lambda n, o: (n, 0, o))
    shape = (problem.batch, phases.pixels, problem.outputs)
    dealt = _dealt(problem, phases, x)
    taps = problem.kernel_height * problem.kernel_width
    bias = jnp.zeros(problem.outputs, jnp.float32) if bias is None else bias.astype(jnp.float32)
    dtypes = [x.dtype, *([jnp.int32] if problem.saves_argmax else [])]
    found = pl.pallas_call(
        functools.partial(_kernel, problem, phases),
        grid=(problem.batch, problem.outputs // block),
        in_specs=[
            pl.BlockSpec((None, *dealt.shape[1:]), lambda n, _: (n, 0, 0, 0)),
            pl.BlockSpec((taps, problem.inputs, block), lambda _, o: (0, 0, o)),
            pl.BlockSpec((1, block), lambda _, o: (0, o)),
        ],
        out_specs=[out] * len(dtypes),
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for dtype in dtypes],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
    )(dealt, weight.reshape(taps, problem.inputs, problem.outputs), bias[None])
    images = [
        flat[:, : height * phases.width].reshape(problem.batch, height, phases.width, -1)[:, :, :width]
        for flat in found
    ]
    return images[0], images[1].astype(jnp.uint8) if problem.saves_argmax else None


def backward(
    problem: Problem,
    x: Array,
    weight: Array,
    argmax: Array | None,
    d_y: Array,
    wanted: Sequence[bool],
    configuration: Sequence[tuple[str, int]] = (),
) -> tuple[Array | None, Array | None, Array | None]:
    """The gradients of x, weight and bias, by XLA; see the package's head."""
    _nothing_to_configure(configuration)
    (height, width), pool = problem.out_size, problem.pool
    places = jnp.arange(pool**2, dtype=jnp.uint8).reshape(pool, 1, pool, 1)
    here = argmax[:, :, None, :, None] == places
    d_z = jnp.where(here, d_y[:, :, None, :, None], 0).reshape(problem.batch, height * pool, width * pool, -1)
    below, right = problem.conv_size[0] - height * pool, problem.conv_size[1] - width * pool
    d_z = jnp.pad(d_z, ((0, 0), (0, below), (0, right), (0, 0)))
    _, pull = jax.vjp(functools.partial(_conv, problem), x, weight)
    d_x, d_weight = pull(d_z)
    d_bias = jnp.sum(d_y, (0, 1, 2), jnp.float32, where=argmax != DEAD).astype(d_y.dtype) if problem.bias else None
    return tuple(each if want else None for each, want in zip((d_x, d_weight, d_bias), wanted, strict=True))


def _nothing_to_configure(configuration: Sequence[tuple[str, int]]) -> None:
    if configuration:
        raise ValueError(f"configuration is {configuration}: expected none, blocks follow from the problem")


def _conv(problem: Problem, x: Array, weight: Array) -> Array:
    top, bottom, left, right = problem.padding
    return lax.conv_general_dilated(
        x,
        weight,
        problem.stride,
        ((top, bottom), (left, right)),
        rhs_dilation=problem.dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=problem.groups,
        precision=_precision(problem),
    )


def _kernel(problem: Problem, phases: Phases, x_ref, w_ref, bias_ref, y_ref, argmax_ref=None) -> None:
    """One image, one block of output channels."""
    for first in range(0, phases.pixels, MOST_PIXELS):
        count = min(MOST_PIXELS, phases.pixels - first)
        best = where = None
        for place in range(problem.pool**2):
            sums = jnp.zeros((count, y_ref.shape[-1]), jnp.float32)
            for tap, phase, shift in _seen(problem, phases, place):
                pixels = x_ref[phase, pl.ds(first + shift, count), :]
                sums += jnp.dot(pixels, w_ref[tap], preferred_element_type=jnp.float32, precision=_precision(problem))
            if best is None:
                best, where = sums, jnp.zeros(sums.shape, jnp.int32)
            else:
                better = (sums > best) | (sums != sums)  # the first of equals; NaN above all
                best, where = jnp.where(better, sums, best), jnp.where(better, place, where)
        best = best + bias_ref[...]
        if problem.activation == "relu":
            dead = best <= 0  # false for NaN, which stays
            best, where = jnp.where(dead, 0.0, best), jnp.where(dead, DEAD, where)
        y_ref[pl.ds(first, count), :] = best.astype(y_ref.dtype)
        if argmax_ref is not None:
            argmax_ref[pl.ds(first, count), :] = where


def _seen(problem: Problem, phases: Phases, place: int) -> Iterator[tuple[int, int, int]]:
    """Each tap's number, and where it sees a place of the window: the phase, and the shift along it in pixels."""
    for tap in range(problem.kernel_height * problem.kernel_width):
        i, j = divmod(tap, problem.kernel_width)
        row = place // problem.pool * problem.stride[0] + i * problem.dilation[0]
        column = place % problem.pool * problem.stride[1] + j * problem.dilation[1]
        phase = row % phases.rows * phases.columns + column % phases.columns
        yield tap, phase, row // phases.rows * phases.width + column // phases.columns


def _phases(problem: Problem) -> Phases:
    rows, columns = (problem.pool * stride for stride in problem.stride)
    height, width = problem.out_size
    down = ((problem.pool - 1) * problem.stride[0] + (problem.kernel_height - 1) * problem.dilation[0]) // rows
    along = ((problem.pool - 1) * problem.stride[1] + (problem.kernel_width - 1) * problem.dilation[1]) // columns
    wide = width + along
    pixels = _round(height * wide, TILE)
    return Phases(rows, columns, wide, pixels, -(-(pixels + down * wide + along) // wide))


def _dealt(problem: Problem, phases: Phases, x: Array) -> Array:
    """x by phases: (N, phases, pixels, channels)."""
    top, _, left, _ = problem.padding
    below = phases.rows * phases.height - problem.height - top
    right = phases.columns * phases.width - problem.width - left
    x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (top, below, 0), (left, right, 0), (0, 0, 0)))
    x = x.reshape(problem.batch, phases.height, phases.rows, phases.width, phases.columns, problem.inputs)
    x = x.transpose(0, 2, 4, 1, 3, 5)
    return x.reshape(problem.batch, phases.rows * phases.columns, phases.height * phases.width, problem.inputs)


def _vmem_bytes(problem: Problem, phases: Phases) -> int:
    """Two buffers of each block, of lines of 128 channels."""
    size = 4 if problem.dtype == "float32" else 2
    inputs, block = _round(problem.inputs, LANES), min(_round(problem.outputs, LANES), LANES)
    block = block if problem.outputs % LANES == 0 else _round(problem.outputs, LANES)
    image = phases.rows * phases.columns * phases.height * phases.width * inputs * size
    weight = problem.kernel_height * problem.kernel_width * _round(problem.inputs, TILE) * block * size
    out = phases.pixels * block * (size + (4 if problem.saves_argmax else 0))
    return 2 * (image + weight + out) + 4 * MOST_PIXELS * block * 4


def _precision(problem: Problem) -> lax.Precision:
    """float32 as float32: the matrix unit would round it to bfloat16."""
    return lax.Precision.HIGHEST if problem.dtype == "float32" else lax.Precision.DEFAULT


def _round(size: int, to: int) -> int:
    return -(-size // to) * to
