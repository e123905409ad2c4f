"""Scans that are recurrent layers, found by what their step computes, whoever wrote it.

The step is run on symbols (`jax_fused_steps.py`), and what comes out is compared with the equations of
`perfkit.kernels.rnn`. Anything else in the step, or a carry that is more than h and c, is told as the reason why the
scan stays.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from perfkit.backends.jax_autocast_rules import scan_sizes
from perfkit.backends.jax_fused_steps import Input, Node, Part, Steps, Sum, Unlike
from perfkit.kernels.rnn import gru, lstm, rnn

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Recurrence:
    """A scan as a call of `perfkit.kernels.rnn`.

    Args:
        cell: what it is.
        weights: w_ih, w_hh, b_ih, b_hh, in the dtype to compute in.
    """

    cell: Cell
    weights: tuple[Any, ...]

    @property
    def mode(self) -> str:
        return self.cell.mode

    def __call__(self, eqn: Any, operands: Sequence[Any], trains: bool, lengths: Any = None) -> list[Any]:
        """The outputs of the scan `eqn` on these operands; of each row `lengths` of them, where not all are read."""
        x, carry = entering(eqn, operands, self.cell.x)
        dtype, cell = self.weights[0].dtype, self.cell
        x, h0 = x.astype(dtype), carry[cell.h].astype(dtype)[None]
        options = {"training": trains, "lengths": lengths}
        if cell.mode == "LSTM":
            y, hn, cn = lstm(x, [self.weights], h0, carry[cell.c].astype(dtype)[None], **options)
            return cell.results(eqn, carry, y, hn[0], cn[0])
        if cell.mode == "GRU":
            y, hn = gru(x, [self.weights], h0, **options)
        else:
            y, hn = rnn(x, [self.weights], h0, nonlinearity=cell.mode[4:].lower(), **options)
        return cell.results(eqn, carry, y, hn[0], None)


def entering(eqn: Any, operands: Sequence[Any], at: int) -> tuple[Any, Sequence[Any]]:
    """What a scan goes over at `at`, in the order of its steps, and what it carries at first."""
    n_consts, n_carry = scan_sizes(eqn.params)
    carry, x = operands[n_consts : n_consts + n_carry], operands[n_consts + n_carry + at]
    return jnp.flip(x, 0) if eqn.params["reverse"] else x, carry


@dataclass(frozen=True)
class Cell:
    """A scan as a recurrent layer: `mode`, `h`, `c`, `x` and `outputs` as `Recurrence` has them.

    Args:
        gates: in torch's order; of the GRU's n its input's and its hidden.
    """

    mode: str
    h: int
    c: int | None
    x: int
    outputs: tuple[str, ...]
    gates: tuple[Sum, ...]

    @property
    def sides(self) -> tuple[list[Part], list[Part]]:
        """The weights of x and of h, gate after gate."""
        x, h = (next(read for read in self.gates[0].terms if read.kind == kind) for kind in ("x", "carry"))
        of_x, of_h = (self.gates[:3], [*self.gates[:2], self.gates[3]]) if self.mode == "GRU" else (self.gates,) * 2
        return [gate.terms[x] for gate in of_x], [gate.terms[h] for gate in of_h]

    @property
    def biases(self) -> tuple[list[Part | None], Part | None]:
        """Those of the gates, of the GRU's n the input's; that of its hidden part."""
        gru = self.mode == "GRU"
        return [gate.bias for gate in (self.gates[:3] if gru else self.gates)], self.gates[3].bias if gru else None

    def results(self, eqn: Any, carry: Sequence[Any], y: Any, hn: Any, cn: Any) -> list[Any]:
        """The outputs of the scan from those of the layer, steps in the order in which they were computed."""
        values = {"h": hn, "c": cn, "y": jnp.flip(y, 0) if eqn.params["reverse"] else y}
        found = []
        for at, (source, var) in enumerate(zip(self.outputs, eqn.outvars, strict=True)):
            if source == "start":
                found.append(carry[at])
            elif source == "unused":
                found.append(jnp.zeros(var.aval.shape, var.aval.dtype))
            else:
                found.append(values[source].astype(var.aval.dtype))
        return found


def recurrence(eqn: Any, operands: Sequence[Any], wanted: Sequence[bool]) -> Recurrence:
    """The recurrent layer that a scan is.

    Args:
        eqn: the scan.
        operands: its operands.
        wanted: of each output, whether anything reads it.

    Raises:
        Unlike: it is none that the kernels know.
    """
    cell = cell_of(eqn, operands, wanted)
    return Recurrence(cell, _weights(cell))


def cell_of(
    eqn: Any,
    operands: Sequence[Any],
    wanted: Sequence[bool],
    steps: Steps | None = None,
    dtypes: Sequence[str] = DTYPES,
) -> Cell:
    """The same, whatever its weights are.

    Args:
        steps: what runs its step.
        dtypes: that its products may have.

    Raises:
        Unlike: it is no recurrent layer that the kernels know.
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
    results = (steps or Steps()).evaluate(body, given)
    mode, h, c, gates = _cell({at: results[at] for at in range(n_carry) if not stays[at]}, dtypes)
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
    return Cell(mode, h, c, x.at, tuple(sources), tuple(gates))


def _cell(carry: dict[int, Any], dtypes: Sequence[str]) -> tuple[str, int, int | None, list[Sum]]:
    """The mode, the places of h and c, and the gates' sums in torch's order; of GRU's n its input's and its hidden.

    Raises:
        Unlike: it is none of them.
    """
    if len(carry) == 2:
        for c, h in itertools.permutations(carry):
            if gates := _lstm(carry[c], carry[h], Input("carry", c)):
                return "LSTM", h, c, _checked(gates, h, ["both"] * 4, dtypes)
    if len(carry) == 1:
        ((h, new),) = carry.items()
        if gates := _gru(new, Input("carry", h)):
            return "GRU", h, None, _checked(gates, h, ["both", "both", "x", "carry"], dtypes)
        for name in ("tanh", "relu"):
            if gate := _of(new, name):
                return f"RNN_{name.upper()}", h, None, _checked([gate], h, ["both"], dtypes)
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


def _checked(gates: list[Sum], h: int, reads: list[str], allowed: Sequence[str]) -> list[Sum]:
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
    if len(dtypes) > 1 or not dtypes <= set(allowed):
        raise Unlike(f"its products are of {' and '.join(sorted(dtypes))}")
    return gates


def _weights(cell: Cell) -> tuple[Any, ...]:
    """w_ih, w_hh, b_ih and b_hh in torch's layout, in the dtype of the products."""
    (dtype,) = cell.gates[0].dtypes
    zeros = Part(jnp.zeros(cell.gates[0].size, dtype), 0, cell.gates[0].size)
    biases, of_n = cell.biases
    hidden = [zeros] * (len(biases) - 1) + [of_n or zeros]
    w_ih, w_hh = (_joined(parts).T for parts in cell.sides)
    return tuple(array.astype(dtype) for array in (w_ih, w_hh, _joined([b or zeros for b in biases]), _joined(hidden)))


def _joined(parts: list[Part]) -> Any:
    """Parts side by side; the whole itself where they are cut from it in this order."""
    follow = all(one.whole is other.whole and one.stop == other.start for one, other in itertools.pairwise(parts))
    if follow:
        whole = Part(parts[0].whole, parts[0].start, parts[-1].stop)
        return whole.whole if whole.stop - whole.start == whole.whole.shape[-1] else whole.value()
    return jnp.concatenate([part.value() for part in parts], -1)
