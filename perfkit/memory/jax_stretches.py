"""An optimizer's update on moments in few bits, one stretch of a parameter's numbers after the other.

XLA would compute the new moments of all parameters before it rounds the first of them, which takes more memory than the
few bits save. So what the update does to each number by itself runs in loops, each of which waits for the last, and
writes over the gradients and the moments that it has read. All else of the update runs as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from perfkit.backends.jax_autocast_casting import bind
from perfkit.backends.jax_rewriting import context_of
from perfkit.memory.jax_few_bits import Held, held, in_full
from perfkit.memory.jax_segments import inlined
from perfkit.pruning.jax_rules import ELEMENTWISE


@dataclass(frozen=True)
class Together:
    """Outputs that read the same moments, number by number.

    Args:
        shape: of all of them.
        moments: variables of the moments that go in.
        outputs: positions among all outputs.
        eqns: what is computed, in order.
        given: variables of that shape that are read, besides the moments.
    """

    shape: tuple[int, ...]
    moments: tuple[Any, ...]
    outputs: tuple[int, ...]
    eqns: tuple[Any, ...]
    given: tuple[Any, ...]


def is_held(node: Any) -> bool:
    return isinstance(node, Held)


def updated(update: Callable, gradients: Any, state: Any, others: Any, stretch: int) -> tuple[Any, Any]:
    """`update(gradients, state, *others) -> (updates, new state)`, on a state some of which is held in few bits.

    Args:
        stretch: how many numbers at a time.
    """
    entries, structure = jax.tree.flatten((gradients, state, others), is_leaf=is_held)
    kept = jax.tree.structure(state, is_leaf=is_held)
    forms = [jax.ShapeDtypeStruct(e.form.shape, e.form.dtype) if is_held(e) else e for e in entries]
    made: list[Any] = []

    def run(*given: Any) -> list[Any]:
        gradients, state, others = jax.tree.unflatten(structure, given)
        updates, new = update(gradients, state, *others)
        made[:] = [jax.tree.structure(updates)]
        return [*jax.tree.leaves(updates), *jax.tree.leaves(new)]

    called = jax.make_jaxpr(run)(*forms)
    closed = jax.make_jaxpr(lambda *given: inlined(called, given))(*forms)
    jaxpr, count = closed.jaxpr, len(jax.tree.leaves(gradients))
    given = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *entries], strict=True))
    results = _results(jaxpr, given, jaxpr.invars[:count], made[0].num_leaves, stretch)
    updates, new = results[: made[0].num_leaves], results[made[0].num_leaves :]
    return jax.tree.unflatten(made[0], updates), jax.tree.unflatten(kept, new)


def _results(jaxpr: Any, given: dict, gradients: Sequence[Any], updates: int, stretch: int) -> list[Any]:
    moments = {var: entry for var, entry in given.items() if is_held(entry)}
    olds = {
        updates + at: entry for at, entry in enumerate(list(given.values())[-len(jaxpr.invars) :][len(gradients) :])
    }
    own = {var: next(at for at, old in olds.items() if old is entry) for var, entry in moments.items()}
    values, (groups, needed) = dict(given), _separate(jaxpr, _groups(jaxpr, moments), moments, own)
    for var in moments.keys() & needed:
        values[var] = in_full(moments[var])
    for eqn in jaxpr.eqns:
        if needed.intersection(eqn.outvars):
            with context_of(eqn):
                values.update(zip(eqn.outvars, bind(eqn, [_read(atom, values) for atom in eqn.invars]), strict=True))
    results: dict[int, Any] = {}
    last = next(iter(moments.values()), None)
    for group in groups:
        after = last.codes.ravel()[0].astype(jnp.int32)
        results |= _in_stretches(jaxpr, group, values, gradients, olds, own, after, stretch)
        last = next(results[at] for at in group.outputs if is_held(results[at]))
    for at, atom in enumerate(jaxpr.outvars):
        if at not in results:
            value, old = _read(atom, values), olds.get(at)
            results[at] = held(value, old.form) if is_held(old) else value
    return [results[at] for at in range(len(jaxpr.outvars))]


def _read(atom: Any, values: dict) -> Any:
    return atom.val if isinstance(atom, Literal) else values[atom]


def _groups(jaxpr: Any, moments: dict) -> list[Together]:
    """What is computed of each moment number by number, where that leads to the new moment."""
    makers = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}
    order = {id(eqn): at for at, eqn in enumerate(jaxpr.eqns)}
    found: list[Together] = []
    for at, atom in enumerate(jaxpr.outvars):
        if isinstance(atom, Literal):
            continue
        shape, seen, eqns, given = atom.aval.shape, set(), [], []
        open_: list[Any] = [atom]
        while open_:
            var = open_.pop()
            if var in seen or var.aval.shape != shape:
                continue
            seen.add(var)
            maker = makers.get(var)
            if maker is not None and _is_pointwise(maker, shape):
                eqns.append(maker)
                open_ += [each for each in maker.invars if not isinstance(each, Literal)]
            else:
                given.append(var)
        read = [var for var in given if var in moments]
        one = Together(shape, tuple(read), (at,), tuple(eqns), tuple(var for var in given if var not in moments))
        if read:
            together = [other for other in found if set(other.moments) & set(read)]
            found = [other for other in found if other not in together] + [_united([*together, one], order)]
    return found


def _united(groups: Sequence[Together], order: dict[int, int]) -> Together:
    def all_of(field: str) -> tuple:
        return tuple(dict.fromkeys(each for group in groups for each in getattr(group, field)))

    eqns = {id(eqn): eqn for group in groups for eqn in group.eqns}
    ordered = tuple(sorted(eqns.values(), key=lambda eqn: order[id(eqn)]))
    return Together(groups[0].shape, all_of("moments"), all_of("outputs"), ordered, all_of("given"))


def _is_pointwise(eqn: Any, shape: tuple[int, ...]) -> bool:
    shapes = {atom.aval.shape for atom in eqn.invars}
    if eqn.primitive.name == "broadcast_in_dim":
        return shapes == {()}
    return eqn.primitive.name in ELEMENTWISE and shapes <= {(), shape} and len(eqn.outvars) == 1


def _separate(jaxpr: Any, groups: list[Together], moments: dict, own: dict) -> tuple[list[Together], set[Any]]:
    """The groups that lead from all their moments to the new ones, whose moments nothing else reads, and which lie on
    one device; and what is needed besides them.

    Args:
        own: the position among the outputs of each moment's new value.
    """
    groups = [
        group
        for group in groups
        if all(own[var] in group.outputs and not moments[var].form.spread for var in group.moments)
    ]
    while True:
        inside = {at for group in groups for at in group.outputs}
        needed = {atom for at, atom in enumerate(jaxpr.outvars) if at not in inside and not isinstance(atom, Literal)}
        for group in groups:
            made = {var for eqn in group.eqns for var in eqn.outvars}
            read = {atom for eqn in group.eqns for atom in eqn.invars if not isinstance(atom, Literal)}
            needed |= ({*group.given, *read}) - made - {*group.moments}
        for eqn in reversed(jaxpr.eqns):
            if needed.intersection(eqn.outvars):
                needed.update(atom for atom in eqn.invars if not isinstance(atom, Literal))
        separate = [group for group in groups if not needed.intersection(group.moments)]
        if len(separate) == len(groups):
            return groups, needed
        groups = separate


def _in_stretches(
    jaxpr: Any,
    group: Together,
    values: dict,
    gradients: Sequence[Any],
    olds: dict,
    own: dict,
    after: jax.Array,
    stretch: int,
) -> dict[int, Any]:
    """The outputs of a group, by position.

    Args:
        values: of the variables that are known; of the group's moments as they are held.
        olds: what the outputs take the place of, by position.
        own: the position among the outputs of each moment's new value.
        after: the code of a number that is computed before; never below 0, which XLA does not see.
    """
    block, size = max(values[var].form.block for var in group.moments), math.prod(group.shape)
    length = min(max(stretch // block, 1) * block, size)
    flat = {var: values[var].reshape(-1) for var in group.given}
    rounded = {at: olds[at] for at in group.outputs if is_held(olds.get(at))}
    over = _written_over([at for at in group.outputs if at not in rounded], jaxpr, group, gradients)
    outputs = {
        at: jnp.zeros(size, jaxpr.outvars[at].aval.dtype) if var is None else flat[var] for at, var in over.items()
    }
    rows = {
        at: [entry.codes.reshape(-1, entry.codes.shape[-1]), entry.scales.reshape(-1)] for at, entry in rounded.items()
    }

    def part(start: Any, many: int, carry: tuple[dict, dict]) -> tuple[dict, dict]:
        """The same with the outputs of the numbers from `start` on."""
        outputs, rows = carry
        first, blocks = start // block, -(-many // block)
        given = [next((outputs[at] for at, each in over.items() if each is var), flat[var]) for var in group.given]
        numbers = [jax.lax.dynamic_slice_in_dim(each, start, many) for each in given]
        there = {at: [jax.lax.dynamic_slice_in_dim(each, first, blocks) for each in two] for at, two in rows.items()}

        def computed(numbers: list[Any], there: dict[int, list[Any]]) -> tuple[dict, dict]:
            known = values | dict(zip(group.given, numbers, strict=True))
            for var in group.moments:
                codes, scales = there[own[var]]
                known[var] = in_full(Held(codes, scales, replace(values[var].form, shape=(many,))))
            for eqn in group.eqns:
                changes = {"shape": (many,)} if eqn.primitive.name == "broadcast_in_dim" else {}
                with context_of(eqn):
                    results = bind(eqn, [_read(atom, known) for atom in eqn.invars], **changes)
                known.update(zip(eqn.outvars, results, strict=True))
            new = {at: known[jaxpr.outvars[at]] for at in group.outputs}
            few = {at: held(new[at], replace(entry.form, shape=(many,))) for at, entry in rounded.items()}
            return {at: new[at] for at in outputs}, {at: [each.codes, each.scales] for at, each in few.items()}

        def nothing(_numbers: list[Any], there: dict[int, list[Any]]) -> tuple[dict, dict]:
            return {at: jnp.zeros(many, whole.dtype) for at, whole in outputs.items()}, there

        # A branch that is always taken: it waits for the last group, and XLA computes from the slices, not around them.
        new, few = jax.lax.cond(after >= 0, computed, nothing, numbers, there)
        put = jax.lax.dynamic_update_slice_in_dim
        return (
            {at: put(whole, new[at], start, 0) for at, whole in outputs.items()},
            {at: [put(*pair, first, 0) for pair in zip(two, few[at], strict=True)] for at, two in rows.items()},
        )

    trips, carry = size // length, (outputs, rows)
    carry = jax.lax.fori_loop(0, trips, lambda at, carry: part(at * length, length, carry), carry)
    if rest := size - trips * length:
        carry = part(trips * length, rest, carry)
    outputs, rows = carry
    return {at: whole.reshape(group.shape) for at, whole in outputs.items()} | {
        at: Held(rows[at][0].reshape(old.codes.shape), rows[at][1].reshape(old.scales.shape), old.form)
        for at, old in rounded.items()
    }


def _written_over(outputs: Sequence[int], jaxpr: Any, group: Together, gradients: Sequence[Any]) -> dict[int, Any]:
    """For each output a gradient of its type, which is not needed once it is read; None where there is none."""
    found: dict[int, Any] = {}
    for at in outputs:
        dtype, taken = jaxpr.outvars[at].aval.dtype, list(found.values())
        fitting = (var for var in group.given if var in gradients and var not in taken and var.aval.dtype == dtype)
        found[at] = next(fitting, None)
    return found
