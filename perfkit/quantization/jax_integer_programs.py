"""Programs of quantized models with perfkit's kernels for bytes in them, also inside of loops and branches.

What a kernel packs of weights depends on parameters alone: of what a loop keeps it is computed once, before it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Literal

from perfkit.backends.jax_autocast import trace, untraced
from perfkit.backends.jax_autocast_casting import bind
from perfkit.backends.jax_autocast_rules import scan_sizes
from perfkit.backends.jax_fused import live_in
from perfkit.backends.jax_fused_conv import reading
from perfkit.backends.jax_fused_steps import Unlike
from perfkit.backends.jax_model import Function
from perfkit.backends.jax_prepared import evaluated, parted
from perfkit.backends.jax_rewriting import context_of
from perfkit.backends.jax_unread import Unread
from perfkit.kernels._jax import default_device
from perfkit.quantization.jax_integer_layers import KINDS, Layer, layers
from perfkit.quantization.jax_integer_rnn import Recurrence, recurrence
from perfkit.quantization.jax_integers import weights_of

Told = Callable[[Layer | Recurrence], None]


def in_kernels(function: Function, told: Told | None = None) -> Function:
    """`function`, of which `perfkit.quantization.jax_products.quantized` has made products on integers, in kernels.

    Args:
        told: is told of each layer while it is traced.
    """
    program = _Program(told or (lambda _layer: None))

    def run(*args: Any, **kwargs: Any) -> Any:
        jaxpr, values, outputs = trace(function, args, kwargs)
        return untraced(jaxpr, program.evaluate(jaxpr, values), outputs)

    return run


class _Program:
    """Evaluates jaxprs with kernels in place of what they compute; final."""

    def __init__(self, told: Told):
        self.told, self.device = told, default_device()

    def evaluate(self, jaxpr: Any, args: Sequence[Any]) -> list[Any]:
        """The outputs of a jaxpr, open or closed."""
        consts, jaxpr = getattr(jaxpr, "consts", ()), getattr(jaxpr, "jaxpr", jaxpr)
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
        found, live, unread = layers(jaxpr, *reading(jaxpr), self.device), live_in(jaxpr), Unread(jaxpr)
        inside = {at for layer in found.values() for at in layer.equations}

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, Literal) else values[atom]

        for at, eqn in enumerate(jaxpr.eqns):
            layer = found.get(at)
            if layer is not None:
                self.told(layer)
            elif at in inside:
                continue
            with context_of(eqn):
                if layer is not None and layer.ours:
                    results = [layer.run(jaxpr.eqns, read)]
                else:
                    results = self._apply(eqn, list(map(read, eqn.invars)), live, unread.ends(eqn, values))
            values.update(zip(eqn.outvars, results, strict=True))
        return list(map(read, jaxpr.outvars))

    def _apply(self, eqn: Any, operands: list[Any], live: set, lengths: Any) -> Sequence[Any]:
        control = _CONTROL.get(eqn.primitive.name)
        if control is None or not _holds(eqn):
            return bind(eqn, operands)
        if eqn.primitive.name == "scan":
            with contextlib.suppress(Unlike):  # then its products run in kernels step by step
                found = recurrence(eqn, operands, [var in live for var in eqn.outvars], self.device, lengths)
                if found.ours:
                    self.told(found)
                    return found.run(eqn, operands)
        return control(self, eqn, operands)

    def _scan(self, eqn: Any, operands: list[Any]) -> Sequence[Any]:
        params = eqn.params
        n_consts, n_carry = scan_sizes(params)
        body = self._body(params["jaxpr"], operands[:n_consts])

        def step(carry: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
            outputs = body([*carry, *slices])
            return outputs[:n_carry], outputs[n_carry:]

        options = {name: params[name] for name in ("length", "reverse", "unroll", "_split_transpose") if name in params}
        start, slices = operands[n_consts : n_consts + n_carry], operands[n_consts + n_carry :]
        carry, ys = lax.scan(step, start, slices, **options)
        return [*carry, *ys]

    def _while(self, eqn: Any, operands: list[Any]) -> Sequence[Any]:
        params = eqn.params
        in_test, in_body = params["cond_nconsts"], params["body_nconsts"]
        test = self._body(params["cond_jaxpr"], operands[:in_test])
        body = self._body(params["body_jaxpr"], operands[in_test : in_test + in_body])
        return lax.while_loop(lambda carry: test(carry)[0], body, operands[in_test + in_body :])

    def _cond(self, eqn: Any, operands: list[Any]) -> Sequence[Any]:
        index, *rest = operands
        branches = [self._body(branch, []) for branch in eqn.params["branches"]]
        return lax.switch(index, [lambda *given, run=run: run(given) for run in branches], *rest)

    def _body(self, closed: Any, consts: Sequence[Any]) -> Callable[[Sequence[Any]], list[Any]]:
        """What a jaxpr makes of its last operands after `consts`: what depends on these alone is computed now."""
        new = jax.make_jaxpr(lambda *args: self.evaluate(closed, args))(*closed.in_avals)
        jaxpr, count = new.jaxpr, len(consts)
        given = dict(zip([*jaxpr.constvars, *jaxpr.invars[:count]], [*new.consts, *consts], strict=True))
        kept = parted(jaxpr, count).kept
        given |= dict(zip(kept, evaluated(jaxpr, given, kept), strict=True))

        def run(rest: Sequence[Any]) -> list[Any]:
            inputs = dict(zip(jaxpr.invars[count:], rest, strict=True))
            outputs = evaluated(jaxpr, given | inputs, jaxpr.outvars, effects=True)
            return [jnp.asarray(value, aval.dtype) for value, aval in zip(outputs, new.out_avals, strict=True)]

        return run


def _holds(eqn: Any) -> bool:
    """Whether a product on integers is somewhere in the jaxprs of an equation."""
    inner = [each for value in eqn.params.values() for each in (value if isinstance(value, tuple) else (value,))]
    jaxprs = [getattr(each, "jaxpr", each) for each in inner if hasattr(each, "eqns") or hasattr(each, "jaxpr")]
    return any(weights_of(each, KINDS) is not None or _holds(each) for jaxpr in jaxprs for each in jaxpr.eqns)


_CONTROL: dict[str, Callable[[_Program, Any, list[Any]], Sequence[Any]]] = {
    "scan": _Program._scan,
    "while": _Program._while,
    "cond": _Program._cond,
}
