"""One call of a linear layer, without its numbers; imports no framework."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """A call of `linear`.

    Args:
        device: "cpu", "cuda", ...
        dtype: of x, which is multiplied; in torch of weight, bias and y too, "mixed" where they differ.
        rows, inputs, outputs: M, K and N: x is (M, K) once its leading dimensions are one, and weight (N, K) in torch,
            (K, N) in JAX.
        activation: None or "relu".
        needs_grad: never: where a backward pass may follow, torch computes, and JAX computes the gradients.
        framework: "torch" or "jax".
        weight_dtype, out_dtype: of weight and of y where they may be others, which is in JAX; else empty.
    """

    device: str
    dtype: str
    rows: int
    inputs: int
    outputs: int
    activation: str | None = None
    needs_grad: bool = False
    framework: str = "torch"
    weight_dtype: str = ""
    out_dtype: str = ""

    @property
    def work(self) -> int:
        """Multiply-adds."""
        return self.rows * self.inputs * self.outputs

    @property
    def bucket(self) -> str:
        """The rows rounded up to a power of two, and the rest as it is."""
        rows = 1 << max(0, self.rows - 1).bit_length()
        mixed = "".join(f"-{each}" for each in (self.weight_dtype, self.out_dtype) if each)
        return f"M{rows}-K{self.inputs}-N{self.outputs}-{self.activation or 'linear'}{mixed}"
