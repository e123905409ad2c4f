"""From pictures to the rows that the image models read."""

import numpy as np

from ._dataset import Dataset, Split

Labelled = tuple[np.ndarray, np.ndarray]


def image_dataset(name: str, *, train: Labelled, test: Labelled) -> Dataset:
    """Standardize pictures with the training pictures' own mean and deviation.

        pixel' = (pixel - mean) / deviation,   both over all pixels of all training pictures, in float64

    Args:
        name: of the data set.
        train: pictures (N, 28, 28) of any number type and scale, and their classes (N,) in 0..9.
        test: likewise, held out; it has no say in the mean and the deviation.

    Returns:
        Dataset of kind "images": inputs (N, 28, 28) float32, targets (N,) int64.
    """
    mean, deviation = train[0].mean(dtype=np.float64), train[0].std(dtype=np.float64)
    splits = [
        Split((((pictures - mean) / (deviation or 1.0)).astype(np.float32),), classes.astype(np.int64))
        for pictures, classes in (train, test)
    ]
    return Dataset(name=name, kind="images", train=splits[0], test=splits[1])
