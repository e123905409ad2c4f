"""Sizes of `linear_int8`, for the tests and the benchmarks of every implementation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One call, without its numbers: M rows, K inputs, N outputs.

    Args:
        x: the dtype of x.
        scale: of an int8 x: "one" or "row".
        bias, activation: of the layer.
    """

    rows: int
    inputs: int
    outputs: int
    x: str = "int8"
    scale: str = "row"
    bias: bool = True
    activation: str | None = None

    @property
    def name(self) -> str:
        """For people, and as a test's id."""
        parts = [f"{self.rows}x{self.inputs}x{self.outputs}", self.x]
        parts += [f"scale={self.scale}"] if self.x == "int8" else []
        return " ".join([*parts, *([self.activation] if self.activation else []), *([] if self.bias else ["no bias"])])


CASES = (
    Case(1, 1, 1, "float32"),
    Case(1, 64, 48),
    Case(3, 100, 10, "float32", activation="relu"),
    Case(17, 33, 65, scale="one", activation="relu"),
    Case(70, 130, 7, bias=False),
    Case(33, 96, 40, "float16", bias=False),
    Case(2, 2500, 19, activation="relu"),
)
"""Rows, inputs and outputs around each tile's edge, and one sum longer than float32 holds exactly."""

BENCHMARKS = tuple(
    Case(rows, inputs, outputs, "float32", activation="relu")
    for inputs, outputs in ((512, 512), (1024, 4096), (4096, 1024), (5408, 128))
    for rows in (1, 16, 64, 512, 4096)
)
"""Layers of a transformer, and the first linear one of the document's CNN."""
