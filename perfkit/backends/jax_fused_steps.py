"""Running the step of a scan on symbols: weights keep their values, what is read of sequence and carry are names.

Products of inputs with weights, and their sums, stay sums; what follows is a tree of functions of them. Casts between
floating-point dtypes are not part of it: what counts is the dtype that the products are in.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from perfkit.backends.jax_autocast_casting import bind
from perfkit.backends.jax_autocast_rules import precision_reason


class Unlike(Exception):
    """Why a scan is no recurrent layer that the kernels know."""


@dataclass(frozen=True)
class Part:
    """Columns of a weight matrix, (rows, columns), or of a row of biases, (columns,)."""

    whole: Any
    start: int
    stop: int

    def value(self) -> Any:
        return self.whole[..., self.start : self.stop]

    def cut(self, start: int, stop: int) -> Part:
        return replace(self, start=self.start + start, stop=self.start + stop)

    def plus(self, other: Part) -> Part:
        return Part(self.value() + other.value(), 0, self.stop - self.start)


@dataclass(frozen=True)
class Input:
    """What a step reads: its part of the sequence, `Input("x", 0)`, or of the carry, `Input("carry", 1)`."""

    kind: str
    at: int
    size: int = field(default=0, compare=False)
    dtype: Any = field(default=None, compare=False)


@dataclass(frozen=True)
class Joined:
    """Inputs side by side."""

    inputs: tuple[Input, ...]


@dataclass(frozen=True, eq=False)
class Sum:
    """Products of inputs with weights, (input size, size) each, and a bias: what a gate is a function of."""

    terms: dict[Input, Part]
    bias: Part | None
    size: int
    dtypes: frozenset

    def cut(self, start: int, stop: int) -> Sum:
        terms = {read: part.cut(start, stop) for read, part in self.terms.items()}
        return Sum(terms, self.bias and self.bias.cut(start, stop), stop - start, self.dtypes)

    def plus(self, other: Sum) -> Sum:
        terms = dict(self.terms)
        for read, part in other.terms.items():
            terms[read] = terms[read].plus(part) if read in terms else part
        bias = self.bias.plus(other.bias) if self.bias and other.bias else self.bias or other.bias
        return Sum(terms, bias, self.size, self.dtypes | other.dtypes)

    def biased(self, row: Any) -> Sum:
        part = Part(jnp.broadcast_to(row, (self.size,)), 0, self.size)
        return replace(self, bias=self.bias.plus(part) if self.bias else part)


@dataclass(frozen=True)
class Node:
    """A function of symbols, element by element."""

    name: str
    of: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Row:
    """A known value that is the same for each row of the batch: (columns,) or ()."""

    value: Any


_SYMBOLS = (Input, Joined, Sum, Node)


class Steps:
    """Runs a jaxpr on known values and symbols.

    Args:
        product: what an equation makes of its operands, where it is a product that no rule knows; else None.
    """

    def __init__(self, product: Callable[[Any, list[Any]], Any] = lambda _eqn, _operands: None):
        self.product = product

    def evaluate(self, jaxpr: Any, args: Sequence[Any]) -> list[Any]:
        consts, jaxpr = getattr(jaxpr, "consts", ()), getattr(jaxpr, "jaxpr", jaxpr)
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, Literal) else values[atom]

        for eqn in jaxpr.eqns:
            values.update(zip(eqn.outvars, self._apply(eqn, [read(atom) for atom in eqn.invars]), strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _apply(self, eqn: Any, operands: list[Any]) -> Sequence[Any]:
        name = eqn.primitive.name
        if name == "broadcast_in_dim" and (row := _row(eqn, operands[0])) is not None:
            return [row]
        if not any(isinstance(operand, _SYMBOLS) for operand in operands):
            return bind(eqn, [_spread(value, atom) for value, atom in zip(operands, eqn.invars, strict=True)])
        if (product := self.product(eqn, operands)) is not None:
            return [product]
        if name in _INSIDE:
            return self.evaluate(eqn.params[_INSIDE[name]], operands)
        if name not in _RULES:
            raise Unlike(f"its step uses {name}, which the cells of the kernels do not")
        result = _RULES[name](eqn, operands)
        return result if isinstance(result, list) else [result]


def _row(eqn: Any, value: Any) -> Row | None:
    """What is broadcast along the batch."""
    shape, dims = eqn.outvars[0].aval.shape, eqn.params["broadcast_dimensions"]
    if isinstance(value, _SYMBOLS) or len(shape) != 2:
        return None
    if isinstance(value, Row):
        return value
    if np.ndim(value) == 0:
        return Row(jnp.asarray(value))
    if np.shape(value) == (shape[1],) and tuple(dims) == (1,):
        return Row(value)
    return Row(value[0]) if np.shape(value) == (1, shape[1]) and tuple(dims) == (0, 1) else None


def _spread(value: Any, atom: Any) -> Any:
    return jnp.broadcast_to(value.value, atom.aval.shape) if isinstance(value, Row) else value


def _as_row(value: Any) -> Row | None:
    """A known operand, as one row of biases."""
    if isinstance(value, Row):
        return value
    if isinstance(value, _SYMBOLS):
        return None
    if np.ndim(value) == 0:
        return Row(jnp.asarray(value))
    return Row(value[0]) if np.ndim(value) == 2 and np.shape(value)[0] == 1 else None


def _is_number(value: Any, number: float) -> bool:
    """Whether a known operand is this number throughout."""
    value = value.value if isinstance(value, Row) else value
    if isinstance(value, (*_SYMBOLS, jax.core.Tracer)):
        return False
    return bool(np.size(value) and np.all(np.asarray(value, np.float64) == number))


def _cast(eqn: Any, operands: list[Any]) -> Any:
    (value,), dtype = operands, eqn.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating):
        raise Unlike(f"its step casts to {jnp.dtype(dtype)}")
    return replace(value, dtype=dtype) if isinstance(value, Input) else value


def _product(eqn: Any, operands: list[Any]) -> Sum:
    value, weight = operands
    (lhs, rhs), batched = eqn.params["dimension_numbers"]
    if isinstance(weight, (*_SYMBOLS, Row)) or not isinstance(value, (Input, Joined)):
        raise Unlike("its step has a product of something else than an input with a weight")
    if reason := precision_reason(eqn.params["precision"]):
        raise Unlike(reason)
    inputs = value.inputs if isinstance(value, Joined) else (value,)
    if any(batched) or tuple(lhs) != (1,) or np.ndim(weight) != 2 or not all(read.size for read in inputs):
        raise Unlike("its rows are not one batch: expected products of (batch, features) with a matrix")
    matrix = weight if tuple(rhs) == (0,) else weight.T
    terms, start = {}, 0
    for read in inputs:
        part = Part(matrix[start : start + read.size] if len(inputs) > 1 else matrix, 0, matrix.shape[1])
        terms[read] = terms[read].plus(part) if read in terms else part
        start += read.size
    dtypes = frozenset(str(jnp.dtype(dtype)) for dtype in (*(read.dtype for read in inputs), weight.dtype))
    return Sum(terms, None, matrix.shape[1], dtypes)


def _add(_eqn: Any, operands: list[Any]) -> Any:
    one, other = operands
    if isinstance(one, Sum) and isinstance(other, Sum) and one.size == other.size:
        return one.plus(other)
    for value, row in ((one, other), (other, one)):
        if isinstance(value, Sum) and (known := _as_row(row)) is not None:
            return value.biased(known.value)
    return Node("add", (one, other))


def _sub(_eqn: Any, operands: list[Any]) -> Node:
    one, other = operands
    return Node("rest", (other,)) if _is_number(one, 1.0) else Node("sub", (one, other))


def _max(_eqn: Any, operands: list[Any]) -> Node:
    for value, zero in itertools.permutations(operands):
        if _is_number(zero, 0.0):
            return Node("relu", (value,))
    return Node("max", tuple(operands))


def _split(eqn: Any, operands: list[Any]) -> list[Any]:
    if eqn.params["axis"] != 1:
        raise Unlike("its step splits the batch")
    stops = list(itertools.accumulate(int(size) for size in eqn.params["sizes"]))
    return [_cut(operands[0], start, stop) for start, stop in zip([0, *stops], stops, strict=False)]


def _slice(eqn: Any, operands: list[Any]) -> Any:
    starts, stops, shape = eqn.params["start_indices"], eqn.params["limit_indices"], eqn.invars[0].aval.shape
    strides = eqn.params["strides"]
    if len(shape) != 2 or (starts[0], stops[0]) != (0, shape[0]) or (strides and set(strides) != {1}):
        raise Unlike("its step takes apart the batch")
    return _cut(operands[0], starts[1], stops[1])


def _cut(value: Any, start: int, stop: int) -> Any:
    if isinstance(value, Sum):
        return value.cut(start, stop)
    if isinstance(value, Node):
        return Node(value.name, tuple(_cut(each, start, stop) for each in value.of))
    raise Unlike("its step takes apart an input or a state")


def _concatenate(eqn: Any, operands: list[Any]) -> Joined:
    if eqn.params["dimension"] != 1 or not all(isinstance(each, Input) for each in operands):
        raise Unlike("its step joins other things than its inputs")
    return Joined(tuple(operands))


def _same(eqn: Any, operands: list[Any]) -> Any:
    if eqn.invars[0].aval.shape != eqn.outvars[0].aval.shape:
        raise Unlike(f"its step uses {eqn.primitive.name}")
    return operands[0]


def _node(name: str) -> Callable[[Any, list[Any]], Node]:
    return lambda _eqn, operands: Node(name, tuple(operands))


_INSIDE = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
}
_RULES: dict[str, Callable[[Any, list[Any]], Any]] = {
    "convert_element_type": _cast,
    "dot_general": _product,
    "add": _add,
    "sub": _sub,
    "max": _max,
    "split": _split,
    "slice": _slice,
    "concatenate": _concatenate,
    "mul": _node("mul"),
    "logistic": _node("logistic"),
    "tanh": _node("tanh"),
    **dict.fromkeys(("reshape", "squeeze", "copy", "copy_p", "broadcast_in_dim", "transpose"), _same),
}
