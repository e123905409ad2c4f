"""Real handwritten digits that need no network: scikit-learn's, enlarged to the size of MNIST's."""

import numpy as np

from perfkit.reference._checks import require

from ._dataset import Dataset
from ._images import image_dataset


def digits() -> Dataset:
    """Load 1,797 handwritten digits, scaled from 8×8 to 28×28 by bilinear interpolation.

    A fifth of each class is held out, always the same rows.

    Returns:
        Dataset of kind "images": inputs (N, 28, 28) float32 with mean 0 and deviation 1 over the training rows, targets
        (N,) int64 in 0..9.

    Raises:
        ImportError: scikit-learn is not installed.

    Example:
        >>> data = digits()
        >>> data.train.inputs[0].shape, len(data.test)
        ((1442, 28, 28), 355)

    Source: Alpaydin, Kaynak: Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998, by way
    of `sklearn.datasets.load_digits`.
    """
    bunch = require("sklearn.datasets", extra="data").load_digits()
    images = enlarge(bunch.images.astype(np.float32), size=28)
    labels = bunch.target
    held_out = stratified_fifth(labels)
    return image_dataset(
        "scikit-learn digits",
        train=(images[~held_out], labels[~held_out]),
        test=(images[held_out], labels[held_out]),
    )


def enlarge(images: np.ndarray, *, size: int) -> np.ndarray:
    """Interpolate square images bilinearly: (N, S, S) to (N, size, size), float32, with pixel centres at their halves.

    An enlarged pixel is a weighted mean of its neighbours along each axis, so the whole is two matrix products.
    """
    small = images.shape[1]
    centre = np.clip((np.arange(size) + 0.5) * small / size - 0.5, 0, small - 1)
    distance = np.abs(centre[:, None] - np.arange(small))
    weights = np.clip(1.0 - distance, 0.0, None).astype(np.float32)
    return weights @ images @ weights.T


def stratified_fifth(labels: np.ndarray) -> np.ndarray:
    """Mark a fifth of each class, drawn with a fixed seed: (N,) bool."""
    generator = np.random.default_rng(0)
    marked = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label))
        marked[rows[: len(rows) // 5]] = True
    return marked
