"""Runs a jaxpr while following its weights: where a product takes one, a rule decides how it runs.

Four rules use it: finding out where weights are used, observing the ranges of what they meet, running in integers, and
running as if. Equations that no weight reaches are bound again as they are, loops and derivative rules included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Literal

from perfkit.backends import jax_autocast_rules as rules
from perfkit.backends.jax_autocast_casting import bind
from perfkit.backends.jax_rewriting import context_of
from perfkit.quantization.jax_moves import moved
from perfkit.quantization.jax_views import Faked, PackedView, View, is_view, plain, sliced

MARK = "perfkit_fake_"
"""How the names of the functions begin that stand for a quantization to come: see jax_fake."""


class Rule(Protocol):
    """What is done where a weight arrives."""

    keeps_derivatives: bool
    """Whether what runs will be differentiated: then the caller's derivative rules and checkpoints are kept."""

    def product(self, eqn: Any, x: Any, weight: View | PackedView, at: int) -> Any:
        """The result of a product of `x` (may be `Faked`) and `weight`, which is operand `at` of the equation."""

    def used(self, eqn: Any, weight: View | PackedView, at: int) -> None:
        """A weight arrived at an equation that is no product and does not only move it."""

    def marked(self, eqn: Any, operands: list[Any]) -> list[Any] | None:
        """The results of a call of a function whose name begins with `MARK`; None to run it as it is."""


class Follower:
    """Evaluates jaxprs under a rule; final."""

    def __init__(self, rule: Rule):
        self.rule = rule

    def evaluate(self, jaxpr: Any, args: Sequence[Any]) -> list[Any]:
        """The outputs of a jaxpr; args and outputs may be views of weights.

        Args:
            jaxpr: open or closed.
            args: one value or view per input.
        """
        consts, jaxpr = getattr(jaxpr, "consts", ()), getattr(jaxpr, "jaxpr", jaxpr)
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, Literal) else values[atom]

        for eqn in jaxpr.eqns:
            with context_of(eqn):
                results = self._apply(eqn, [read(atom) for atom in eqn.invars])
            values.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _apply(self, eqn: Any, operands: list[Any]) -> Sequence[Any]:
        name = eqn.primitive.name
        if name == "jit" and eqn.params["name"].startswith(MARK):
            results = self.rule.marked(eqn, operands)
            return self._bound(eqn, operands) if results is None else results
        if name in _CONTROL and any(map(is_view, operands)):
            return _CONTROL[name](self, eqn, operands)
        if not any(map(is_view, operands)):
            return bind(eqn, operands)
        if name in rules.PRODUCTS:
            return [self._product(eqn, operands)]
        results = moved(eqn, operands)
        if results is None:
            return self._bound(eqn, operands)
        if name == "gather":
            self._tell(eqn, operands)
        return results

    def _bound(self, eqn: Any, operands: list[Any]) -> Sequence[Any]:
        """The equation as it is, on dequantized weights."""
        self._tell(eqn, operands)
        return bind(eqn, map(plain, operands))

    def _tell(self, eqn: Any, operands: list[Any]) -> None:
        for at, operand in enumerate(operands):
            if isinstance(operand, (View, PackedView)):
                self.rule.used(eqn, operand, at)

    def _product(self, eqn: Any, operands: list[Any]) -> Any:
        at = next((at for at in (1, 0) if isinstance(operands[at], (View, PackedView))), None)
        if at is None:
            return self._bound(eqn, operands)[0]
        other = operands[1 - at]
        if not isinstance(other, Faked):  # a weight times a weight: this one counts as the activations
            self._tell(eqn, [other])
            other = plain(other)
        return self.rule.product(eqn, other, operands[at], at)

    # Control: inner jaxprs are run where they stand, with the weights as they arrive.

    def _inline(self, eqn: Any, operands: list[Any]) -> Sequence[Any]:
        (name,) = rules.CONTROL[eqn.primitive.name]
        return self.evaluate(eqn.params[name], operands)

    def _derivative(self, eqn: Any, operands: list[Any]) -> Sequence[Any]:
        return self._bound(eqn, operands) if self.rule.keeps_derivatives else self._inline(eqn, operands)

    def _checkpoint(self, eqn: Any, operands: list[Any]) -> Sequence[Any]:
        if not self.rule.keeps_derivatives:
            return self._inline(eqn, operands)
        options = {name: eqn.params[name] for name in ("policy", "prevent_cse")}
        run = jax.checkpoint(lambda *args: list(map(plain, self.evaluate(eqn.params["jaxpr"], args))), **options)
        return run(*operands)

    def _cond(self, eqn: Any, operands: list[Any]) -> Sequence[Any]:
        index, *rest = operands

        def run(branch: Any) -> Callable:
            return lambda *args: self._outputs(branch, args)

        return lax.switch(index, [run(branch) for branch in eqn.params["branches"]], *rest)

    def _while(self, eqn: Any, operands: list[Any]) -> Sequence[Any]:
        test, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
        in_test, in_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        test_consts, body_consts = operands[:in_test], operands[in_test : in_test + in_body]
        start = self._plain_all(eqn, operands[in_test + in_body :])
        body_consts = self._hoisted(body, body_consts)
        return lax.while_loop(
            lambda carry: self._outputs(test, [*test_consts, *carry])[0],
            lambda carry: self._outputs(body, [*body_consts, *carry]),
            start,
        )

    def _scan(self, eqn: Any, operands: list[Any]) -> Sequence[Any]:
        params, body = eqn.params, eqn.params["jaxpr"]
        n_consts, n_carry = rules.scan_sizes(params)
        consts = self._hoisted(body, operands[:n_consts])
        start = self._plain_all(eqn, operands[n_consts : n_consts + n_carry])
        xs = [self._scanned(eqn, x) for x in operands[n_consts + n_carry :]]

        def step(carry: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
            rows = [read(part) for (_, read), part in zip(xs, slices, strict=True)]
            outputs = self._outputs(body, [*consts, *carry, *rows])
            return outputs[:n_carry], outputs[n_carry:]

        options = {name: params[name] for name in ("length", "reverse", "unroll", "_split_transpose") if name in params}
        carry, ys = lax.scan(step, start, [part for part, _ in xs], **options)
        return [*carry, *ys]

    def _scanned(self, eqn: Any, x: Any) -> tuple[Any, Callable[[Any], Any]]:
        parts = sliced(x) if is_view(x) else (x, _itself)
        if parts is None:
            self.rule.used(eqn, x, 0)
            return plain(x), _itself
        return parts

    def _hoisted(self, body: Any, consts: list[Any]) -> list[Any]:
        """A loop's constants: those that its products would dequantize in every round are dequantized once, before."""
        wanted = rules.feeds_only_products(body, jnp.dtype("bfloat16"))

        def once(x: Any, only: bool | None) -> Any:
            return plain(x) if only and (isinstance(x, PackedView) or not getattr(x, "multiplies", True)) else x

        return [once(x, only) for x, only in zip(consts, wanted, strict=False)]

    def _outputs(self, jaxpr: Any, args: Sequence[Any]) -> list[Any]:
        inner = getattr(jaxpr, "jaxpr", jaxpr)
        outputs = map(plain, self.evaluate(jaxpr, list(args)))
        return [
            jnp.asarray(value, atom.aval.dtype) if isinstance(atom, Literal) else value
            for value, atom in zip(outputs, inner.outvars, strict=True)
        ]

    def _plain_all(self, eqn: Any, values: list[Any]) -> list[Any]:
        self._tell(eqn, values)
        return list(map(plain, values))


def contracted(eqn: Any, at: int) -> tuple[int, ...]:
    """The dimensions of operand `at` that a product sums over."""
    if eqn.primitive.name == "dot_general":
        return tuple(eqn.params["dimension_numbers"][0][at])
    numbers = eqn.params["dimension_numbers"]
    kept = (numbers.lhs_spec, numbers.rhs_spec)[at][0]
    return tuple(dim for dim in range(len(numbers.rhs_spec)) if dim != kept)


def _itself(x: Any) -> Any:
    return x


_CONTROL: dict[str, Callable[[Follower, Any, list[Any]], Sequence[Any]]] = {
    "jit": Follower._inline,
    "pjit": Follower._inline,
    "closed_call": Follower._inline,
    "eval_jaxpr": Follower._inline,
    "checkpoint": Follower._checkpoint,
    "remat2": Follower._checkpoint,
    "cond": Follower._cond,
    "while": Follower._while,
    "scan": Follower._scan,
    "custom_jvp_call": Follower._derivative,
    "custom_vjp_call": Follower._derivative,
}
