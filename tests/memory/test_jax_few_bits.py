"""Numbers in 8 and 4 bits: each is rounded to the nearest that its block can hold; the codes are torchao's."""

import numpy as np
import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp

from perfkit.memory.jax_few_bits import BLOCK, Form, held, in_full, zeros

KINDS = [(True, 8), (False, 8), (True, 4), (False, 4)]
SHAPES = [(4096,), (5000, 1), (33, 512), (3, 3, 16, 48), (7, 800)]
"""Blocks end with a row, reach over some, or over all, and the last one is filled up."""


def form_of(shape, signed, bits):
    return Form(shape, np.dtype("float32"), signed, bits)


def numbers(signed, shape):
    """Over many decades, as moments are, with a block of zeros."""
    rng = np.random.default_rng(1)
    found = rng.normal(size=shape) * 10 ** rng.uniform(-7, 0, shape)
    found.ravel()[:256] = 0
    return (found if signed else np.abs(found)).astype(np.float32)


def meanings(signed, bits):
    """What the codes mean, written down from the papers: decades of even steps, each with twice as many; 0 and 1."""
    if bits == 4 and not signed:
        return np.linspace(0, 1, 17)[1:]
    found = [0.0, 1.0]
    for decade in range(bits - 1):
        edges = np.linspace(0.1, 1, 2**decade * (1 if signed else 2) + 1) * 10.0 ** (decade - bits + 2)
        found += [*(edges[:-1] + edges[1:]) / 2, *(-(edges[:-1] + edges[1:]) / 2 if signed else ())]
    return np.array(sorted(found))


@pytest.mark.parametrize(("signed", "bits"), KINDS)
def test_all_that_can_be_held_is_held_as_it_is(signed, bits):
    """To a few roundings of float32."""
    values = np.resize(meanings(signed, bits), 4096).astype(np.float32)
    found = in_full(jax.jit(held, static_argnums=1)(values, form_of((4096,), signed, bits)))
    np.testing.assert_allclose(found, values, rtol=8 * 2.0**-24)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("signed", "bits"), KINDS)
def test_each_number_is_rounded_to_the_nearest_of_its_block(signed, bits, shape):
    """To a few roundings of float32, of the share of the scale and of its product with the scale."""
    given, block = numbers(signed, shape), BLOCK[bits]
    there = held(jnp.asarray(given), form_of(shape, signed, bits))
    found = np.asarray(in_full(there))
    assert found.shape == shape
    blocks = np.pad(given.ravel(), (0, -given.size % block)).reshape(-1, block).astype(np.float64)
    scales = np.abs(blocks).max(1, keepdims=True)
    assert there.codes.nbytes == blocks.size * bits // 8
    np.testing.assert_array_equal(np.asarray(there.scales).ravel(), scales.ravel())
    distances = np.abs(blocks[..., None] - scales[..., None] * meanings(signed, bits))
    if not signed and bits == 8:
        distances[..., 0][blocks > 0] = np.inf  # a second moment is divided by: none but 0 is taken for 0
    nearest = distances.min(-1).ravel()[: given.size]
    off = np.abs(found.ravel().astype(np.float64) - given.ravel())
    assert (off <= nearest + 4 * 2.0**-24 * np.repeat(scales, block)[: given.size]).all()


@pytest.mark.parametrize(("signed", "bits"), KINDS)
def test_the_codes_are_torchaos(signed, bits):
    """But where a number lies between two of them, which few do, and where torchao takes a second moment for 0."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("torchao")
    from torchao.optim import quant_utils, subclass_4bit, subclass_8bit

    side = subclass_8bit if bits == 8 else subclass_4bit
    qmap = torch.tensor(side.get_qmap_signed() if signed else side.get_qmap_unsigned())
    given = numbers(signed, (64, 128))
    shares, scales = quant_utils.scale_tensor(torch.tensor(given), BLOCK[bits])
    quantize = quant_utils.quantize_8bit_with_qmap if bits == 8 else quant_utils.quantize_4bit_with_qmap
    expected = quantize(shares, qmap).numpy().reshape(-1, BLOCK[bits])
    there = held(jnp.asarray(given), form_of(given.shape, signed, bits))
    codes = np.asarray(there.codes)
    if bits == 4:
        codes = np.concatenate([codes & 15, codes >> 4], -1)
    filled = np.asarray(there.scales).ravel() > 0
    np.testing.assert_array_equal(np.asarray(there.scales).ravel()[filled], scales.numpy()[filled])
    if not signed and bits == 8:
        expected[(expected == 0) & (given.reshape(expected.shape) > 0)] = 1  # which torchao takes for 0
    assert (codes.reshape(expected.shape) != expected).mean() < 1e-3


@pytest.mark.parametrize(("signed", "bits"), KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_zeros(shape, signed, bits):
    form = form_of(shape, signed, bits)
    expected, found = held(jnp.zeros(shape), form), zeros(form)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert not np.asarray(in_full(found)).any()
