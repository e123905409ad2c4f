"""Scans that are recurrent layers, found by what their step computes, whoever wrote it.

The step of a scan is run on symbols: its weights keep their values, while what it reads of the sequence and of the
carry are names. What comes out is compared with the equations of `perfkit.kernels.rnn`. Anything else in the step, or a
carry that is more than h and c, is told as the reason why the scan stays.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from perfkit.backends.jax_autocast_casting import bind
from perfkit.backends.jax_autocast_rules import scan_sizes
from perfkit.kernels.rnn import gru, lstm, rnn

DTYPES = ("float32", "bfloat16", "float16")


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


SYMBOLS = (Input, Joined, Sum, Node)


@dataclass(frozen=True)
class Recurrence:
    """A scan as a call of `perfkit.kernels.rnn`.

    Args:
        mode: "LSTM", "GRU", "RNN_TANH" or "RNN_RELU".
        h, c: their places in the carry; c None but for LSTM.
        x: the place of the sequence among what is scanned over.
        outputs: for each output of the scan where it comes from: "h", "c", "y", "start" or "unused".
        weights: w_ih, w_hh, b_ih, b_hh, in the dtype to compute in.
    """

    mode: str
    h: int
    c: int | None
    x: int
    outputs: tuple[str, ...]
    weights: tuple[Any, ...]

    def __call__(self, eqn: Any, operands: Sequence[Any], trains: bool) -> list[Any]:
        """The outputs of the scan `eqn` on these operands."""
        n_consts, n_carry = scan_sizes(eqn.params)
        carry, xs = operands[n_consts : n_consts + n_carry], operands[n_consts + n_carry :]
        dtype, back = self.weights[0].dtype, eqn.params["reverse"]
        x = jnp.flip(xs[self.x], 0) if back else xs[self.x]
        x, h0 = x.astype(dtype), carry[self.h].astype(dtype)[None]
        if self.mode == "LSTM":
            y, hn, cn = lstm(x, [self.weights], h0, carry[self.c].astype(dtype)[None], training=trains)
        elif self.mode == "GRU":
            y, hn, cn = *gru(x, [self.weights], h0, training=trains), None
        else:
            y, hn, cn = *rnn(x, [self.weights], h0, nonlinearity=self.mode[4:].lower(), training=trains), None
        values = {"h": hn[0], "c": None if cn is None else cn[0], "y": jnp.flip(y, 0) if back else y}
        results = []
        for at, (source, var) in enumerate(zip(self.outputs, eqn.outvars, strict=True)):
            if source == "start":
                results.append(carry[at])
            elif source == "unused":
                results.append(jnp.zeros(var.aval.shape, var.aval.dtype))
            else:
                results.append(values[source].astype(var.aval.dtype))
        return results


def recurrence(eqn: Any, operands: Sequence[Any], wanted: Sequence[bool]) -> Recurrence:
    """The recurrent layer that a scan is.

    Args:
        eqn: the scan.
        operands: its operands.
        wanted: of each output, whether anything reads it.

    Raises:
        Unlike: it is none that the kernels know.
    """
    body = eqn.params["jaxpr"]
    n_consts, n_carry = scan_sizes(eqn.params)
    invars, outvars = body.jaxpr.invars, body.jaxpr.outvars
    stays = [outvars[at] is invars[n_consts + at] for at in range(n_carry)]
    given: list[Any] = list(operands[:n_consts])
    for at, var in enumerate(invars[n_consts:]):
        if at < n_carry and stays[at]:
            given.append(operands[n_consts + at])
        else:
            kind, place = ("carry", at) if at < n_carry else ("x", at - n_carry)
            shape = var.aval.shape
            given.append(Input(kind, place, shape[-1] if len(shape) == 2 else 0, var.aval.dtype))
    results = _Steps().evaluate(body, given)
    mode, h, c, gates = _cell({at: results[at] for at in range(n_carry) if not stays[at]})
    sources = []
    for at, result in enumerate(results):
        if at < n_carry:
            sources.append("start" if stays[at] else "h" if at == h else "c")
        elif not wanted[at]:
            sources.append("unused")
        elif result == results[h]:
            sources.append("y")
        elif c is not None and result == results[c]:
            raise Unlike("its cell state of every step is used, and the kernels return the last one")
        else:
            raise Unlike("an output of its steps is something else than the hidden state")
    x = next(read for read in gates[0].terms if read.kind == "x")
    return Recurrence(mode, h, c, x.at, tuple(sources), _weights(mode, gates, x, Input("carry", h)))


class _Steps:
    """Runs a jaxpr on known values and symbols."""

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
        if not any(isinstance(operand, SYMBOLS) for operand in operands):
            return bind(eqn, [_spread(value, atom) for value, atom in zip(operands, eqn.invars, strict=True)])
        if name in _INSIDE:
            return self.evaluate(eqn.params[_INSIDE[name]], operands)
        if name not in _RULES:
            raise Unlike(f"its step uses {name}, which the cells of the kernels do not")
        result = _RULES[name](eqn, operands)
        return result if isinstance(result, list) else [result]


def _row(eqn: Any, value: Any) -> Row | None:
    """What is broadcast along the batch."""
    shape, dims = eqn.outvars[0].aval.shape, eqn.params["broadcast_dimensions"]
    if isinstance(value, SYMBOLS) or len(shape) != 2:
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
    if isinstance(value, SYMBOLS):
        return None
    if np.ndim(value) == 0:
        return Row(jnp.asarray(value))
    return Row(value[0]) if np.ndim(value) == 2 and np.shape(value)[0] == 1 else None


def _is_number(value: Any, number: float) -> bool:
    """Whether a known operand is this number throughout."""
    value = value.value if isinstance(value, Row) else value
    if isinstance(value, (*SYMBOLS, jax.core.Tracer)):
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
    if isinstance(weight, (*SYMBOLS, Row)) or not isinstance(value, (Input, Joined)):
        raise Unlike("its step has a product of something else than an input with a weight")
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


def _cell(carry: dict[int, Any]) -> tuple[str, int, int | None, list[Sum]]:
    """The mode, the places of h and c, and the gates' sums in torch's order; of GRU's n its input's and its hidden.

    Raises:
        Unlike: it is none of them.
    """
    if len(carry) == 2:
        for c, h in itertools.permutations(carry):
            if gates := _lstm(carry[c], carry[h], Input("carry", c)):
                return "LSTM", h, c, _checked(gates, h, ["both"] * 4)
    if len(carry) == 1:
        ((h, new),) = carry.items()
        if gates := _gru(new, Input("carry", h)):
            return "GRU", h, None, _checked(gates, h, ["both", "both", "x", "carry"])
        for name in ("tanh", "relu"):
            if gate := _of(new, name):
                return f"RNN_{name.upper()}", h, None, _checked([gate], h, ["both"])
    raise Unlike("its step computes something else than an LSTM, a GRU or a simple cell")


def _lstm(new_c: Any, new_h: Any, c: Input) -> list[Sum] | None:
    for gate, squashed in _both(new_h, "mul"):
        output = _of(gate, "logistic")
        if output is None or squashed != Node("tanh", (new_c,)):
            continue
        for kept, added in _both(new_c, "add"):
            for (f, state), (i, g) in itertools.product(_both(kept, "mul"), _both(added, "mul")):
                gates = _of(i, "logistic"), _of(f, "logistic"), _of(g, "tanh"), output
                if state == c and None not in gates:
                    return list(gates)
    return None


def _gru(new: Any, h: Input) -> list[Sum] | None:
    for one, other in _both(new, "add"):
        for (rest, n), (gate, state) in itertools.product(_both(one, "mul"), _both(other, "mul")):
            z = _of(gate, "logistic")
            if z is None or state != h or rest != Node("rest", (gate,)) or getattr(n, "name", "") != "tanh":
                continue
            for inputs, scaled in _both(n.of[0], "add"):
                for reset, hidden in _both(scaled, "mul"):
                    r = _of(reset, "logistic")
                    if r is not None and isinstance(inputs, Sum) and isinstance(hidden, Sum):
                        return [r, z, inputs, hidden]
    return None


def _both(value: Any, name: str) -> Iterator[tuple[Any, Any]]:
    """The operands of an operation, in both orders; nothing where it is another one."""
    if isinstance(value, Node) and value.name == name and len(value.of) == 2:
        yield from itertools.permutations(value.of)


def _of(value: Any, name: str) -> Sum | None:
    """What a function is of, where it is this function of a sum."""
    known = isinstance(value, Node) and value.name == name and isinstance(value.of[0], Sum)
    return value.of[0] if known else None


def _checked(gates: list[Sum], h: int, reads: list[str]) -> list[Sum]:
    """The gates, where each reads what it should ("x", the "carry" h, or "both"), in one dtype, and has h's size.

    Raises:
        Unlike: one does not.
    """
    xs = {read for gate in gates for read in gate.terms if read.kind == "x"}
    if len(xs) != 1:
        raise Unlike(f"it reads {len(xs) or 'nothing of a'} sequence{'s' if xs else ''}")
    hidden = Input("carry", h)
    expected = {"x": xs, "carry": {hidden}, "both": xs | {hidden}}
    if any(gate.terms.keys() != expected[read] for gate, read in zip(gates, reads, strict=True)):
        raise Unlike("its gates do not all read the input and the hidden state")
    sizes = {gate.size for gate in gates} | {read.size for gate in gates for read in gate.terms if read == hidden}
    if len(sizes) > 1:
        raise Unlike(f"its gates are of {' and '.join(map(str, sorted(sizes)))} units")
    dtypes = frozenset[str]().union(*(gate.dtypes for gate in gates))
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        raise Unlike(f"its products are of {' and '.join(sorted(dtypes))}")
    return gates


def _weights(mode: str, gates: list[Sum], x: Input, h: Input) -> tuple[Any, ...]:
    """w_ih, w_hh, b_ih and b_hh in torch's layout, in the dtype of the products."""
    of_x, of_h = (gates[:3], [*gates[:2], gates[3]]) if mode == "GRU" else (gates, gates)
    (dtype,) = gates[0].dtypes
    zeros = Part(jnp.zeros(gates[0].size, dtype), 0, gates[0].size)
    biases = [gate.bias or zeros for gate in of_x]
    hidden = [zeros, zeros, of_h[2].bias or zeros] if mode == "GRU" else [zeros] * len(gates)
    w_ih, w_hh = (_joined([gate.terms[read] for gate in of]).T for of, read in ((of_x, x), (of_h, h)))
    return tuple(array.astype(dtype) for array in (w_ih, w_hh, _joined(biases), _joined(hidden)))


def _joined(parts: list[Part]) -> Any:
    """Parts side by side; the whole itself where they are cut from it in this order."""
    follow = all(one.whole is other.whole and one.stop == other.start for one, other in itertools.pairwise(parts))
    if follow:
        whole = Part(parts[0].whole, parts[0].start, parts[-1].stop)
        return whole.whole if whole.stop - whole.start == whole.whole.shape[-1] else whole.value()
    return jnp.concatenate([part.value() for part in parts], -1)
