"""Runs a jaxpr under autocast: every equation is bound again, in the dtypes that the tables of jax_autocast_rules give it.

Two facts are known about each float32 value of the original program while it is rewritten: what it is now (float32 or the
low dtype), and whether it is a spread-out constant such as the 0.0 of a ReLU, which takes the dtype of its company.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Literal, jaxpr_as_fun

from perfkit.backends import jax_autocast_rules as rules
from perfkit.backends.jax_autocast_rules import FLOAT32, is_castable

# Repeats one number, so the result is as much a constant as the operand was.
_SPREADS = frozenset({"broadcast_in_dim", "copy", "reshape", "squeeze", "stop_gradient", "convert_element_type"})


class Operand(NamedTuple):
    """A value on its way into an equation, with what the original program knew about it."""

    value: Any
    aval: Any
    constant: float | None = None

    @property
    def castable(self) -> bool:
        return is_castable(self.aval)


class Rewriter:
    """Evaluates jaxprs under autocast. One per autocast function; final.

    Args:
        low: the dtype products run in.
    """

    def __init__(self, low: np.dtype):
        self.low = low
        # Rewritten inner jaxprs, by the jaxpr they came from. JAX compiles a jit once per jaxpr object, so a function that
        # is called twice must meet the same object twice. A jaxpr never changes, so nothing here can go stale.
        self._rewritten: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    def evaluate(self, jaxpr: Any, args: Sequence[Any], constants: Sequence[float | None] = ()) -> list[Any]:
        """The outputs of a jaxpr, each in the dtype it came out in.

        Args:
            jaxpr: open or closed.
            args: one value per input; float32 inputs may arrive in the low dtype.
            constants: for each input, the number it repeats if that is known; () if none is.
        """
        consts, jaxpr = getattr(jaxpr, "consts", ()), getattr(jaxpr, "jaxpr", jaxpr)
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
        known = {var: number for var, number in zip(jaxpr.invars, constants, strict=False) if number is not None}

        def operand(atom: Any) -> Operand:
            if isinstance(atom, Literal):
                return Operand(atom.val, atom.aval, float(atom.val) if _is_number(atom.aval) else None)
            return Operand(values[atom], atom.aval, known.get(atom))

        for eqn in jaxpr.eqns:
            operands = [operand(atom) for atom in eqn.invars]
            with _context_of(eqn):
                results = self._apply(eqn, operands)
            values.update(zip(eqn.outvars, results, strict=True))
            if eqn.primitive.name in _SPREADS and operands[0].constant is not None and is_castable(eqn.outvars[0].aval):
                known[eqn.outvars[0]] = operands[0].constant
        return [operand(atom).value for atom in jaxpr.outvars]

    def _apply(self, eqn: Any, operands: list[Operand]) -> Sequence[Any]:
        name = eqn.primitive.name
        if name in _CONTROL_RULES and rules.kept_reason(eqn) is None:
            return _CONTROL_RULES[name](self, eqn, operands)
        if name in rules.PRODUCTS and rules.product_skip_reason(eqn, self.low) is None:
            return [self._product(eqn, operands)]
        if name == "convert_element_type" and operands[0].castable and eqn.params["new_dtype"] == FLOAT32:
            return [operands[0].value]  # float32 to float32: the value may be low by now, and stays so
        if name == "convert_element_type" or name in rules.SEPARATE:
            return _bind(eqn, [operand.value for operand in operands])
        if name in rules.NEUTRAL:
            return _bind(eqn, self._agree(operands))
        return _bind(eqn, [_restore(operand.value, operand.aval) for operand in operands])

    def _agree(self, operands: list[Operand]) -> list[Any]:
        """The operands of a neutral equation in one dtype: the widest that arrived, constants not counting."""
        arrived = [operand for operand in operands if operand.castable]
        low = any(operand.value.dtype == self.low for operand in arrived)
        wide = any(operand.value.dtype == FLOAT32 and not self._bends(operand) for operand in arrived)
        target = self.low if low and not wide else FLOAT32
        return [_cast(operand, target) if operand.castable else operand.value for operand in operands]

    def _bends(self, operand: Operand) -> bool:
        """Whether the operand is a constant that the low dtype can hold: -1e9 and 1e-8 are out of float16's range."""
        if operand.constant is None:
            return False
        with np.errstate(over="ignore", under="ignore"):
            cast = float(np.asarray(operand.constant, FLOAT32).astype(self.low))
        return np.isfinite(cast) == np.isfinite(operand.constant) and (cast == 0) == (operand.constant == 0)

    def _product(self, eqn: Any, operands: list[Operand]) -> Any:
        lhs, rhs = (_cast(operand, self.low) for operand in operands)
        if eqn.primitive.name == "dot_general":
            return _low_dot(eqn, self.low)(lhs, rhs)
        # A convolution is not asked for a float32 result: XLA for NVIDIA GPUs has no such convolution and would run all of
        # it in float32 (seen in the HLO compiled for an H100: cuDNN got the original float32 operands). Asked for a low
        # result it still accumulates in float32: cuDNN and TPU inside the convolution, XLA's CPU by widening it.
        return _bind(eqn, [lhs, rhs], preferred_element_type=self.low)[0]

    # Control: the inner jaxprs are rewritten for the dtypes that arrive.

    def _rewrite(self, jaxpr: Any, operands: Sequence[Operand], *, restore: bool = False) -> Any:
        """A jaxpr under autocast, closed, for operands of the dtypes given; `restore` gives its outputs their dtypes back."""
        dtypes = tuple(operand.value.dtype if operand.castable else None for operand in operands)
        constants = tuple(operand.constant for operand in operands)
        versions = self._rewritten.setdefault(jaxpr, {})
        key = (dtypes, constants, restore)
        if key not in versions:
            inputs = getattr(jaxpr, "jaxpr", jaxpr).invars
            avals = [v.aval if d is None else v.aval.update(dtype=d) for v, d in zip(inputs, dtypes, strict=True)]
            versions[key] = jax.make_jaxpr(self._body(jaxpr, constants, restore))(*avals)
        return versions[key]

    def _body(self, jaxpr: Any, constants: Sequence[float | None], restore: bool) -> Callable:
        # A weak reference, or the memo's value would keep its own key alive.
        avals = [atom.aval for atom in getattr(jaxpr, "jaxpr", jaxpr).outvars]
        jaxpr = weakref.ref(jaxpr)

        def body(*args: Any) -> list[Any]:
            outputs = self.evaluate(jaxpr(), args, constants)
            return _restore_all(outputs, avals) if restore else outputs

        return body

    def _call(self, eqn: Any, operands: list[Operand]) -> Sequence[Any]:
        """jit, checkpoint and plain calls: the same call, with its name, donation, policy and all, of the rewritten jaxpr."""
        (name,) = rules.CONTROL[eqn.primitive.name]
        original = eqn.params[name]
        rewritten = self._rewrite(original, operands)
        if not hasattr(original, "consts"):  # an open jaxpr, before JAX 0.11
            assert not rewritten.consts, "an open jaxpr receives its constants as arguments"
            rewritten = rewritten.jaxpr
        return _bind(eqn, [operand.value for operand in operands], **{name: rewritten})

    def _cond(self, eqn: Any, operands: list[Operand]) -> Sequence[Any]:
        branches = tuple(self._rewrite(branch, operands[1:], restore=True) for branch in eqn.params["branches"])
        return _bind(eqn, [operand.value for operand in operands], branches=branches)

    def _while(self, eqn: Any, operands: list[Operand]) -> Sequence[Any]:
        test, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
        test_consts, body_consts, carry = _split(operands, eqn.params["cond_nconsts"], eqn.params["body_nconsts"])
        test_consts, body_consts = self._cast_outside(test, test_consts), self._cast_outside(body, body_consts)
        carry = [Operand(_restore(operand.value, operand.aval), operand.aval) for operand in carry]
        return _bind(
            eqn,
            [operand.value for operand in (*test_consts, *body_consts, *carry)],
            cond_jaxpr=self._rewrite(test, [*test_consts, *carry], restore=True),
            body_jaxpr=self._rewrite(body, [*body_consts, *carry], restore=True),
        )

    def _cast_outside(self, body: Any, operands: list[Operand]) -> list[Operand]:
        """The first operands of a loop body, those that only feed products already in the low dtype."""
        feeds = rules.feeds_only_products(body, self.low)
        low = (Operand(_cast(operand, self.low), operand.aval) for operand in operands)
        plain = (operand._replace(constant=None) for operand in operands)
        return [a if only else b for only, a, b in zip(feeds, low, plain, strict=False)]

    def _scan(self, eqn: Any, operands: list[Operand]) -> Sequence[Any]:
        params, body = eqn.params, eqn.params["jaxpr"]
        consts, carry, xs = _split(operands, *rules.scan_sizes(params))
        feeds = rules.feeds_only_products(body, self.low)
        read_consts = [self._loop_constant(operand, only) for operand, only in zip(consts, feeds, strict=False)]
        only_xs = feeds[len(consts) + len(carry) :]
        values = [_cast(x, self.low) if x.castable and only else x.value for x, only in zip(xs, only_xs, strict=True)]
        carry_avals = [operand.aval for operand in carry]

        def step(carried: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
            outputs = self.evaluate(body, [*(read() for read in read_consts), *carried, *x])
            return _restore_all(outputs[: len(carry)], carry_avals), outputs[len(carry) :]

        start = _restore_all([operand.value for operand in carry], carry_avals)
        options = {name: params[name] for name in ("length", "reverse", "unroll", "_split_transpose") if name in params}
        carried, ys = lax.scan(step, start, values, **options)
        return [*carried, *ys]

    def _loop_constant(self, operand: Operand, feeds_only_products: bool | None) -> Callable[[], Any]:
        """How the body of a scan reads a constant: cast once, outside, if only products want it.

        A low constant takes its float32 original along. Backwards, a scan adds up a constant's cotangents in the constant's
        own dtype, and in bfloat16 a sum stops growing at 256 times its terms.
        """
        if not operand.castable or not (feeds_only_products or operand.value.dtype == self.low):
            return lambda: operand.value
        wide, low = _restore(operand.value, operand.aval), _cast(operand, self.low)
        return lambda: _low_copy(wide, low)

    def _shard_map(self, eqn: Any, operands: list[Operand]) -> Sequence[Any]:
        params = eqn.params

        def shard(*args: Any) -> list[Any]:
            return self.evaluate(params["jaxpr"], args)

        mapped = jax.shard_map(
            shard,
            mesh=params["mesh"],
            in_specs=params["in_specs"],
            out_specs=list(params["out_specs"]),
            axis_names=set(params["newly_manual_axes"]),
            check_vma=params["check_vma"],
        )
        return mapped(*(operand.value for operand in operands))

    def _custom_jvp(self, eqn: Any, operands: list[Operand]) -> Sequence[Any]:
        rewritten = self._rewrite(eqn.params["call_jaxpr"], operands)
        dtypes = [aval.dtype for aval in rewritten.out_avals]
        avals = [operand.aval for operand in operands]
        call = jax.custom_jvp(jaxpr_as_fun(rewritten))

        @functools.partial(call.defjvp, symbolic_zeros=True)
        def rule(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[list[Any], list[Any]]:
            # The caller's rule is reached by differentiating the original call, and then rewritten like anything else.
            moving = [at for at, tangent in enumerate(tangents) if not isinstance(tangent, SymbolicZero)]

            def pushforward(primals: Sequence[Any], directions: Sequence[Any]) -> tuple[list[Any], list[Any]]:
                along = _only(moving, primals, lambda *full: _bind(eqn, full))
                outputs, moved = jax.jvp(along, [primals[at] for at in moving], list(directions))
                return outputs, [tangent for output, tangent in zip(outputs, moved, strict=True) if _is_real(output)]

            traced, shapes = jax.make_jaxpr(pushforward, return_shape=True)(avals, [avals[at] for at in moving])
            flat = self.evaluate(traced, [*primals, *(tangents[at] for at in moving)])
            outputs, moved = jax.tree.unflatten(jax.tree.structure(shapes), flat)
            outputs = [_to(value, dtype) for value, dtype in zip(outputs, dtypes, strict=True)]
            rest = iter(moved)
            return outputs, [_to(next(rest), o.dtype) if _is_real(o) else _no_tangent(o) for o in outputs]

        return call(*(operand.value for operand in operands))

    def _custom_vjp(self, eqn: Any, operands: list[Operand]) -> Sequence[Any]:
        inner, closed_over = eqn.params["call_jaxpr"], eqn.params["num_consts"]
        rewritten = self._rewrite(inner, operands)
        # Values that the caller's function closed over stay closed over, so that differentiating them raises as before.
        outer, values = _split([operand.value for operand in operands], closed_over)
        call = jax.custom_vjp(lambda *args: jaxpr_as_fun(rewritten)(*outer, *args))
        moving = [at for at in range(closed_over, len(operands)) if _is_real(operands[at].aval)]

        @functools.cache
        def traced() -> tuple[Any, Any]:
            """The caller's forward and backward rules at their original dtypes, reached by differentiating the original."""

            def forward(*primals: Any) -> tuple[list[Any], Any]:
                return jax.vjp(_only(moving, primals, lambda *full: _bind(eqn, full)), *(primals[at] for at in moving))

            def backward(leaves: Sequence[Any], cotangents: Sequence[Any]) -> Sequence[Any]:
                given = iter(cotangents)
                full = [next(given) if _is_real(aval) else _no_tangent(aval) for aval in inner.out_avals]
                return jax.tree.unflatten(structure, leaves)(full)

            going, (_, pullback) = jax.make_jaxpr(forward, return_shape=True)(*inner.in_avals)
            structure = jax.tree.structure(pullback)
            residuals = going.out_avals[len(inner.out_avals) :]
            cotangents = [aval for aval in inner.out_avals if _is_real(aval)]
            return going, jax.make_jaxpr(backward)(residuals, cotangents)

        def forward(*args: Any) -> tuple[list[Any], tuple[list[Any], list[Any]]]:
            flat = self.evaluate(traced()[0], [*outer, *args])
            outputs, residuals = _split(flat, len(inner.out_avals))
            outputs = [_to(value, aval.dtype) for value, aval in zip(outputs, rewritten.out_avals, strict=True)]
            return outputs, residuals

        def backward(residuals: list[Any], cotangents: Sequence[Any]) -> tuple[Any, ...]:
            real = [ct for ct, aval in zip(cotangents, inner.out_avals, strict=True) if _is_real(aval)]
            gradients = dict(zip(moving, self.evaluate(traced()[1], [*residuals, *real]), strict=True))
            wanted = range(closed_over, len(operands))
            return tuple(_to(gradients[at], operands[at].value.dtype) if at in gradients else None for at in wanted)

        call.defvjp(forward, backward)
        return call(*values)


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
    "custom_jvp_call": Rewriter._custom_jvp,
    "custom_vjp_call": Rewriter._custom_vjp,
    "shard_map": Rewriter._shard_map,
}


def _low_dot(eqn: Any, low: np.dtype) -> Callable[[Any, Any], Any]:
    """A matrix product of low operands, accumulated in float32 and rounded once.

    The rule is JAX's own product rule, except that it asks for low tangents. Transposing that one gives backward products
    of two low operands; transposing the product itself would meet its low operand with a float32 cotangent.
    """

    @jax.custom_jvp
    def dot(lhs: Any, rhs: Any) -> Any:
        return _to(_bind(eqn, [lhs, rhs], preferred_element_type=FLOAT32)[0], low)

    @functools.partial(dot.defjvp, symbolic_zeros=True)
    def rule(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[Any, Any]:
        (lhs, rhs), (d_lhs, d_rhs) = primals, tangents
        pairs = [(d_lhs, rhs)] if not isinstance(d_lhs, SymbolicZero) else []
        pairs += [(lhs, d_rhs)] if not isinstance(d_rhs, SymbolicZero) else []
        terms = [_bind(eqn, pair, preferred_element_type=low)[0] for pair in pairs]
        return dot(lhs, rhs), functools.reduce(lax.add, terms)

    return dot


@jax.custom_jvp
def _low_copy(wide: Any, low: Any) -> Any:  # noqa: ARG001 (only the tangent comes from the float32 original)
    """The low copy of a float32 value, whose derivative is that of the original."""
    return low


@functools.partial(_low_copy.defjvp, symbolic_zeros=True)
def _low_copy_jvp(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[Any, Any]:
    low, d_wide = primals[1], tangents[0]
    zero = isinstance(d_wide, SymbolicZero)
    return low, lax.full_like(low, 0) if zero else _to(d_wide, low.dtype)


def _bind(eqn: Any, values: Iterable[Any], **changes: Any) -> Sequence[Any]:
    """The results of an equation on new values, with some of its parameters changed."""
    params = eqn.primitive.get_bind_params({**eqn.params, **changes})
    results = eqn.primitive.bind(*values, **params)
    return results if eqn.primitive.multiple_results else [results]


@contextlib.contextmanager
def _context_of(eqn: Any):
    """The named scopes, compute type and mesh that the equation was traced under."""
    names = str(eqn.source_info.name_stack)
    with jax.named_scope(names) if names else contextlib.nullcontext(), eqn.ctx.manager:
        yield


def _only(moving: Sequence[int], values: Sequence[Any], function: Callable) -> Callable:
    """`function` of the values at `moving` alone, the others held fixed."""

    def along(*moved: Any) -> Any:
        full = list(values)
        for at, value in zip(moving, moved, strict=True):
            full[at] = value
        return function(*full)

    return along


def _cast(operand: Operand, dtype: np.dtype) -> Any:
    if operand.constant is not None and operand.aval.shape == ():
        return np.asarray(operand.constant, dtype)  # a literal stays a literal
    return _to(operand.value, dtype)


def _to(value: Any, dtype: Any) -> Any:
    return value if value.dtype == dtype else lax.convert_element_type(value, dtype)


def _restore(value: Any, aval: Any) -> Any:
    return _to(value, aval.dtype) if is_castable(aval) else value


def _restore_all(values: Sequence[Any], avals: Sequence[Any]) -> list[Any]:
    return [_restore(value, aval) for value, aval in zip(values, avals, strict=True)]


def _is_real(value: Any) -> bool:
    """Whether the value has a derivative."""
    return jax.numpy.issubdtype(value.dtype, jax.numpy.inexact)


def _no_tangent(value: Any) -> np.ndarray:
    return np.zeros(value.shape, jax.dtypes.float0)


def _is_number(aval: Any) -> bool:
    return is_castable(aval) and aval.shape == ()


def _split(items: Sequence[Any], *sizes: int) -> list[list[Any]]:
    """The items in runs of the given sizes, and what is left."""
    runs, start = [], 0
    for size in sizes:
        runs.append(list(items[start : start + size]))
        start += size
    return [*runs, list(items[start:])]
