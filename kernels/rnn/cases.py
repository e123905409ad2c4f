"""The cases of all tests and benchmarks of the recurrent op, their numbers, and how close results must be.

Letters: T time steps, B batch rows, I input features, H hidden units, L layers, D directions, P packed rows.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from perfkit.kernels.rnn.problem import GATES, Problem


@dataclass(frozen=True)
class Case:
    """One call.

    Args:
        mode: "LSTM", "GRU", "RNN_TANH" or "RNN_RELU".
        steps, batch, inputs, hidden, layers: T, B, I, H and L.
        bidirectional, batch_first: as `lstm` takes them; batch_first has no meaning for packed rows.
        ragged: "no", "lengths" or "packed".
        dtype: "float32", "bfloat16" or "float16".
        initial: initial states are given, not zeros.
        bias: there are biases.
    """

    mode: str
    steps: int
    batch: int
    inputs: int
    hidden: int
    layers: int = 1
    bidirectional: bool = False
    batch_first: bool = False
    ragged: str = "no"
    dtype: str = "float32"
    initial: bool = True
    bias: bool = True

    def problem(self, framework: str, device: str = "cpu", needs_grad: bool = False) -> Problem:
        """The case as a call in that framework, on that device."""
        return Problem(
            framework=framework,
            device=device,
            dtype=self.dtype,
            mode=self.mode,
            steps=self.steps,
            batch=self.batch,
            inputs=self.inputs,
            hidden=self.hidden,
            layers=self.layers,
            directions=2 if self.bidirectional else 1,
            ragged=self.ragged,
            needs_grad=needs_grad,
        )

    def __str__(self) -> str:
        """Its name among tests: what differs from a plain padded float32 stack of one layer is told."""
        parts = [self.mode, f"T{self.steps}", f"B{self.batch}", f"I{self.inputs}", f"H{self.hidden}"]
        if self.layers > 1:
            parts.append(f"L{self.layers}")
        parts += [name for name in ("bidirectional", "batch_first") if getattr(self, name)]
        parts += [self.ragged] if self.ragged != "no" else []
        parts += [self.dtype] if self.dtype != "float32" else []
        parts += [f"no_{name}" for name in ("initial", "bias") if not getattr(self, name)]
        return "-".join(parts)


@dataclass(frozen=True)
class Numbers:
    """A case's arrays, float64, and integers int64.

    Args:
        x: (T, B, I), (B, T, I) with batch_first, or (P, I) packed. Past a row's length it is NaN: nothing may read it.
        rows: None, lengths (B,), or batch_sizes (T,) of the packed rows.
        weights: (w_ih, w_hh, b_ih, b_hh), or the first two, of each layer and direction.
        h0, c0: (L D, B, H); None for zeros, c0 but for LSTM.
        d_y, d_hn, d_cn: gradients of a loss to y, hn and cn; d_cn None but for LSTM.
    """

    x: np.ndarray
    rows: np.ndarray | None
    weights: tuple[tuple[np.ndarray, ...], ...]
    h0: np.ndarray | None
    c0: np.ndarray | None
    d_y: np.ndarray
    d_hn: np.ndarray
    d_cn: np.ndarray | None


def numbers(case: Case, seed: int = 0) -> Numbers:
    """The arrays of a case: inputs and gradients normal, weights uniform in 1 / sqrt(H), as torch initializes them."""
    draw = np.random.default_rng(seed)
    steps, batch, hidden = case.steps, case.batch, case.hidden
    directions, channels, lstm = 2 if case.bidirectional else 1, GATES[case.mode] * hidden, case.mode == "LSTM"
    stack = (case.layers * directions, batch, hidden)
    rows, leading = None, (batch, steps) if case.batch_first else (steps, batch)
    if case.ragged != "no":
        rows = draw.integers(1, steps + 1, batch)
        rows[draw.integers(batch)] = steps
    if case.ragged == "packed":
        rows = (np.arange(steps)[:, None] < rows).sum(1)
        leading = (int(rows.sum()),)
    x = draw.standard_normal((*leading, case.inputs))
    if case.ragged == "lengths":
        there = np.arange(steps)[:, None] < rows
        x[~(there.T if case.batch_first else there)] = np.nan

    def uniform(*shape: int) -> np.ndarray:
        return draw.uniform(-(hidden**-0.5), hidden**-0.5, shape)

    weights = []
    for i in range(stack[0]):
        inputs = case.inputs if i < directions else hidden * directions
        weights.append((uniform(channels, inputs), uniform(channels, hidden)))
        weights[-1] += (uniform(channels), uniform(channels)) if case.bias else ()
    return Numbers(
        x=x,
        rows=rows,
        weights=tuple(weights),
        h0=draw.uniform(-1, 1, stack) if case.initial else None,
        c0=draw.standard_normal(stack) if case.initial and lstm else None,
        d_y=draw.standard_normal((*leading, hidden * directions)),
        d_hn=draw.standard_normal(stack),
        d_cn=draw.standard_normal(stack) if lstm else None,
    )


ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def tolerance(case: Case, *, gradient: bool = False) -> float:
    """How far a result may be from the float64 reference on the same inputs, as `error` measures it.

    One step's gates are sums of K = I + H products in float32: with errors that are independent of each other, some
    sqrt(K) roundings, and 8 more for the functions. In half precision the hidden states that enter the products, and
    those between layers, are rounded too: 2 roundings a layer. A cell carries what it got wrong through all T steps;
    the first kind is taken to add up (T times), the second, which is far from the worst case, to wander (sqrt(T)
    times). A gradient goes the same way back, over states that are wrong already: 3 times as much. A gradient of relu
    jumps where its input is within the error of 0: in so large a share of the units, and `error` is then a root mean
    square, to which a share of s contributes sqrt(s).
    """
    wide = case.steps * case.layers * (8 + (case.inputs + case.hidden) ** 0.5) * ROUNDOFF["float32"]
    narrow = 2 * case.layers * case.steps**0.5 * ROUNDOFF[case.dtype] if case.dtype in ("bfloat16", "float16") else 0.0
    found = wide + narrow
    if gradient:
        found = found**0.5 if case.mode == "RNN_RELU" else 3 * found
    return found


def error(case: Case, actual: Any, expected: Any, *, gradient: bool = False) -> float:
    """The largest difference over the largest magnitude; root mean squares of both for a gradient of relu.

    Args:
        actual, expected: what numpy makes float64 arrays of. NaN in either is an infinite error.
    """
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    found = distance(case, actual, expected, gradient=gradient)
    return found if np.isfinite(found) else float("inf")


def distance(case: Case, actual: Any, expected: Any, *, gradient: bool = False) -> float:
    """`error` of what is float64 already, arrays or tensors on any device; NaN where there is one."""

    def size(values: Any) -> float:
        if gradient and case.mode == "RNN_RELU":
            return float((values**2).mean() ** 0.5)
        return float(abs(values).max())

    return size(actual - expected) / max(size(expected), 1e-30)


def _with(case: Case, **changes: Any) -> Case:
    return dataclasses.replace(case, **changes)


_SIZES = (
    Case("LSTM", 7, 3, 10, 50),
    Case("LSTM", 2, 17, 100, 65, layers=2, bidirectional=True),
    Case("LSTM", 40, 3, 10, 16, batch_first=True, initial=False),
    Case("LSTM", 2, 64, 10, 128, ragged="lengths"),
    Case("LSTM", 7, 17, 10, 50, layers=2, bidirectional=True, batch_first=True, ragged="lengths", bias=False),
    Case("LSTM", 40, 3, 1, 65, layers=2, ragged="packed"),
    Case("LSTM", 1, 1, 1, 1, initial=False),
    Case("GRU", 7, 3, 10, 50, layers=2),
    Case("GRU", 2, 17, 100, 65, bidirectional=True, batch_first=True, ragged="lengths"),
    Case("GRU", 7, 3, 1, 16, layers=2, bidirectional=True, ragged="packed"),
    Case("GRU", 1, 64, 10, 128, bias=False, initial=False),
    Case("RNN_TANH", 7, 3, 10, 50, layers=2, bidirectional=True),
    Case("RNN_TANH", 7, 17, 1, 65, batch_first=True, ragged="lengths"),
    Case("RNN_TANH", 40, 3, 10, 1, ragged="packed", initial=False),
    Case("RNN_RELU", 7, 3, 10, 50, layers=2, bidirectional=True, batch_first=True),
    Case("RNN_RELU", 7, 17, 100, 16, ragged="packed"),
)
_HALF = tuple(
    _with(case, dtype=dtype) for case in (_SIZES[0], _SIZES[4], _SIZES[9]) for dtype in ("bfloat16", "float16")
)
CASES = (*_SIZES, *_HALF)
"""Ragged in every size, each option in some cell: for tests, of forward and of every gradient."""

_TEXT = Case("LSTM", 128, 64, 100, 128, layers=2, initial=False)
BENCHMARKS = {
    "lstm batch 64": Case("LSTM", 28, 64, 10, 50, initial=False),
    "lstm batch 1": Case("LSTM", 28, 1, 10, 50, initial=False),
    **{f"text_lstm batch {batch}": _with(_TEXT, batch=batch) for batch in (1, 64, 256)},
    **{f"text_lstm bf16 batch {batch}": _with(_TEXT, batch=batch, dtype="bfloat16") for batch in (1, 64, 256)},
    "text_gru batch 64": _with(_TEXT, mode="GRU"),
    "text_rnn batch 64": _with(_TEXT, mode="RNN_TANH"),
    **{
        f"wide H={hidden} B={batch}": Case("LSTM", 512, batch, hidden, hidden, dtype="bfloat16", initial=False)
        for hidden in (256, 512, 768, 1024)
        for batch in (16, 64)
    },
    "persistent in cuDNN": Case("LSTM", 512, 16, 512, 512, dtype="float16", initial=False),
    "bidirectional": Case("LSTM", 256, 32, 512, 512, bidirectional=True, dtype="bfloat16", initial=False),
    "KernelBench 3 #35": Case("LSTM", 512, 10, 128, 256, layers=6, batch_first=True),
    "packed": Case("LSTM", 1000, 32, 256, 256, ragged="packed", initial=False),
    "lengths": Case("LSTM", 1000, 32, 256, 256, ragged="lengths", initial=False),
}
"""What is timed, by name: the reference models on a CPU; on a GPU where cuDNN is hard and where it is easy to beat.

Source: https://github.com/ScalingIntelligence/KernelBench, level 3, 35_LSTM.py
"""
