"""Recurrent layers over whole sequences: LSTM, GRU, and RNN with tanh or relu; every gradient; torch and JAX.

With x the input of a step, h and c the states before it, W and b the weights and biases of each gate:

    LSTM   i, f, o = sigmoid(W_i x + b_i + W_h h + b_h); g = tanh(W_i x + b_i + W_h h + b_h)
           c' = f c + i g;  h' = o tanh(c')
    GRU    r, z = sigmoid(W_i x + b_i + W_h h + b_h);  n = tanh(W_i x + b_i + r (W_h h + b_h))
           h' = (1 - z) n + z h
    RNN    h' = tanh(W_i x + b_i + W_h h + b_h), or max(0, that)

Letters: T time steps, B batch rows, I input features, H hidden units, G gates (4, 3, 1), L layers, D directions (2 for
a bidirectional stack). A layer's output, (T, B, H D), is its directions' hidden states side by side, and the next one's
input.

- `problem.py`: one call without its numbers; when cuDNN is hard to beat.
- `reference.py`: plain torch operations, differentiable, in float64 too; `library.py`: torch's own layers.
- `torch_call.py`, `torch_op.py`: the way of a call in torch; `torch.ops.perfkit.rnn`. `jax_op.py`: the same in JAX,
  with `jax_reference.py`, and `jax_library.py` (cuDNN's LSTM).
- `cpu_kernel.py` and `.cpp`, `triton_kernel.py`, `pallas_kernel.py`: kernels; `jax_cpu.py`: the first, called by XLA.
- `cases.py`: the cases of all tests and benchmarks.

Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from perfkit._errors import InvalidInputError, nearest
from perfkit.kernels._op import Implementation, Op
from perfkit.kernels.rnn.problem import Problem, cudnn_is_fast

__all__ = ["OP", "Problem", "gru", "lstm", "rnn"]


def _asked(module: str) -> Callable[[Problem], str | None]:
    """The refusal of a module of this folder, which is imported when it is first asked."""

    def refusal(problem: Problem) -> str | None:
        return import_module(f"{__name__}.{module}").refusal(problem)

    return refusal


def _never(_problem: Problem) -> None:
    """The refusal of an implementation that takes every problem."""


OP = Op(
    "rnn",
    (
        Implementation("triton", "torch", _asked("triton_kernel"), ("cuda",), cudnn_is_fast),
        Implementation("cpu", "torch", _asked("cpu_source"), ("cpu",)),
        Implementation("library", "torch", _asked("library")),
        Implementation("reference", "torch", _never),
        Implementation("library", "jax", _asked("jax_library"), ("cuda",)),
        Implementation("pallas", "jax", _asked("pallas_kernel"), ("tpu", "cuda")),
        Implementation("cpu", "jax", _asked("cpu_source"), ("cpu",)),
        Implementation("reference", "jax", _never),
    ),
)


def lstm(
    x: Any,
    weights: Sequence[Sequence[Any]],
    h0: Any = None,
    c0: Any = None,
    *,
    lengths: Any = None,
    batch_first: bool = False,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    key: Any = None,
    recompute: bool = False,
    implementation: str | None = None,
) -> tuple[Any, Any, Any]:
    """A stack of LSTM layers over whole sequences; the equations are at the top of `perfkit.kernels.rnn`.

    Args:
        x: (T, B, I), or (B, T, I) with `batch_first`; a torch tensor or a JAX array, of float32, bfloat16 or float16
            (float64: by "library" and "reference" alone). Of torch also a `PackedSequence`, which is used as it is.
        weights: of each layer and direction (layer 0 forward, layer 0 reverse, layer 1 forward, ...) its
            (w_ih, w_hh), or (w_ih, w_hh, b_ih, b_hh): (G H, I), (G H, H), (G H,), (G H,), in torch's layout in both
            frameworks, gates in the order i f g o; w_ih of later layers (G H, H D). x's dtype and device.
        h0, c0: initial states, (L D, B, H), in x's dtype; None for zeros. Of a PackedSequence in the order of its rows
            before they were sorted.
        lengths: (B,), integers from 1 to T in any order: how many steps of each row there are. What x holds past them
            has no influence. On a GPU they are read back, which waits for it: keep them on the CPU. None for all steps.
        batch_first: x and y are (B, T, features). The states are as they are.
        bidirectional: two directions in each layer, the second from the last step to the first.
        dropout: probability of dropping an output between two layers, when `training`: not after the last one.
        training: apply `dropout`.
        key: a JAX PRNG key, needed in JAX for `dropout` in training. torch draws from its own generator.
        recompute: save only the inputs for the backward pass, and run the forward pass again in it.
        implementation: who computes: "triton", "cpu" or "pallas" (kernels of our own), "library" (the framework's:
            cuDNN, oneDNN) or "reference"; None to have it picked, see `OP.choose`.

    Returns:
        y: (T, B, H D), or (B, T, H D), or a PackedSequence, as x; zero past a row's length.
        hn, cn: (L D, B, H), the states after each row's last step, for the reverse direction after its first one.
        All in x's dtype. Kernels hold sums and the cell state in float32; "library" in whatever the library does.

    Gradients flow to x, h0, c0 and every weight. A second derivative is there with implementation="reference" alone.

    Raises:
        InvalidInputError: shapes, dtypes, devices, lengths or options that do not fit together.
        UnsupportedError: `implementation` cannot take the call, or a second derivative is asked of a kernel.

    Example:
        >>> module = torch.nn.LSTM(10, 50)
        >>> y, hn, cn = lstm(torch.randn(28, 64, 10), module.all_weights)

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html
    """
    return _run(x, "LSTM", weights, h0, c0, lengths, batch_first, bidirectional, dropout, training, key, recompute,
                implementation)  # fmt: skip


def gru(
    x: Any,
    weights: Sequence[Sequence[Any]],
    h0: Any = None,
    *,
    lengths: Any = None,
    batch_first: bool = False,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    key: Any = None,
    recompute: bool = False,
    implementation: str | None = None,
) -> tuple[Any, Any]:
    """A stack of GRU layers over whole sequences; the equations are at the top of `perfkit.kernels.rnn`.

    Args and errors are those of `lstm`. Gates are in the order r z n, G = 3; b_hh of n is inside of the product with r.

    Returns:
        y and hn, as `lstm` returns them.

    Example:
        >>> module = torch.nn.GRU(10, 50, bidirectional=True)
        >>> y, hn = gru(torch.randn(28, 64, 10), module.all_weights, bidirectional=True)

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.GRU.html
    """
    return _run(x, "GRU", weights, h0, None, lengths, batch_first, bidirectional, dropout, training, key, recompute,
                implementation)[:2]  # fmt: skip


def rnn(
    x: Any,
    weights: Sequence[Sequence[Any]],
    h0: Any = None,
    *,
    nonlinearity: str = "tanh",
    lengths: Any = None,
    batch_first: bool = False,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    key: Any = None,
    recompute: bool = False,
    implementation: str | None = None,
) -> tuple[Any, Any]:
    """A stack of plain recurrent layers over whole sequences; the equations are at the top of `perfkit.kernels.rnn`.

    Args and errors are those of `lstm`, G = 1, and:
        nonlinearity: "tanh" or "relu".

    Returns:
        y and hn, as `lstm` returns them.

    Example:
        >>> module = torch.nn.RNN(10, 50, nonlinearity="relu")
        >>> y, hn = rnn(torch.randn(28, 64, 10), module.all_weights, nonlinearity="relu")

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.RNN.html
    """
    modes = {"tanh": "RNN_TANH", "relu": "RNN_RELU"}
    if nonlinearity not in modes:
        raise InvalidInputError(f"nonlinearity is {nonlinearity!r}: {nearest(str(nonlinearity), modes)}")
    return _run(x, modes[nonlinearity], weights, h0, None, lengths, batch_first, bidirectional, dropout, training, key,
                recompute, implementation)[:2]  # fmt: skip


def _run(x: Any, *arguments: Any) -> tuple[Any, Any, Any]:
    """Hand a call to the framework that `x` is of."""
    if (torch := sys.modules.get("torch")) and isinstance(x, (torch.Tensor, torch.nn.utils.rnn.PackedSequence)):
        from perfkit.kernels.rnn import torch_call

        return torch_call.run(x, *arguments)
    if (jax := sys.modules.get("jax")) and isinstance(x, jax.Array):
        from perfkit.kernels.rnn import jax_op

        return jax_op.run(x, *arguments)
    raise InvalidInputError(f"x is a {type(x).__name__}: expected a torch tensor or PackedSequence, or a JAX array")
