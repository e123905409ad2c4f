"""One call of the recurrent op, without its numbers."""

from __future__ import annotations

from dataclasses import dataclass

from perfkit._errors import InvalidInputError, nearest

GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}
"""How many gates a cell's weights hold, in torch's order: i f g o; r z n."""

SAVED = {"LSTM": 4, "GRU": 4, "RNN_TANH": 1, "RNN_RELU": 1}
"""How many numbers a unit keeps of each step for the backward pass."""

RAGGED = ("no", "lengths", "packed")


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

    Raises:
        InvalidInputError: an unknown mode, or a size below 1.
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

    def __post_init__(self):
        if self.mode not in GATES:
            raise InvalidInputError(f"no recurrent cell is called {self.mode!r}: {nearest(self.mode, GATES)}")
        if self.ragged not in RAGGED:
            raise InvalidInputError(f"ragged is {self.ragged!r}: {nearest(self.ragged, RAGGED)}")
        for name in ("steps", "batch", "inputs", "hidden", "layers"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"a recurrent layer over {getattr(self, name)} {name}: expected at least 1")
        if self.directions not in (1, 2):
            raise InvalidInputError(f"a recurrent layer has {self.directions} directions: expected 1 or 2")

    @property
    def bucket(self) -> str:
        """Batch and steps rounded up to powers of two; what the weights are made for is taken as it is."""
        steps, batch = (1 << (size - 1).bit_length() for size in (self.steps, self.batch))
        parts = [self.mode, f"T{steps}", f"B{batch}", f"I{self.inputs}", f"H{self.hidden}"]
        parts += [f"{self.layers}x{self.directions}", self.ragged, "train" if self.needs_grad else "infer"]
        return "-".join(parts)


def cudnn_is_fast(problem: Problem) -> str | None:
    """That cuDNN has one of its persistent algorithms for `problem`, as PyTorch picks them; None where it has not.

    Those are hard to beat; everywhere else cuDNN launches kernels step by step and layer by layer. Used where nothing
    was measured.

    - Any dtype but float64: H <= 192, with a backward pass H <= 128.
    - float16 alone, one layer, one direction: H and I multiples of 128, H <= 1024, B a multiple of 8 up to 128. On
      compute capability 9.0 and later, which is not asked here.

    Source: aten/src/ATen/native/cudnn/RNN.cpp of PyTorch, `get_algo` and what it calls.
    """
    if problem.ragged == "packed" or problem.dtype == "float64":
        return None
    persistent = "cuDNN keeps the weights of such a layer on the chip, in one launch for all steps"
    if problem.hidden <= (128 if problem.needs_grad else 192):
        return persistent
    one = problem.layers == problem.directions == 1 and problem.dtype == "float16"
    wide = problem.hidden % 128 == problem.inputs % 128 == 0 and problem.hidden <= 1024
    return persistent if one and wide and problem.batch % 8 == 0 and problem.batch <= 128 else None
