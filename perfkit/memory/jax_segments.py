"""A JAX function in segments that are run again in the backward pass, by evaluating its jaxpr piece by piece."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from perfkit.backends.jax_autocast import trace, untraced
from perfkit.backends.jax_autocast_casting import bind
from perfkit.backends.jax_convolutions import channels_last
from perfkit.backends.jax_rewriting import context_of

PRODUCTS = ("dot_general", "conv_general_dilated")
SHORTEST_LOOP = 8
"""Steps of a loop from which on it is cut into pieces."""

_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr"}


@dataclass(frozen=True)
class Cut:
    """How a function is cut.

    Args:
        segments: how many of about the same size, and into how many pieces each loop; 1 for the function as a whole.
        opaque: run again within a branch, for XLA on CPU, which takes a segment and its repetition for the same.
        keeps_products: what matrix products and convolutions give is remembered, and all else computed from it.
    """

    segments: int = 1
    keeps_products: bool = False
    opaque: bool = False

    def told(self, loops: bool) -> str:
        """What it does to a function, with or without long loops."""
        if self.keeps_products:
            return "all but the results of matrix products and convolutions is computed again"
        pieces = f", and loops in {self.segments} pieces of time" if loops else ""
        return f"{self.segments} segments{pieces}, each but the last run again"


def in_segments(function: Callable, cut: Cut) -> Callable:
    """`function`, whose gradient runs segments again; the same numbers."""

    @functools.wraps(function, updated=())
    def cut_function(*args: Any, **kwargs: Any) -> Any:
        jaxpr, flat, values, structure = _flat(function, args, kwargs)
        return untraced(jaxpr, _evaluated(flat, values, cut), structure)

    return cut_function


def has_long_loops(function: Callable, *args: Any, **kwargs: Any) -> bool:
    """Whether a call runs loops that are cut into pieces."""
    _, flat, _, _ = _flat(function, args, kwargs)
    return any(map(_is_long_loop, flat.jaxpr.eqns))


def _flat(function: Callable, args: tuple, kwargs: dict) -> tuple[Any, Any, list[Any], Any]:
    """`trace`'s results, and behind the jaxpr the same with the bodies of its calls in their place."""
    jaxpr, values, structure = trace(function, args, kwargs)
    return jaxpr, jax.make_jaxpr(lambda *given: inlined(jaxpr, given))(*values), values, structure


def again_in_a_branch(run: Callable) -> Callable:
    """`run(*inputs) -> list`, whose backward pass runs it again inside of a branch that is always taken.

    `jax.checkpoint` sets barriers against merging the repetition with the first run, and XLA's CPU compiler removes
    them before it merges. It does not look into a branch whose condition it cannot tell.
    """

    @jax.custom_vjp
    def call(moving: list, still: list) -> list:
        return run(*merged(moving, still))

    def merged(moving: list, still: list) -> list:
        sources = {True: iter(moving), False: iter(still)}
        return [next(sources[moves]) for moves in kinds]

    def forward(moving: list, still: list) -> tuple[list, tuple]:
        return call(moving, still), (moving, still)

    def backward(saved: tuple, cotangents: list) -> tuple[list, None]:
        moving, still = saved
        given = [each for each in cotangents if each.dtype != jax.dtypes.float0]

        def pulled_back(moving: list, given: list) -> list:
            def differentiable(moving: list) -> list:
                return [out for out in run(*merged(moving, still)) if _moves(out)]

            return jax.vjp(differentiable, moving)[1](given)[0]

        def nothing(moving: list, _given: list) -> list:
            return jax.tree.map(jax.numpy.zeros_like, moving)

        always = jax.lax.rng_uniform(0.0, 1.0, ()) < 2  # which XLA does not see through
        return jax.lax.cond(always, channels_last(pulled_back), nothing, moving, given), None

    call.defvjp(forward, backward)
    kinds: list[bool] = []

    def again(*inputs: Any) -> list:
        kinds[:] = map(_moves, inputs)
        sides = [[value for value, moves in zip(inputs, kinds, strict=True) if moves is side] for side in (True, False)]
        if not sides[0]:
            return run(*inputs)
        return call(*sides)

    return again


def _moves(value: Any) -> bool:
    """Whether it has a derivative."""
    return jax.dtypes.issubdtype(value.dtype, jax.numpy.inexact)


def _products_kept(primitive: Any, *given: Any, **_: Any) -> bool:
    """Not complex ones, which JAX 0.10 cannot keep: it would reduce their precision, and has no such operation."""
    return primitive.name in PRODUCTS and not any(jnp.issubdtype(aval.dtype, jnp.complexfloating) for aval in given)


def inlined(jaxpr: Any, args: Sequence[Any]) -> list[Any]:
    """The outputs of a closed jaxpr, with the bodies of its calls in their place."""
    consts, jaxpr = getattr(jaxpr, "consts", ()), getattr(jaxpr, "jaxpr", jaxpr)
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for eqn in jaxpr.eqns:
        given = [read(atom) for atom in eqn.invars]
        with context_of(eqn):
            call = _CALLS.get(eqn.primitive.name)
            results = inlined(eqn.params[call], given) if call else bind(eqn, given)
        values.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _evaluated(closed: Any, args: Sequence[Any], cut: Cut) -> list[Any]:
    jaxpr = closed.jaxpr
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *args], strict=True))
    groups = _groups(jaxpr.eqns, cut.segments)
    for number, group in enumerate(groups):
        last = number == len(groups) - 1 and not cut.keeps_products
        needed = _needed_after(jaxpr, groups[number + 1 :], group)
        given = _read_by(group)

        def run(*inputs: Any, group=group, given=given, needed=needed) -> list[Any]:
            known = dict(zip(given, inputs, strict=True))
            for eqn in group:
                operands = [atom.val if isinstance(atom, Literal) else known[atom] for atom in eqn.invars]
                with context_of(eqn):
                    results = _in_pieces(eqn, operands, cut) if _is_long_loop(eqn) else bind(eqn, operands)
                known.update(zip(eqn.outvars, results, strict=True))
            return [known[var] for var in needed]

        if not (last or _is_long_loop(group[0]) or group[0].effects):
            policy = _products_kept if cut.keeps_products else None
            run = again_in_a_branch(run) if cut.opaque and not policy else jax.checkpoint(run, policy=policy)
        values.update(zip(needed, run(*(values[var] for var in given)), strict=True))
    return [atom.val if isinstance(atom, Literal) else values[atom] for atom in jaxpr.outvars]


def _is_long_loop(eqn: Any) -> bool:
    return eqn.primitive.name == "scan" and eqn.params["length"] >= SHORTEST_LOOP


def _groups(eqns: Sequence[Any], segments: int) -> list[list[Any]]:
    """Neighbouring equations, cut where about the same number of bytes lies between and least goes across.

    Long loops, and what has effects, stand alone.
    """
    sizes = [0 if _is_long_loop(eqn) else sum(map(_bytes, eqn.outvars)) for eqn in eqns]
    total, across = sum(sizes), _bytes_across(eqns)
    cuts, so_far, window = set(), 0, []
    for at, size in enumerate(sizes):
        so_far += size
        position = so_far * segments / max(total, 1)
        nearest = round(position)
        if 0 < nearest < segments and abs(position - nearest) <= 0.35:
            window.append((nearest, across[at], at + 1))
    for number in range(1, segments):
        best = min((entry[1:] for entry in window if entry[0] == number), default=None)
        if best is not None:
            cuts.add(best[1])
    groups: list[list[Any]] = [[]]
    for at, eqn in enumerate(eqns):
        alone = _is_long_loop(eqn) or bool(eqn.effects)
        if groups[-1] and (at in cuts or alone or _is_long_loop(eqns[at - 1]) or eqns[at - 1].effects):
            groups.append([])
        groups[-1].append(eqn)
    return [group for group in groups if group]


def _bytes(var: Any) -> int:
    shape, dtype = getattr(var.aval, "shape", ()), getattr(var.aval, "dtype", None)
    size = 1
    for length in shape:
        size *= length
    return size * getattr(dtype, "itemsize", 0)


def _bytes_across(eqns: Sequence[Any]) -> list[int]:
    """Bytes that are computed up to an equation and read after it."""
    last_read = {}
    for at, eqn in enumerate(eqns):
        last_read.update({atom: at for atom in eqn.invars if not isinstance(atom, Literal)})
    change = [0] * (len(eqns) + 1)
    for at, eqn in enumerate(eqns):
        for var in eqn.outvars:
            change[at] += _bytes(var)
            change[last_read.get(var, at)] -= _bytes(var)
    found, held = [], 0
    for at in range(len(eqns)):
        held += change[at]
        found.append(held)
    return found


def _read_by(group: Sequence[Any]) -> list[Any]:
    made, read = set(), {}
    for eqn in group:
        read.update({atom: None for atom in eqn.invars if not isinstance(atom, Literal) and atom not in made})
        made.update(eqn.outvars)
    return list(read)


def _needed_after(jaxpr: Any, later: Sequence[Sequence[Any]], group: Sequence[Any]) -> list[Any]:
    atoms = [*jaxpr.outvars, *(atom for other in later for eqn in other for atom in eqn.invars)]
    read = {atom for atom in atoms if not isinstance(atom, Literal)}
    return [var for eqn in group for var in eqn.outvars if var in read]


def _in_pieces(eqn: Any, operands: Sequence[Any], cut: Cut) -> Sequence[Any]:
    """A loop over `cut.segments` pieces, each but the last one run again in the backward pass."""
    if cut.keeps_products or cut.segments < 2:
        return bind(eqn, operands)
    params = eqn.params
    length, fixed, carried = params["length"], params["num_consts"], params["num_carry"]
    consts, carry, xs = operands[:fixed], operands[fixed : fixed + carried], operands[fixed + carried :]
    pieces = min(cut.segments, length // 2)
    steps = length // pieces
    first = steps * (pieces - 1)
    mine, rest = _ends(xs, length - first) if params["reverse"] else _starts(xs, first)

    @functools.partial(jax.checkpoint, prevent_cse=False)  # the loop around it does that
    def piece(consts: Any, carry: Any, xs: Any) -> Any:
        results = bind(eqn, [*consts, *carry, *xs], length=steps)
        return results[:carried], results[carried:]

    cut_up = [x.reshape(pieces - 1, steps, *x.shape[1:]) for x in mine]
    carry, ys = jax.lax.scan(
        lambda carry, xs: piece(consts, carry, xs), list(carry), cut_up, length=pieces - 1, reverse=params["reverse"]
    )
    ys = [y.reshape(first, *y.shape[2:]) for y in ys]
    last = bind(eqn, [*consts, *carry, *rest], length=length - first)
    ordered = zip(last[carried:], ys, strict=True) if params["reverse"] else zip(ys, last[carried:], strict=True)
    return [*last[:carried], *(jax.numpy.concatenate(both) for both in ordered)]


def _starts(xs: Sequence[Any], first: int) -> tuple[list[Any], list[Any]]:
    return [x[:first] for x in xs], [x[first:] for x in xs]


def _ends(xs: Sequence[Any], rest: int) -> tuple[list[Any], list[Any]]:
    return [x[rest:] for x in xs], [x[:rest] for x in xs]
