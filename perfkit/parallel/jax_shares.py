"""What share of a JAX model's operations is left for a device where weights lie in parts, as XLA spreads them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.extend.core import Literal

from perfkit._workload import Workload
from perfkit.backends.jax_autocast_casting import bind
from perfkit.parallel.jax_piped import operations_of
from perfkit.parallel.jax_stages import Operations

LOOPS = ("scan", "while")


def share_kept(whole: Workload, spread: Workload, data: int) -> float:
    """The share of a forward call's time that is left for a device, by the times of operations run by themselves.

    Args:
        whole: on one device.
        spread: the same, its weights in parts.
        data: devices that share the batch: what they save of it does not count.
    """
    model, inputs = whole.model, whole.inputs
    batch = inputs.args, dict(inputs.kwargs)
    operations = operations_of(model.function(), model.params, model.rest, *batch)
    seconds = operations.costs(_given(operations, model.params, (model.rest, batch)), trains=False).seconds
    model = spread.model
    given = _given(operations, model.params, (model.rest, model.placement.batch(batch)))
    kept = zip(seconds, shares(operations, given), strict=True)
    return sum(each * min(share * data, 1.0) for each, share in kept) / (sum(seconds) or 1.0)


def _given(operations: Operations, params: Any, others: Any) -> list[Any]:
    leaves = jax.tree.leaves(params)
    parts = [leaves[index] if row is None else leaves[index][row] for index, row in operations.parts]
    return [*parts, *jax.tree.leaves(others)]


def shares(operations: Operations, given: Sequence[Any]) -> list[float]:
    """Of each operation the share that a device computes: the smallest part of an array that it reads or makes.

    A loop reads arrays in parts also where it puts them together: there only its weights and what it makes count.

    Args:
        given: arrays as they lie.
    """
    jaxpr, consts = operations.closed.jaxpr, operations.closed.consts

    def everything(*given: Any) -> list[list[Any]]:
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *given], strict=True))
        for eqn in jaxpr.eqns:
            read = [atom.val if isinstance(atom, Literal) else values[atom] for atom in eqn.invars]
            values.update(zip(eqn.outvars, bind(eqn, read), strict=True))
        return [[values[var] for var in eqn.outvars] for eqn in jaxpr.eqns]

    made = jax.jit(everything).lower(*given).compile().output_shardings
    parts = {var: _part(leaf.shape, leaf.sharding) for var, leaf in zip(jaxpr.invars, given, strict=True)}
    for eqn, shardings in zip(jaxpr.eqns, made, strict=True):
        parts |= {var: _part(var.aval.shape, each) for var, each in zip(eqn.outvars, shardings, strict=True)}
    weights = set(jaxpr.invars[: operations.parameters])

    def share(eqn: Any) -> float:
        read = [atom for atom in eqn.invars if not isinstance(atom, Literal)]
        if eqn.primitive.name in LOOPS:
            read = [var for var in read if var in weights]
        return min((parts.get(var, 1.0) for var in [*read, *eqn.outvars]), default=1.0)

    return list(map(share, operations.eqns))


def _part(shape: tuple[int, ...], sharding: Any) -> float:
    """The share of an array that lies on one device."""
    return math.prod(sharding.shard_shape(shape)) / (math.prod(shape) or 1)
