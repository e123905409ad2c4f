"""The adding problem: find two marked numbers in a sequence and add them."""

import numpy as np

from perfkit.reference._checks import at_least

from ._dataset import Dataset, Split


def adding(count: int = 20_000, length: int = 28, features: int = 10, seed: int = 0) -> Dataset:
    """Make sequences whose target is the sum of their two marked values.

        y = value[a] + value[b],   marker[a] = marker[b] = 1,   0 <= a < length // 2 <= b < length

    Feature 0 is the value and feature 1 the marker, zero elsewhere. All further features are distractors: numbers drawn
    like the values, which the model must learn to ignore. Always answering the mean, 1, has an error of 1/6, the
    variance of the targets; to do better, a model must remember a number for half the sequence or more.

    Args:
        count: number of sequences, 5 or more; the last fifth is held out.
        length: time steps in each, 2 or more.
        features: numbers at each step, 2 or more.
        seed: of the random generator; the same seed gives the same arrays.

    Returns:
        Dataset of kind "sequences": inputs (N, length, features) float32 in 0..1, targets (N, 1) float32 in 0..2.

    Raises:
        ValueError: A size is too small.

    Example:
        >>> adding(count=100).train.inputs[0].shape
        (80, 28, 10)

    Source: Hochreiter, Schmidhuber: Long Short-Term Memory, Neural Computation 9(8), 1997, experiment 4.
    """
    at_least(count, 5, what="count")
    at_least(length, 2, what="length")
    at_least(features, 2, what="features")
    generator = np.random.default_rng(seed)
    sequences = generator.random((count, length, features), dtype=np.float32)
    first = generator.integers(0, length // 2, count)
    second = generator.integers(length // 2, length, count)
    row = np.arange(count)
    sequences[:, :, 1] = 0.0
    sequences[row, first, 1] = 1.0
    sequences[row, second, 1] = 1.0
    sums = (sequences[row, first, 0] + sequences[row, second, 0])[:, None]
    held_out = count // 5
    return Dataset(
        name=f"adding problem, {length} steps",
        kind="sequences",
        train=Split((sequences[:-held_out],), sums[:-held_out]),
        test=Split((sequences[-held_out:],), sums[-held_out:]),
    )
