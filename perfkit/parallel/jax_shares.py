"""What share of a JAX model's operations is left for a device where weights lie in parts, as XLA spreads them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from perfkit._workload import Workload
from perfkit.backends.jax_autocast_casting import bind
from perfkit.parallel.jax_piped import operations_of
from perfkit.parallel.jax_stages import Operations, quickest

CONVOLUTION = "conv_general_dilated"
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

    A loop reads arrays in parts also where it puts them together: there only its weights and what it makes count. A
    convolution copies what its taps see for however few channels it computes, so its part is timed.

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
    lies = {var: leaf.sharding.shard_shape(leaf.shape) for var, leaf in zip(jaxpr.invars, given, strict=True)}
    for eqn, shardings in zip(jaxpr.eqns, made, strict=True):
        lies |= {var: each.shard_shape(var.aval.shape) for var, each in zip(eqn.outvars, shardings, strict=True)}
    weights = set(jaxpr.invars[: operations.parameters])

    def share(eqn: Any) -> float:
        read = [atom for atom in eqn.invars if not isinstance(atom, Literal)]
        if eqn.primitive.name in LOOPS:
            read = [var for var in read if var in weights]
        arrays = [(math.prod(lies[var]), math.prod(var.aval.shape)) for var in (*read, *eqn.outvars) if var in lies]
        part = min((there / (whole or 1) for there, whole in arrays), default=1.0)
        if part < 1 and eqn.primitive.name == CONVOLUTION and all(var in lies for var in read):
            return max(part, _timed(eqn, [lies[var] for var in read]))
        return part

    return list(map(share, operations.eqns))


def _timed(eqn: Any, shapes: Sequence[tuple[int, ...]]) -> float:
    """How long an operation takes on arrays of such shapes, as a share of what it takes on whole ones.

    0 where parts of these shapes do not go together: XLA moves them before.
    """
    program = jax.jit(lambda *given: bind(eqn, given))

    def seconds(shapes: Sequence[tuple[int, ...]]) -> float:
        given = [jnp.zeros(each, var.aval.dtype) for each, var in zip(shapes, eqn.invars, strict=True)]
        return quickest(program, given)[0]

    try:
        there = seconds(shapes)
    except (TypeError, ValueError):
        return 0.0
    return there / seconds([var.aval.shape for var in eqn.invars])
