"""How many floating-point operations the mathematics of a layer takes: what both frameworks' counts must equal.

A multiply-add is two operations. Only products count: element-wise work, biases, normalization and softmax do not.
Every tap of a convolution counts, also one that reads padding; a sequence counts all its steps, padded ones too.
What is computed again for the backward pass counts where operations do it (checkpointing), not where one does it within
itself (flash attention). Training counts what gradients of the parameters need: no gradient of the model's inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

RECURRENT_GATES = {"rnn": 1, "gru": 3, "lstm": 4}


def linear(rows: int, inputs: int, outputs: int) -> int:
    """`rows` vectors of `inputs` numbers through a matrix: (rows, inputs) @ (inputs, outputs)."""
    return 2 * rows * inputs * outputs


def convolution(
    batch: int, inputs: int, outputs: int, kernel: Sequence[int], positions: Sequence[int], groups: int = 1
) -> int:
    """A convolution of any number of dimensions.

    Args:
        inputs, outputs: channels.
        kernel: taps along each dimension.
        positions: sizes of what comes out; of a transposed convolution: of what goes in.
    """
    return 2 * batch * math.prod(positions) * outputs * (inputs // groups) * math.prod(kernel)


def recurrent(
    kind: str,
    steps: int,
    batch: int,
    inputs: int,
    hidden: int,
    layers: int = 1,
    directions: int = 1,
    projected: int = 0,
) -> int:
    """A stack of recurrent layers over a whole sequence, products with the initial state included.

    Args:
        kind: a key of `RECURRENT_GATES`.
        projected: size that each output is projected to (LSTM with `proj_size`); 0 without.
    """
    given = projected or hidden
    total = 0
    for layer in range(layers):
        reads = inputs if layer == 0 else directions * given
        gates = linear(steps * batch, reads + given, RECURRENT_GATES[kind] * hidden)
        total += directions * (gates + linear(steps * batch, hidden, projected))
    return total


def recurrent_inputs(kind: str, steps: int, batch: int, inputs: int, hidden: int, directions: int = 1) -> int:
    """What of `recurrent` is the first layer's product with the inputs: their gradient would cost as much again."""
    return directions * linear(steps * batch, inputs, RECURRENT_GATES[kind] * hidden)


def attention(batch: int, heads: int, queries: int, keys: int, size: int, value_size: int | None = None) -> int:
    """Scores and weighted sums of scaled dot-product attention, without projections; a mask spares nothing.

    Args:
        size: of one head's queries and keys.
        value_size: of one head's values; None for `size`.
    """
    return 2 * batch * heads * queries * keys * (size + (size if value_size is None else value_size))


def multi_head_attention(batch: int, heads: int, queries: int, keys: int, width: int) -> int:
    """`attention` with its four projections, all `width` wide."""
    projections = 2 * linear(batch * queries, width, width) + 2 * linear(batch * keys, width, width)
    return projections + attention(batch, heads, queries, keys, width // heads)


def transformer_block(batch: int, heads: int, length: int, width: int, inner: int) -> int:
    """Self-attention and a perceptron of two layers, `inner` wide between them."""
    perceptron = linear(batch * length, width, inner) + linear(batch * length, inner, width)
    return multi_head_attention(batch, heads, length, length, width) + perceptron


def backward(forward: int, inputs_product: int = 0) -> int:
    """Each product of the forward pass has two in the backward pass: for its weights, and for what went in.

    Args:
        inputs_product: what of `forward` are products with the model's own inputs, which need no gradient.
    """
    return 2 * forward - inputs_product
