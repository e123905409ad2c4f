"""Scans of quantized models that are recurrent layers, as calls of `perfkit.kernels.rnn_int8`.

Found as `perfkit.backends.jax_fused_rnn` finds them, with products on known grids in their steps: one weight for what
all gates read of the input, one for what they read of the hidden state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from perfkit.backends.jax_fused_rnn import Cell, cell_of, entering
from perfkit.backends.jax_fused_steps import Input, Part, Steps, Sum, Unlike
from perfkit.kernels._op import Choice
from perfkit.kernels.rnn_int8.problem import OP, Problem
from perfkit.quantization.jax_integers import product_in, weights_of


@dataclass(frozen=True, eq=False)
class _Matrix:
    """A quantized weight, (inputs, outputs), and the grid that it meets: what the function of a product is given.

    Args:
        names: of the weights in it.
    """

    names: str
    values: Any
    scale: Any
    x_scale: Any


@dataclass(frozen=True)
class Recurrence:
    """A scan as a call of the kernel.

    Args:
        cell: what it is.
        choice: who computes it.
        lengths: (B,), int32, how many of each row's steps are read; None for all.
    """

    cell: Cell
    choice: Choice
    lengths: Any = None

    @property
    def weights(self) -> str:
        """The names of its weights."""
        return ",".join(side[0].whole.names for side in self.cell.sides)

    def __str__(self) -> str:
        return f"{self.cell.mode} on integers{'' if self.lengths is None else ', of each row what is read,'}"

    @property
    def ours(self) -> bool:
        return self.choice.implementation == "cpu"

    def run(self, eqn: Any, operands: Sequence[Any]) -> list[Any]:
        """The outputs of the scan `eqn` on these operands."""
        from perfkit.kernels.rnn_int8.jax_op import layer

        cell = self.cell
        x, carry = entering(eqn, operands, cell.x)
        (q_ih, scale_ih, x_scale), (q_hh, scale_hh, h_scale) = map(_joined, cell.sides)
        size = cell.gates[0].size
        biases, of_n = cell.biases
        bias = jnp.concatenate([_bias(part, size) for part in biases])
        wide = [part.astype(jnp.float32) for part in (x, carry[cell.h])]
        c0 = None if cell.c is None else carry[cell.c].astype(jnp.float32)
        bias_hn = _bias(of_n, size) if cell.mode == "GRU" else None
        sides = q_ih, scale_ih, q_hh, scale_hh, bias, bias_hn, x_scale, h_scale
        y, hn, cn = layer(cell.mode, *wide, c0, *sides, self.lengths)
        return cell.results(eqn, carry, y, hn, cn)


def recurrence(
    eqn: Any, operands: Sequence[Any], wanted: Sequence[bool], device: str, lengths: Any = None
) -> Recurrence:
    """The recurrent layer that a scan is.

    Args:
        eqn: the scan.
        operands: its operands.
        wanted: of each output, whether anything reads it.
        lengths: of each row, as `Recurrence` has them.

    Raises:
        Unlike: it is none that the kernel knows.
    """
    cell = cell_of(eqn, operands, wanted, Steps(_product), ("int8",))
    for side in cell.sides:
        if any(part.whole is not side[0].whole for part in side):
            raise Unlike("its gates have weights, and grids, of their own")
    x, carry = entering(eqn, operands, cell.x)
    problem = Problem(device, cell.mode, *x.shape, carry[cell.h].shape[-1])
    return Recurrence(cell, OP.choose(problem), lengths)


def _product(eqn: Any, operands: list[Any]) -> Sum | None:
    """The product of what a step reads with a quantized weight; None where the equation is none."""
    names = weights_of(eqn)
    if names is None or not isinstance(operands[0], Input):
        return None
    product = product_in(eqn)
    x, values = (atom.aval for atom in eqn.invars[:2])
    if product.convolves or product["dimension_numbers"] != (((1,), (0,)), ((), ())) or (x.ndim, values.ndim) != (2, 2):
        raise Unlike("its rows are not one batch: expected products of (batch, features) with a matrix")
    outputs = values.shape[1]
    return Sum({operands[0]: Part(_Matrix(names, *operands[1:]), 0, outputs)}, None, outputs, frozenset(["int8"]))


def _joined(parts: Sequence[Part]) -> tuple[Any, Any, Any]:
    """The integers of gates, (N, K), their scales, (N,), and the scale of what they meet."""
    whole = parts[0].whole
    scale = jnp.broadcast_to(whole.scale, (1, whole.values.shape[1]))[0]
    values, scales = (
        jnp.concatenate([array[..., part.start : part.stop] for part in parts], -1) for array in (whole.values, scale)
    )
    return values.T, scales, whole.x_scale


def _bias(part: Part | None, size: int) -> Any:
    return jnp.zeros(size, jnp.float32) if part is None else part.value().astype(jnp.float32)
