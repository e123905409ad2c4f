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
    results = Steps().evaluate(body, given)
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
