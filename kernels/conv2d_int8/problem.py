"""One call of `conv2d_int8`, without its numbers."""

from __future__ import annotations

from dataclasses import dataclass

from perfkit.kernels._int8 import Grid, OfBytes
from perfkit.kernels.conv2d.problem import Problem as Sizes


@dataclass(frozen=True)
class Problem(OfBytes):
    """A call.

    Args:
        sizes: the convolution's, with its activation and pool, in one group; of its layout and dtypes nothing is read.
            In JAX grids are `_int8.IN_JAX`.
        grid: of x.
        x, x_last: "float32", or "uint8" where it is on the grid already; whether it lies NHWC.
        y, y_last: "float32", "bfloat16", or "uint8" on `y_grid`; the same.
    """

    sizes: Sizes
    grid: Grid
    x: str = "float32"
    x_last: bool = False
    y: str = "float32"
    y_last: bool = False
    y_grid: Grid | None = None

    @property
    def framework(self) -> str:
        """ "torch" or "jax"."""
        return self.sizes.framework

    @property
    def device(self) -> str:
        """ "cpu", or another, which the kernel does not run on."""
        return self.sizes.device

    @property
    def rows(self) -> int:
        """Images, which are computed apart."""
        return self.sizes.batch

    @property
    def inputs(self) -> int:
        """Numbers of an image."""
        return self.sizes.inputs * self.sizes.height * self.sizes.width

    @property
    def outputs(self) -> int:
        """Numbers of its result."""
        return self.sizes.outputs * self.sizes.out_size[0] * self.sizes.out_size[1]

    @property
    def work(self) -> int:
        """Multiply-adds."""
        height, width = self.sizes.conv_size
        return self.sizes.batch * self.sizes.outputs * height * width * self.sizes.taps

    @property
    def bucket(self) -> str:
        """As `conv2d` has it, and how x and y lie."""
        lie = "".join("l" if last else "f" for last in (self.x_last, self.y_last))
        return f"{self.sizes.bucket}-{self.x}-{self.y}-{lie}"
