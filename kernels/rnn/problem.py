"""One call of the recurrent op, without its numbers."""

from __future__ import annotations

from dataclasses import dataclass

GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}
"""How many gates a cell's weights hold, in torch's order: i f g o; r z n."""

SAVED = {"LSTM": 4, "GRU": 4, "RNN_TANH": 1, "RNN_RELU": 1}
"""How many numbers a unit keeps of each step for the backward pass."""


@dataclass(frozen=True)
class Problem:
    """A call of `lstm`, `gru` or `rnn`.

    Args:
        framework: "torch" or "jax".
        device: "cpu", "cuda" or "tpu".
        dtype: of x, the states and the weights.
        mode: "LSTM", "GRU", "RNN_TANH" or "RNN_RELU".
        steps, batch, inputs, hidden: T, B, I and H.
        layers, directions: of the stack; 2 directions for a bidirectional one.
        ragged: "no", "lengths" for padded rows of their own lengths, "packed" for a PackedSequence.
        needs_grad: a backward pass may follow.
    """

    framework: str
    device: str
    dtype: str
    mode: str
    steps: int
    batch: int
    inputs: int
    hidden: int
    layers: int = 1
    directions: int = 1
    ragged: str = "no"
    needs_grad: bool = False

    @property
    def bucket(self) -> str:
        """Batch and steps rounded up to powers of two; what the weights are made for is taken as it is."""
        steps, batch = (1 << (size - 1).bit_length() for size in (self.steps, self.batch))
        parts = [self.mode, f"T{steps}", f"B{batch}", f"I{self.inputs}", f"H{self.hidden}"]
        parts += [f"{self.layers}x{self.directions}", self.ragged, "train" if self.needs_grad else "infer"]
        return "-".join(parts)
