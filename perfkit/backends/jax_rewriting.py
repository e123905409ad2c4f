"""A JAX function with some of its operations done in another way, also inside of its loops, branches and calls."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from perfkit.backends.jax_autocast_casting import bind, remapped

Rules = Mapping[str, Callable[[Any, list[Any]], Sequence[Any]]]
"""By the name of a primitive, what is done in its place: a function of the equation and its operands' values."""


def rewritten(function: Callable, rules: Rules) -> Callable:
    """`function`, of positional arguments, under the rules."""

    @functools.wraps(function, updated=())
    def other(*args: Any) -> Any:
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        found = evaluated(closed, jax.tree.leaves(args), rules)
        return jax.tree.unflatten(jax.tree.structure(shapes), found)

    return other


def evaluated(closed: Any, args: Sequence[Any], rules: Rules, also: Sequence[Any] = ()) -> list[Any]:
    """The outputs of a closed jaxpr under the rules, and the values of some more of its variables."""
    jaxpr = closed.jaxpr
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *args], strict=True))
    for eqn in jaxpr.eqns:
        given = [atom.val if isinstance(atom, Literal) else values[atom] for atom in eqn.invars]
        with context_of(eqn):
            results = rules.get(eqn.primitive.name, functools.partial(bound, rules=rules))(eqn, given)
        values.update(zip(eqn.outvars, results, strict=True))
    return [atom.val if isinstance(atom, Literal) else values[atom] for atom in (*jaxpr.outvars, *also)]


def bound(eqn: Any, given: Sequence[Any], rules: Rules) -> Sequence[Any]:
    """An equation as it is, with what is inside of it under the rules."""
    if eqn.primitive.name == "shard_map" and _ruled(eqn.params["jaxpr"], rules):
        closed = ClosedJaxpr(eqn.params["jaxpr"], ())
        return remapped(eqn, lambda *args: evaluated(closed, args, rules), given)
    return bind(
        eqn, given, **{name: _within(value, rules) for name, value in eqn.params.items() if _ruled(value, rules)}
    )


def holds(eqn: Any, names: Container[str]) -> bool:
    """Whether an equation is one of these primitives, or holds one."""
    return eqn.primitive.name in names or any(_ruled(each, names) for each in eqn.params.values())


def _ruled(value: Any, rules: Container[str]) -> bool:
    """Whether a parameter of an equation holds an operation that a rule is for."""
    if isinstance(value, (tuple, list)):
        return any(_ruled(each, rules) for each in value)
    inner = getattr(value, "jaxpr", value)
    return isinstance(inner, Jaxpr) and any(holds(eqn, rules) for eqn in inner.eqns)


def _within(value: Any, rules: Rules) -> Any:
    """The same parameter, with its jaxprs under the rules."""
    if isinstance(value, (tuple, list)):
        return type(value)(_within(each, rules) if _ruled(each, rules) else each for each in value)
    closed = value if isinstance(value, ClosedJaxpr) else ClosedJaxpr(value, ())
    inner = jax.make_jaxpr(lambda *args: evaluated(closed, args, rules))(*(var.aval for var in closed.jaxpr.invars))
    return inner if isinstance(value, ClosedJaxpr) else inner.jaxpr


@contextlib.contextmanager
def context_of(eqn: Any):
    """The named scopes, compute type and mesh that the equation was traced under, as in `jax.core.eval_jaxpr`."""
    names = str(eqn.source_info.name_stack)
    with jax.named_scope(names) if names else contextlib.nullcontext(), eqn.ctx.manager:
        yield
