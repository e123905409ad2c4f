"""Plain data: rows of inputs with their targets, and a data set as two such splits."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from perfkit.reference._checks import unfit


@dataclass(frozen=True, eq=False)
class Split:
    """Rows of inputs and their targets. The arrays are read-only views, since data sets are shared between callers.

    Attributes:
        inputs: arrays whose first axis is the row, in the order the models take them: `(images,)` of (N, 28, 28)
            float32, standardized; `(sequences,)` of (N, T, F) float32; or `(ids, lengths)` of (N, T) and (N,) int64.
        targets: class numbers (N,) int64 for images, otherwise (N, 1) float32 (for texts 0.0 or 1.0).
    """

    inputs: tuple[np.ndarray, ...]
    targets: np.ndarray

    def __post_init__(self):
        rows = [len(array) for array in (*self.inputs, self.targets)]
        if len(set(rows)) != 1 or rows[0] == 0:
            raise unfit(
                f"a split was given arrays of {rows} rows",
                expected="the same number in each, 1 or more",
                remedy="trim them",
            )
        object.__setattr__(self, "inputs", tuple(_read_only(array) for array in self.inputs))
        object.__setattr__(self, "targets", _read_only(self.targets))

    def __len__(self) -> int:
        return len(self.targets)

    def rows(self, indices: np.ndarray) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
        """Copy some rows out: (inputs, targets). `indices`: (B,), whole numbers."""
        return tuple(array[indices] for array in self.inputs), self.targets[indices]


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training split and a held-out split of the same kind of data.

    Attributes:
        name: where it comes from, for reports.
        kind: what the rows are, which decides the models that can read them.
        train: rows to learn from.
        test: rows held out.
        vocabulary: for texts, the word of each id; id 0 is padding and id 1 any unknown word.
    """

    name: str
    kind: Literal["images", "sequences", "texts"]
    train: Split
    test: Split
    vocabulary: tuple[str, ...] = ()


def _read_only(array: np.ndarray) -> np.ndarray:
    view = array.view()
    view.flags.writeable = False
    return view
