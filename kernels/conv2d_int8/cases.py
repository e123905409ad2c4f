"""Sizes of `conv2d_int8`, for all of its tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """One call, without its numbers: of images (batch, inputs, height, width), so many outputs, a kernel's size."""

    image: tuple[int, int, int, int]
    outputs: int
    kernel: tuple[int, int]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For people, and as a test's id."""
        sizes = "x".join(map(str, self.image)), str(self.outputs), "x".join(map(str, self.kernel))
        return " ".join([*sizes, *(f"{name}={value}" for name, value in self.options.items())])


CASES = (
    Case((3, 1, 28, 28), 32, (3, 3), {"activation": "relu", "pool": 2}),
    Case((2, 3, 33, 29), 17, (7, 7), {"stride": 2, "padding": 3, "activation": "relu"}),
    Case((2, 3, 12, 21), 7, (3, 3), {"padding": 1, "activation": "relu", "pool": 2}),
    Case((1, 3, 20, 23), 5, (5, 5), {"pool": 2, "padding": "same"}),
    Case((2, 2, 19, 17), 9, (3, 2), {"pool": 3, "stride": (1, 2), "dilation": (2, 3), "padding": (1, 2)}),
    Case((1, 4, 1, 1), 1, (1, 1)),
    Case((1, 1, 70, 700), 3, (3, 3), {"padding": 1, "pool": 2}),
    Case((2, 5, 9, 8), 6, (3, 3), {"padding": 1}),
    Case((2, 16, 14, 15), 70, (3, 3), {"padding": 1, "activation": "relu", "pool": 2}),
    Case((1, 30, 11, 12), 33, (3, 3), {"dilation": 2, "stride": 2, "padding": (2, 1)}),
    Case((3, 64, 7, 7), 64, (1, 1), {"activation": "relu"}),
    Case((1, 8, 40, 90), 8, (2, 3), {"pool": 3, "padding": "same"}),
)
"""Few channels and many, around each tile's edge, images larger than what is made at a time, odd pools and paddings."""
