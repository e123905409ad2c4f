"""MNIST, from the four IDX files it is published in."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from perfkit.reference._checks import corrupt, missing

from ._dataset import Dataset
from ._download import cache_folder, fetch
from ._images import image_dataset

SOURCE = "https://ossci-datasets.s3.amazonaws.com/mnist/"
MD5 = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}
_REMEDY = "remove it and call mnist(path, download=True)"


def mnist(
    path: str | Path | None = None, download: bool = False, *, source: str = SOURCE, progress: bool = False
) -> Dataset:
    """Load MNIST: 60,000 training and 10,000 held-out handwritten digits.

    Args:
        path: folder of the four published files, compressed (`train-images-idx3-ubyte.gz`) or not
            (`train-images-idx3-ubyte`); None for perfkit's folder in the user's cache.
        download: fetch what is not there, 11 MB in all, verified against the published checksums.
        source: address of the folder to fetch from, with a slash at the end.
        progress: draw progress bars on standard error while fetching.

    Returns:
        Dataset of kind "images": inputs (N, 28, 28) float32 with mean 0 and deviation 1 over the training rows, targets
        (N,) int64 in 0..9.

    Raises:
        FileNotFoundError: Files are missing and `download` is False.
        ConnectionError: The source could not be read.
        ValueError: A file is damaged, or its checksum is wrong after the download.

    Example:
        mnist("~/datasets/mnist", download=True, progress=True).train.inputs[0].shape  # (60000, 28, 28)

    Source: LeCun, Cortes, Burges: The MNIST database of handwritten digits, 1998.
    """
    folder = cache_folder("mnist") if path is None else Path(path).expanduser()
    if download:
        _fetch_missing(folder, source, progress)
    absent = [name for name in MD5 if _find(folder, name) is None]
    if absent:
        raise missing(
            folder,
            expected=", ".join(absent),
            remedy="put the published files there or pass download=True to fetch them",
        )
    return image_dataset(
        "MNIST",
        train=_read_pair(_find(folder, "train-images-idx3-ubyte.gz"), _find(folder, "train-labels-idx1-ubyte.gz")),
        test=_read_pair(_find(folder, "t10k-images-idx3-ubyte.gz"), _find(folder, "t10k-labels-idx1-ubyte.gz")),
    )


def _fetch_missing(folder: Path, source: str, progress: bool) -> None:
    for name, md5 in MD5.items():
        if _find(folder, name) is None:
            fetch(source + name, folder / name, md5=md5, progress=progress)


def _find(folder: Path, name: str) -> Path | None:
    candidates = (folder / name.removesuffix(".gz"), folder / name)
    return next((path for path in candidates if path.is_file()), None)


def _read_pair(image_path: Path, label_path: Path) -> tuple[np.ndarray, np.ndarray]:
    images = read_idx(image_path, item_shape=(28, 28))
    labels = read_idx(label_path, item_shape=())
    if not 0 < len(images) == len(labels) or labels.max(initial=0) > 9:
        raise corrupt(
            label_path,
            given=f"{len(labels)} labels up to {labels.max(initial=0)}",
            expected=f"one label in 0..9 for each of the {len(images)} images",
            remedy=_REMEDY,
        )
    return images, labels


def read_idx(path: Path, *, item_shape: tuple[int, ...]) -> np.ndarray:
    """Read one IDX file of unsigned bytes: (N, *item_shape), uint8.

    The header is 0, 0, the type (8 means unsigned bytes) and the number of axes, one byte each, then the length of each
    axis in four bytes, the highest first. The values follow, the last axis running fastest.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise corrupt(path, given=str(error), expected="a whole gzip file", remedy=_REMEDY) from error
    axes = 1 + len(item_shape)
    magic = bytes((0, 0, 8, axes))
    header, values = content[: 4 + 4 * axes], content[4 + 4 * axes :]
    shape = tuple(np.frombuffer(header, ">u4", offset=4).tolist()) if len(header) == 4 + 4 * axes else ()
    if header[:4] != magic or shape[1:] != item_shape:
        raise corrupt(
            path,
            given=f"its header is {header.hex() or 'empty'}",
            expected=f"{magic.hex()}, a count, and {item_shape} as the shape of an item",
            remedy=_REMEDY,
        )
    if len(values) != math.prod(shape):
        raise corrupt(
            path, given=f"{len(values)} bytes of values", expected=f"{math.prod(shape)} for {shape}", remedy=_REMEDY
        )
    return np.frombuffer(values, np.uint8).reshape(shape)
