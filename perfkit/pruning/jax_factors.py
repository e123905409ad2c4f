"""Running a JAX function with some of its matrices as two factors: x @ left @ right, never left @ right."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.extend.core import Literal

from perfkit.backends.jax_autocast_casting import bind
from perfkit.backends.jax_model import Function
from perfkit.pruning.jax_walk import CALLS, scan_parts


class Factors(NamedTuple):
    """The matrix left @ right: (inputs, rank) and (rank, outputs)."""

    left: Any
    right: Any


class NotMultipliedError(Exception):
    """A factorized matrix is used in another way than in a product."""


def factored(function: Function, tree: Any, matrices: Collection[int]) -> Function:
    """`function` on parameters of which some matrices are nodes {"left": (m, r), "right": (r, n)}.

    It is traced on the shapes of the whole matrices, and its products with them are done in two. It is traced anew on
    every call, as jax_autocast does: call it under `jax.jit`.

    Args:
        tree: the structure of the original's parameters.
        matrices: numbers of the leaves in that structure that are nodes.

    Raises:
        NotMultipliedError: when it is called, if one of the matrices is used in another way.
    """

    def run(params: Any, rest: Any, *args: Any, **kwargs: Any) -> Any:
        nodes = tree.flatten_up_to(params)
        whole = [_whole(Factors(**node)) if at in matrices else node for at, node in enumerate(nodes)]
        whole = jax.tree.unflatten(tree, whole)
        leaves, structure = jax.tree.flatten((whole, rest, args, kwargs))
        traced_at = [at for at, leaf in enumerate(leaves) if hasattr(leaf, "dtype")]

        def flat(*values: Any) -> Any:
            full = list(leaves)
            for at, value in zip(traced_at, values, strict=True):
                full[at] = value
            params, rest, args, kwargs = jax.tree.unflatten(structure, full)
            return function(params, rest, *args, **kwargs)

        jaxpr, outputs = jax.make_jaxpr(flat, return_shape=True)(*(leaves[at] for at in traced_at))
        values = [Factors(**nodes[at]) if at in matrices else leaves[at] for at in traced_at]
        return jax.tree.unflatten(jax.tree.structure(outputs), _run(jaxpr, values))

    return run


def _whole(factors: Factors) -> jax.ShapeDtypeStruct:
    left, right = factors
    return jax.ShapeDtypeStruct((left.shape[0], right.shape[1]), left.dtype)


def _run(jaxpr: Any, inputs: Sequence[Any]) -> list[Any]:
    consts, jaxpr = getattr(jaxpr, "consts", ()), getattr(jaxpr, "jaxpr", jaxpr)
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))

    def value(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else known[atom]

    for eqn in jaxpr.eqns:
        known.update(zip(eqn.outvars, _apply(eqn, list(map(value, eqn.invars))), strict=True))
    return list(map(value, jaxpr.outvars))


def _apply(eqn: Any, operands: list[Any]) -> Sequence[Any]:
    name = eqn.primitive.name
    if not any(isinstance(operand, Factors) for operand in operands):
        return bind(eqn, operands)
    if name in CALLS:
        return _run(eqn.params[CALLS[name]], operands)
    if name not in _RULES:
        raise NotMultipliedError(f"it is used in {name!r}, not only in products")
    return _RULES[name](eqn, operands)


def _dot_general(eqn: Any, operands: list[Any]) -> list[Any]:
    """x @ left @ right, whichever operand the matrix is and whichever of its dimensions is summed over."""
    params, side = eqn.params, int(isinstance(operands[1], Factors))
    contracted, batched = params["dimension_numbers"]
    if isinstance(operands[1 - side], Factors) or batched[side] or len(contracted[side]) != 1:
        raise NotMultipliedError("it is multiplied in more than one dimension at once")
    matrix, other, (summed,), (along,) = operands[side], operands[1 - side], contracted[side], contracted[1 - side]
    first, last = matrix if summed == 0 else matrix[::-1]
    options = {name: params[name] for name in ("precision", "preferred_element_type")}
    if side:
        inner = lax.dot_general(other, first, (((along,), (summed,)), ((), ())), **options)
        return [lax.dot_general(inner, last, (((inner.ndim - 1,), (summed,)), ((), ())), **options)]
    inner = lax.dot_general(first, other, (((summed,), (along,)), ((), ())), **options)
    return [lax.dot_general(last, inner, (((summed,), (0,)), ((), ())), **options)]


def _transpose(eqn: Any, operands: list[Any]) -> list[Any]:
    left, right = operands[0]
    return [Factors(right.T, left.T) if tuple(eqn.params["permutation"]) == (1, 0) else operands[0]]


def _each(eqn: Any, operands: list[Any]) -> list[Any]:
    return [Factors(*(bind(eqn, [factor])[0] for factor in operands[0]))]


def _scan(eqn: Any, operands: list[Any]) -> list[Any]:
    consts, carry, xs = scan_parts(eqn, operands)
    if any(isinstance(operand, Factors) for operand in (*carry, *xs)):
        raise NotMultipliedError("a scan changes it or runs along it")

    def step(carried: list[Any], rows: list[Any]) -> tuple[list[Any], list[Any]]:
        outputs = _run(eqn.params["jaxpr"], [*consts, *carried, *rows])
        return outputs[: len(carry)], outputs[len(carry) :]

    options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    carried, ys = lax.scan(step, carry, xs, **options)
    return [*carried, *ys]


_RULES: dict[str, Callable[[Any, list[Any]], Sequence[Any]]] = {
    "convert_element_type": _each,
    "copy": _each,
    "dot_general": _dot_general,
    "scan": _scan,
    "stop_gradient": _each,
    "transpose": _transpose,
}
