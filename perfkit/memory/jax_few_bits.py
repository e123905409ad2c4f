"""Numbers in 8 or 4 bits in JAX: blocks of codes, each block with a scale of its own.

Codes are found and read by arithmetic on vectors, since XLA looks numbers up in a table one by one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = {8: 256, 4: 128}
"""Numbers that share a scale, by bits."""


@dataclass(frozen=True)
class Form:
    """What an array is and how it is held.

    Args:
        shape, dtype: of the array; it is rounded in float32.
        signed: whether it has numbers below 0.
        bits: 8 or 4.
        spread: whether devices hold parts of it.
    """

    shape: tuple[int, ...]
    dtype: Any
    signed: bool
    bits: int
    spread: bool = False

    @property
    def block(self) -> int:
        return BLOCK[self.bits]

    @property
    def outer(self) -> tuple[int, ...]:
        """The first dimensions, as many as no block reaches across: what is shared out along them stays local."""
        for dim in range(len(self.shape) - 1, 0, -1):
            if math.prod(self.shape[dim:]) % self.block == 0:
                return self.shape[:dim]
        return ()

    @property
    def inner(self) -> int:
        """Numbers in the other dimensions, in blocks; the last block is filled up."""
        return math.prod(self.shape[len(self.outer) :])

    @property
    def zero(self) -> int:
        """The code of 0."""
        return 2 ** (self.bits - 1) - 1 if self.signed else 0

    @property
    def linear(self) -> bool:
        """Whether the codes mean 1/16, 2/16, …, 1: a second moment of 4 bits, which is divided by and so never 0."""
        return self.bits == 4 and not self.signed

    @property
    def exponents(self) -> range:
        """Of the decades that a magnitude lies in: that of 2ᵉ codes, each of them ten times as large as the last."""
        return range(self.bits - 1) if self.signed else range(1, self.bits)


@partial(jax.tree_util.register_dataclass, data_fields=("codes", "scales"), meta_fields=("form",))
@dataclass(frozen=True)
class Held:
    """An array in few bits.

    Args:
        codes: (*outer, blocks, 256), uint8. In 4 bits (*outer, blocks, 64), of which each holds two.
        scales: (*outer, blocks), float32: each block's largest magnitude.
    """

    codes: Any
    scales: Any
    form: Form


def zeros(form: Form) -> Held:
    """An array of zeros."""
    blocks = (*form.outer, -(-form.inner // form.block))
    code = form.zero | form.zero << 4 if form.bits == 4 else form.zero
    return Held(jnp.full((*blocks, form.block * form.bits // 8), code, jnp.uint8), jnp.zeros(blocks), form)


def held(array: jax.Array, form: Form) -> Held:
    """An array, each number rounded to the nearest that its block can hold; only 0 to 0 where there is no sign.

    Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (2021), section 2; Li et al., "Memory
        Efficient Optimizers with 4-bit States" (2023), section 4.1
    """
    rows = array.astype(jnp.float32).reshape(*form.outer, form.inner)
    if short := -form.inner % form.block:
        rows = jnp.pad(rows, (0, short))
    blocks = rows.reshape(*form.outer, -1, form.block)
    scales = jnp.abs(blocks).max(-1)
    codes = _codes(blocks / jnp.where(scales == 0, 1, scales)[..., None], form).astype(jnp.uint8)
    if form.bits == 4:
        codes = codes[..., : form.block // 2] | codes[..., form.block // 2 :] << 4
    return Held(codes, scales, form)


def in_full(there: Held) -> jax.Array:
    """The array again."""
    form, codes = there.form, there.codes
    if form.bits == 4:
        codes = jnp.concatenate([codes & 15, codes >> 4], -1)
    blocks = _shares(codes.astype(jnp.float32), form) * there.scales[..., None]
    return blocks.reshape(*form.outer, -1)[..., : form.inner].reshape(form.shape).astype(form.dtype)


def _codes(shares: jax.Array, form: Form) -> jax.Array:
    """The codes whose meanings are nearest to shares of the scale, as float32.

    A magnitude's decade is the last that begins below it, half-way from the one before; within it steps are even.
    """
    if form.linear:
        return jnp.clip(jnp.floor(16 * shares - 0.5), 0, 15)
    size, (first, *others) = jnp.abs(shares), form.exponents
    steps, unit = jnp.full_like(size, 2.0**first), jnp.full_like(size, 10.0 ** (len(form.exponents) - 1))
    for at, exponent in enumerate(others):
        below, above = _meaning(2.0**exponent - 1, form), _meaning(2.0**exponent, form)
        beyond = size >= np.float32((below + above) / 2)
        steps = jnp.where(beyond, 2.0**exponent, steps)
        unit = jnp.where(beyond, 10.0 ** (len(form.exponents) - 2 - at), unit)
    number = steps + jnp.clip(jnp.floor((size * unit - 0.1) * (steps / 0.9)), 0, steps - 1)
    last = 2.0 ** (form.exponents[-1] + 1)
    whole = size >= np.float32((1 + _meaning(last - 1, form)) / 2)
    # A second moment is divided by: what is too small for a code takes the smallest, and is not taken for 0.
    nothing = size < np.float32(_meaning(2.0**first, form) / 2) if form.signed else size == 0
    if form.signed:
        signed = jnp.where(shares < 0, -number, jnp.where(whole, last, number))  # there is a 1, and no -1
        return form.zero + jnp.where(nothing, 0, signed)
    return jnp.where(nothing, 0, jnp.where(whole, last, number) - 1)


def _shares(codes: jax.Array, form: Form) -> jax.Array:
    """What codes mean, as shares of the scale; float32 in and out."""
    if form.linear:
        return (codes + 1) / 16
    first, last = 2.0 ** form.exponents[0], 2.0 ** (form.exponents[-1] + 1)
    number = jnp.abs(codes - form.zero) if form.signed else codes + 1
    bits = jax.lax.bitcast_convert_type(jnp.maximum(number, first), jnp.int32)
    exponent = (bits >> 23) - 127
    half_step = jax.lax.bitcast_convert_type(126 - exponent << 23, jnp.float32)
    fraction = jax.lax.bitcast_convert_type(bits & 2**23 - 1 | 127 << 23, jnp.float32) - 1
    unit = jnp.full_like(codes, 10.0 ** (1 - len(form.exponents)))
    for at, known in enumerate(form.exponents):
        unit = jnp.where(exponent >= known, np.float32(10.0 ** (1 + at - len(form.exponents))), unit)
    size = unit * (0.1 + 0.9 * (fraction + half_step))
    size = jnp.where(number < first, 0, jnp.where(number == last, 1, size))
    return jnp.where(codes < form.zero, -size, size) if form.signed else size


def _meaning(number: float, form: Form) -> float:
    """The magnitude of number 2ᵉ + j: the middle of part j of 2ᵉ, of a tenth to the whole of its decade."""
    exponent = math.floor(math.log2(number))
    fraction = (number + 0.5) / 2**exponent - 1
    return 10.0 ** (exponent - form.exponents[-1]) * (0.1 + 0.9 * fraction)
