"""Ragged sizes of `conv2d`, for the tests and the benchmarks of every implementation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Case:
    """One call, without its numbers.

    Args:
        batch, inputs, height, width, outputs, kernel: N, C, H, W, O and the kernel's (height, width).
        options: of `conv2d`: stride, padding, dilation, groups, activation, pool.
        bias: there is one.
    """

    batch: int
    inputs: int
    height: int
    width: int
    outputs: int
    kernel: tuple[int, int]
    options: dict[str, Any] = field(default_factory=dict)
    bias: bool = True

    @property
    def image(self) -> tuple[int, int, int, int]:
        """x's shape, (N, C, H, W)."""
        return self.batch, self.inputs, self.height, self.width

    @property
    def weight(self) -> tuple[int, int, int, int]:
        """weight's shape, (O, I, H, W)."""
        return self.outputs, self.inputs // self.options.get("groups", 1), *self.kernel

    @property
    def name(self) -> str:
        """For people, and as a test's id."""
        told = [f"{name}={value}" for name, value in self.options.items()]
        kernel = "{}x{}".format(*self.kernel)
        sizes = f"N{self.batch} {self.inputs}x{self.height}x{self.width} O{self.outputs} K{kernel}"
        return " ".join([sizes, *told, *([] if self.bias else ["no bias"])])


def _fused(pool: int, **options: Any) -> dict[str, Any]:
    return {"activation": "relu", "pool": pool, **options}


CASES = (
    Case(1, 1, 1, 1, 1, (1, 1)),
    Case(2, 1, 28, 28, 32, (3, 3), _fused(2)),
    Case(3, 3, 13, 10, 7, (3, 3), _fused(2, padding=1)),
    Case(2, 5, 9, 12, 33, (5, 3), _fused(3, padding=(2, 0)), bias=False),
    Case(1, 3, 17, 15, 7, (5, 3), {"stride": 2, "activation": "relu"}),
    Case(2, 5, 11, 19, 1, (3, 3), {"stride": (2, 1), "padding": "same", "pool": 2}),
    Case(2, 4, 12, 12, 6, (3, 3), _fused(2, dilation=2, groups=2)),
    Case(1, 7, 8, 9, 7, (3, 3), _fused(2, padding=1, groups=7)),
    Case(2, 1, 14, 11, 5, (2, 4), _fused(2, padding="same")),
    Case(1, 3, 20, 20, 33, (1, 1), {"stride": 3}, bias=False),
)
"""Each option and each kind of remainder at least once; small enough for interpreters."""

BENCHMARKS = (
    Case(64, 1, 28, 28, 32, (3, 3), _fused(2)),
    Case(512, 1, 28, 28, 32, (3, 3), _fused(2)),
    Case(1024, 1, 28, 28, 32, (3, 3), _fused(2)),
    Case(64, 1, 28, 28, 32, (3, 3), _fused(2, padding="same")),
    Case(64, 32, 14, 14, 64, (3, 3), _fused(2, padding="same")),
    Case(32, 3, 224, 224, 64, (3, 3), _fused(2, padding=1)),
    Case(32, 64, 112, 112, 128, (3, 3), _fused(2, padding=1)),
)
"""The document's models' convolutions at several batch sizes, and VGG's first ones."""


def whole(case: Case, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """x (N, C, H, W), weight (O, I, H, W) and bias of small whole numbers, float32.

    All sums of them are exact in float32, in any order: implementations can be compared bit for bit, and windows hold
    many equal numbers. Exact in bfloat16 too, as long as nothing is summed in that.
    """
    random = np.random.default_rng(seed)
    x, weight, bias = (
        random.integers(-3, 4, size).astype(np.float32) for size in (case.image, case.weight, case.outputs)
    )
    return x, weight, bias if case.bias else None
