"""One call of `linear_int8_static`, without its numbers."""

from __future__ import annotations

from dataclasses import dataclass

from perfkit.kernels._int8 import Grid, OfBytes


@dataclass(frozen=True)
class Problem(OfBytes):
    """One call, without its numbers.

    Args:
        rows, inputs, outputs: M, K and N.
        grid: of x; with a scale of 0, of which `top` alone is read, each call reads it from x, as torch's
            `choose_qparams` does.
        activation: None or "relu".
        x: "float32", or "uint8" where it is on the grid already.
        y: "float32", "bfloat16", or "uint8" on `y_grid`.
        framework: "torch", or "jax": there grids are `_int8.IN_JAX`.
        device: "cpu", or another, which the kernel does not run on.
    """

    rows: int
    inputs: int
    outputs: int
    grid: Grid
    activation: str | None = None
    x: str = "float32"
    y: str = "float32"
    y_grid: Grid | None = None
    framework: str = "torch"
    device: str = "cpu"

    @property
    def work(self) -> int:
        """Multiply-adds."""
        return self.rows * self.inputs * self.outputs

    @property
    def bucket(self) -> str:
        """The rows rounded up to a power of two, and the rest as it is."""
        rows = 1 << max(0, self.rows - 1).bit_length()
        return f"M{rows}-K{self.inputs}-N{self.outputs}-{self.activation or 'linear'}-{self.x}-{self.y}"
