"""Runs a jaxpr under autocast: every equation is bound again, in the dtypes that jax_autocast_rules gives it.

Two facts are known about each float32 value of the original program while it is rewritten: what it is now (float32 or
the low dtype), and whether it is one number repeated, such as the 0.0 of a ReLU, which takes the dtype of its company.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend.core import Literal

from perfkit.backends import jax_autocast_rules as rules
from perfkit.backends.jax_autocast_casting import (
    Operand,
    bind,
    cast,
    low_copy,
    low_dot,
    remapped,
    restore,
    restore_all,
)
from perfkit.backends.jax_autocast_derivatives import custom_jvp, custom_vjp
from perfkit.backends.jax_autocast_rules import FLOAT32, runs
from perfkit.backends.jax_rewriting import context_of

# Give back the number they are given, once or many times.
_REPEATS = frozenset({"broadcast_in_dim", "convert_element_type", "copy", "reshape", "squeeze", "stop_gradient"})


class Rewriter:
    """Evaluates jaxprs under autocast. One per autocast function; final.

    Args:
        low: the dtype products run in.
        transposable: whether the products may be transposed as they stand, as those of a derivative rule are.
    """

    def __init__(self, low: np.dtype, *, transposable: bool = False):
        self.low = low
        self.transposable = transposable
        # Rewritten inner jaxprs, by the jaxpr they came from. JAX compiles a jit once per jaxpr object, so a function
        # that is called twice must meet the same object twice. A jaxpr never changes, so nothing here can go stale.
        self._rewritten: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    def evaluate(self, jaxpr: Any, args: Sequence[Any], bends: Sequence[bool] = ()) -> list[Any]:
        """The outputs of a jaxpr, each in the dtype it came out in.

        Args:
            jaxpr: open or closed.
            args: one value per input; float32 inputs may arrive in the low dtype.
            bends: for each input, `Operand.bends`; () if none does.
        """
        consts, jaxpr = getattr(jaxpr, "consts", ()), getattr(jaxpr, "jaxpr", jaxpr)
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
        bending = {var for var, bent in zip(jaxpr.invars, bends, strict=False) if bent}

        def operand(atom: Any) -> Operand:
            if isinstance(atom, Literal):
                return Operand(atom.val, atom.aval, self._holds(atom))
            return Operand(values[atom], atom.aval, atom in bending)

        for eqn in jaxpr.eqns:
            operands = [operand(atom) for atom in eqn.invars]
            with context_of(eqn):
                results = self._apply(eqn, operands)
            values.update(zip(eqn.outvars, results, strict=True))
            if eqn.primitive.name in _REPEATS and operands[0].bends:
                bending.add(eqn.outvars[0])
        return [operand(atom).value for atom in jaxpr.outvars]

    def _apply(self, eqn: Any, operands: list[Operand]) -> Sequence[Any]:
        name = eqn.primitive.name
        if name in _CONTROL_RULES and rules.kept_reason(eqn) is None:
            return _CONTROL_RULES[name](self, eqn, operands)
        if name in rules.PRODUCTS and rules.product_skip_reason(eqn, self.low) is None:
            return [self._product(eqn, operands)]
        if name == "dot_general" and rules.is_low_throughout(eqn, self.low) and not self.transposable:
            return [low_dot(eqn, self.low)(*(operand.value for operand in operands))]
        if name == "convert_element_type" and operands[0].castable and eqn.params["new_dtype"] == FLOAT32:
            return [operands[0].value]  # float32 to float32: the value may be low by now, and stays so
        if name == "convert_element_type" or name in rules.SEPARATE:
            return bind(eqn, [operand.value for operand in operands])
        if name in rules.NEUTRAL:
            return bind(eqn, self._agree(operands))
        return bind(eqn, [restore(operand.value, operand.aval) for operand in operands])

    def _agree(self, operands: list[Operand]) -> list[Any]:
        """The operands of a neutral equation in one dtype: the widest that arrived, not counting those that bend."""
        arrived = [operand for operand in operands if operand.castable]
        low = any(operand.value.dtype == self.low for operand in arrived)
        wide = any(operand.value.dtype == FLOAT32 and not operand.bends for operand in arrived)
        target = self.low if low and not wide else FLOAT32
        return [cast(operand, target) if operand.castable else operand.value for operand in operands]

    def _holds(self, literal: Literal) -> bool:
        """Whether the low dtype can hold a number: -1e9 and 1e-8 are out of float16's range."""
        if literal.aval.shape != () or not jax.numpy.issubdtype(literal.aval.dtype, jax.numpy.number):
            return False
        with np.errstate(over="ignore", under="ignore"):
            number = np.asarray(literal.val)
            held = number.astype(self.low)
        return bool(np.isfinite(held) == np.isfinite(number) and (held == 0) == (number == 0))

    def _product(self, eqn: Any, operands: list[Operand]) -> Any:
        lhs, rhs = (cast(operand, self.low) for operand in operands)
        if eqn.primitive.name == "dot_general" and not self.transposable:
            return low_dot(eqn, self.low)(lhs, rhs)
        # A convolution is not asked for a float32 result: XLA has no such bfloat16 convolution for NVIDIA GPUs and runs
        # all of it in float32 (compiled for an H100 with jaxlib 0.10.2, cuDNN got the float32 operands back). Asked for
        # a low result it still accumulates in float32: cuDNN and TPU inside the convolution, XLA's CPU by widening it.
        return bind(eqn, [lhs, rhs], preferred_element_type=self.low)[0]

    @functools.cached_property
    def of_derivatives(self) -> Rewriter:
        """The one for what differentiating gave, whose products may be transposed."""
        return self if self.transposable else Rewriter(self.low, transposable=True)

    # Control: the inner jaxprs are rewritten for the dtypes that arrive.

    def rewrite(self, jaxpr: Any, operands: Sequence[Operand], *, as_written: bool = False) -> Any:
        """A jaxpr under autocast, closed, for operands of these dtypes; outputs in their own dtypes if `as_written`."""
        dtypes = tuple(operand.value.dtype if operand.castable else None for operand in operands)
        bends = tuple(operand.bends for operand in operands)
        versions = self._rewritten.setdefault(jaxpr, {})
        key = (dtypes, bends, as_written)
        if key not in versions:
            inner = getattr(jaxpr, "jaxpr", jaxpr)
            before = [
                v.aval if d is None else v.aval.update(dtype=d) for v, d in zip(inner.invars, dtypes, strict=True)
            ]
            after = [atom.aval for atom in inner.outvars]

            def body(*args: Any) -> list[Any]:
                outputs = self.evaluate(jaxpr, args, bends)
                return restore_all(outputs, after) if as_written else outputs

            versions[key] = jax.make_jaxpr(body)(*before)
        return versions[key]

    def _call(self, eqn: Any, operands: list[Operand]) -> Sequence[Any]:
        """jit, checkpoint, plain calls: the same call, with its name, donation and policy, of the rewritten jaxpr."""
        (name,) = rules.CONTROL[eqn.primitive.name]
        original = eqn.params[name]
        rewritten = self.rewrite(original, operands)
        if not hasattr(original, "consts"):  # an open jaxpr, before JAX 0.11
            assert not rewritten.consts, "an open jaxpr receives its constants as arguments"
            rewritten = rewritten.jaxpr
        return bind(eqn, [operand.value for operand in operands], **{name: rewritten})

    def _cond(self, eqn: Any, operands: list[Operand]) -> Sequence[Any]:
        branches = tuple(self.rewrite(branch, operands[1:], as_written=True) for branch in eqn.params["branches"])
        return bind(eqn, [operand.value for operand in operands], branches=branches)

    def _while(self, eqn: Any, operands: list[Operand]) -> Sequence[Any]:
        test, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
        test_consts, body_consts, carry = runs(operands, eqn.params["cond_nconsts"], eqn.params["body_nconsts"])
        test_consts, body_consts = self._cast_outside(test, test_consts), self._cast_outside(body, body_consts)
        carry = [Operand(restore(operand.value, operand.aval), operand.aval) for operand in carry]
        return bind(
            eqn,
            [operand.value for operand in (*test_consts, *body_consts, *carry)],
            cond_jaxpr=self.rewrite(test, [*test_consts, *carry], as_written=True),
            body_jaxpr=self.rewrite(body, [*body_consts, *carry], as_written=True),
        )

    def _cast_outside(self, body: Any, operands: list[Operand]) -> list[Operand]:
        """The first operands of a loop body, those that only feed products already in the low dtype."""
        feeds = rules.feeds_only_products(body, self.low)
        low = (Operand(cast(operand, self.low), operand.aval) for operand in operands)
        plain = (operand._replace(bends=False) for operand in operands)
        return [a if only else b for only, a, b in zip(feeds, low, plain, strict=False)]

    def _scan(self, eqn: Any, operands: list[Operand]) -> Sequence[Any]:
        params, body = eqn.params, eqn.params["jaxpr"]
        consts, carry, xs = runs(operands, *rules.scan_sizes(params))
        feeds = rules.feeds_only_products(body, self.low)
        read_consts = [self._loop_constant(operand, only) for operand, only in zip(consts, feeds, strict=False)]
        only_xs = feeds[len(consts) + len(carry) :]
        values = [cast(x, self.low) if x.castable and only else x.value for x, only in zip(xs, only_xs, strict=True)]
        carry_avals = [operand.aval for operand in carry]

        def step(carried: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
            outputs = self.evaluate(body, [*(read() for read in read_consts), *carried, *x])
            return restore_all(outputs[: len(carry)], carry_avals), outputs[len(carry) :]

        start = restore_all([operand.value for operand in carry], carry_avals)
        options = {name: params[name] for name in ("length", "reverse", "unroll", "_split_transpose") if name in params}
        carried, ys = lax.scan(step, start, values, **options)
        return [*carried, *ys]

    def _loop_constant(self, operand: Operand, feeds_only_products: bool | None) -> Callable[[], Any]:
        """How the body of a scan reads a constant: cast once, outside, if only products want it.

        A low constant takes its float32 original along. Backwards, a scan adds up a constant's cotangents in the
        constant's own dtype, and in bfloat16 a sum stops growing at 256 times its terms.
        """
        if not operand.castable or not (feeds_only_products or operand.value.dtype == self.low):
            return lambda: operand.value
        wide, low = restore(operand.value, operand.aval), cast(operand, self.low)
        return lambda: low_copy(wide, low)

    def _shard_map(self, eqn: Any, operands: list[Operand]) -> Sequence[Any]:
        body = eqn.params["jaxpr"]
        return remapped(eqn, lambda *args: self.evaluate(body, args), (operand.value for operand in operands))


_CONTROL_RULES: dict[str, Callable[[Rewriter, Any, list[Operand]], Sequence[Any]]] = {
    "jit": Rewriter._call,
    "pjit": Rewriter._call,
    "closed_call": Rewriter._call,
    "eval_jaxpr": Rewriter._call,
    "checkpoint": Rewriter._call,
    "remat2": Rewriter._call,
    "cond": Rewriter._cond,
    "while": Rewriter._while,
    "scan": Rewriter._scan,
    "custom_jvp_call": custom_jvp,
    "custom_vjp_call": custom_vjp,
    "shard_map": Rewriter._shard_map,
}
