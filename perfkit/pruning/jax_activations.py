"""How strongly each unit of a JAX model is active: what the products and convolutions that read it are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Literal

from perfkit._workload import Inputs
from perfkit.backends.jax_autocast_casting import bind
from perfkit.backends.jax_model import JaxModel
from perfkit.pruning.jax_labels import Axes, Labels, constant_axes, given_axes
from perfkit.pruning.jax_units import UnitSet, anatomy
from perfkit.pruning.jax_walk import CALLS, equation, scan_parts


class Seen(NamedTuple):
    """A value, what is known of its dimensions, and whether it depends on the model's inputs."""

    value: Any
    axes: Axes
    data: bool


class Tap(NamedTuple):
    """The mean absolute value at each index of a dimension with these labels: (size,), float32."""

    labels: np.ndarray
    mean: jax.Array


def mean_activations(model: JaxModel, batches: Sequence[Inputs], sets: Sequence[UnitSet]) -> list[np.ndarray]:
    """The mean absolute activation of each unit of each set: (size,), 0 where nothing reads it."""
    totals = [np.zeros(units.size) for units in sets]
    for batch in batches:
        labels, taps = _observed(model, batch)
        sums, counts = np.zeros((2, len(labels.parent)))
        for tap in taps:
            np.add.at(sums, labels.roots(tap.labels), np.asarray(tap.mean, np.float64))
            np.add.at(counts, labels.roots(tap.labels), 1)
        means = sums / np.maximum(counts, 1)
        for total, units in zip(totals, sets, strict=True):
            total += means[labels.roots(units.roots)]
    return [total / max(len(batches), 1) for total in totals]


def _observed(model: JaxModel, inputs: Inputs) -> tuple[Labels, list[Tap]]:
    found, state = anatomy(model, inputs), jax.tree.leaves((model.params, model.rest))
    arguments = model.params, model.rest, *inputs.args
    traced = jax.make_jaxpr(model.function())(*arguments, **inputs.kwargs)
    values = jax.tree.leaves((arguments, dict(inputs.kwargs)))
    named: list[np.ndarray] = []

    def run(*values):
        seen = [
            Seen(value, found.axes[at] if at < len(state) else given_axes(value.shape), at >= len(state))
            for at, value in enumerate(values)
        ]
        taps = _run(found.labels, traced, seen)[1]
        named[:] = [tap.labels for tap in taps]
        return [tap.mean for tap in taps]

    means = jax.jit(run)(*map(jnp.asarray, values))
    return found.labels, [Tap(labels, mean) for labels, mean in zip(named, means, strict=True)]


def _run(labels: Labels, jaxpr: Any, inputs: Sequence[Seen]) -> tuple[list[Seen], list[Tap]]:
    """Evaluate a jaxpr, and tell what its products and convolutions read."""
    consts, jaxpr = getattr(jaxpr, "consts", ()), getattr(jaxpr, "jaxpr", jaxpr)
    constant = [Seen(const, constant_axes(const), False) for const in consts]
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constant, *inputs], strict=True))
    taps: list[Tap] = []

    def seen(atom: Any) -> Seen:
        return Seen(atom.val, constant_axes(atom.val), False) if isinstance(atom, Literal) else known[atom]

    for eqn in jaxpr.eqns:
        operands = list(map(seen, eqn.invars))
        if eqn.primitive.name in CALLS:
            outputs, inner = _run(labels, eqn.params[CALLS[eqn.primitive.name]], operands)
        elif eqn.primitive.name == "scan":
            outputs, inner = _scan(labels, eqn, operands)
        else:
            axes = equation(labels, eqn, [operand.axes for operand in operands])
            data = any(operand.data for operand in operands)
            values = bind(eqn, [operand.value for operand in operands])
            outputs = [Seen(value, known, data) for value, known in zip(values, axes, strict=True)]
            inner = _taps(labels, eqn, operands)
        taps += inner
        known.update(zip(eqn.outvars, outputs, strict=True))
    return list(map(seen, jaxpr.outvars)), taps


def _taps(labels: Labels, eqn: Any, operands: Sequence[Seen]) -> list[Tap]:
    if eqn.primitive.name == "dot_general":
        summed = eqn.params["dimension_numbers"][0]
    elif eqn.primitive.name == "conv_general_dilated":
        summed = (eqn.params["dimension_numbers"].lhs_spec[1],), ()
    else:
        return []
    return [
        Tap(operand.axes[dim], _mean(operand.value, dim))
        for operand, dims in zip(operands, summed, strict=True)
        for dim in dims
        if operand.data and labels.live(operand.axes[dim]).any()
    ]


def _mean(value: jax.Array, dim: int) -> jax.Array:
    return jnp.abs(value.astype(jnp.float32)).mean([at for at in range(value.ndim) if at != dim])


def _scan(labels: Labels, eqn: Any, operands: list[Seen]) -> tuple[list[Seen], list[Tap]]:
    results = equation(labels, eqn, [operand.axes for operand in operands])
    consts, carry, xs = scan_parts(eqn, operands)
    body, count = eqn.params["jaxpr"], len(carry)
    named: list[np.ndarray] = []

    def step(carried, rows):
        inside = [Seen(value, axes, True) for value, axes in zip(carried, results[:count], strict=True)]
        read = [Seen(row, x.axes[1:], x.data) for row, x in zip(rows, xs, strict=True)]
        outputs, taps = _run(labels, body, [*consts, *inside, *read])
        named[:] = [tap.labels for tap in taps]
        values = [output.value for output in outputs]
        return values[:count], (values[count:], [tap.mean for tap in taps])

    options = {name: eqn.params[name] for name in ("length", "reverse")}
    start = [jnp.asarray(operand.value) for operand in carry]
    carried, (ys, means) = lax.scan(step, start, [operand.value for operand in xs], **options)
    outputs = [Seen(value, axes, True) for value, axes in zip([*carried, *ys], results, strict=True)]
    return outputs, [Tap(line, mean.mean(0)) for line, mean in zip(named, means, strict=True)]
