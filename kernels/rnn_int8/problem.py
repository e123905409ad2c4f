"""One layer on int8 weights without its numbers, who takes it, and how its weights lie; imports no framework."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from perfkit.kernels import _int8, _native
from perfkit.kernels._int8 import OfBytes
from perfkit.kernels._op import Implementation, Op

SOURCE = Path(__file__).with_name("cpu_kernel.cpp")

GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}
"""Gates of each `mode` of `torch.nn.RNNBase`."""

MODES = tuple(GATES)

PANEL = 16
SLACK = 64
"""Bytes behind the last panel that the kernel's widest load may touch."""

MOST_COLUMNS = 2**31 // (127 * 255)
"""So many products of bytes are sure to fit into int32, the kernel's bias of 128 included."""


@dataclass(frozen=True)
class Problem(OfBytes):
    """One direction of one layer in JAX, x and h on grids that are known before the call.

    Args:
        device: "cpu", or another, which the kernel does not run on.
        mode: one of `MODES`.
        steps, batch, inputs, hidden: T, B, I and H.
    """

    device: str
    mode: str
    steps: int
    batch: int
    inputs: int
    hidden: int

    framework = "jax"

    @property
    def bucket(self) -> str:
        """The batch rounded up to a power of two, and the rest as it is."""
        batch = 1 << max(0, self.batch - 1).bit_length()
        return f"{self.mode}-T{self.steps}-B{batch}-I{self.inputs}-H{self.hidden}"


def refusal(problem: Problem) -> str | None:
    """Why the kernel cannot take `problem`; None where it can."""
    if not problem.steps * problem.batch * problem.inputs * problem.hidden:
        return "something is empty"
    if max(problem.inputs, problem.hidden) > MOST_COLUMNS:
        return f"sums of {max(problem.inputs, problem.hidden)} products could overflow int32: at most {MOST_COLUMNS}"
    return _native.missing()


OP = Op(
    "rnn_int8",
    (
        Implementation("cpu", "jax", refusal, ("cpu",), lambda _problem: _int8.slower()),
        Implementation("library", "jax", lambda _problem: None),
    ),
)
"""The library is XLA's scan over integer products. In torch the kernel is an operator that is called by name."""


def packed_size(channels: int, columns: int) -> int:
    """Bytes of a packed matrix of so many channels and columns."""
    return (-(-columns // 4) * 4 + 4) * channels + SLACK
