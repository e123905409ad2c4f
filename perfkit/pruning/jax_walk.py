"""Carrying labels through a whole jaxpr, inner functions and loops included."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jax.extend.core import Literal

from perfkit.backends.jax_autocast_rules import scan_sizes
from perfkit.pruning.jax_labels import Axes, Labels, constant_axes, given_axes
from perfkit.pruning.jax_rules import merged, outputs_of

CALLS = {
    "checkpoint": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "remat2": "jaxpr",
}
"""Equations that run an inner function as it stands, and the name of their parameter that holds it."""


def walk(labels: Labels, jaxpr: Any, inputs: Sequence[Axes]) -> list[Axes]:
    """The axes of a jaxpr's outputs; every meeting of labels in it is recorded in `labels`.

    Args:
        jaxpr: open or closed.
        inputs: what is known of each input.
    """
    consts, jaxpr = getattr(jaxpr, "consts", ()), getattr(jaxpr, "jaxpr", jaxpr)
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*map(constant_axes, consts), *inputs], strict=True))

    def axes_of(atom: Any) -> Axes:
        return constant_axes(atom.val) if isinstance(atom, Literal) else known[atom]

    for eqn in jaxpr.eqns:
        known.update(zip(eqn.outvars, equation(labels, eqn, list(map(axes_of, eqn.invars))), strict=True))
    return list(map(axes_of, jaxpr.outvars))


def equation(labels: Labels, eqn: Any, inputs: list[Axes]) -> list[Axes]:
    """The axes of one equation's outputs."""
    name = eqn.primitive.name
    if name in CALLS:
        return walk(labels, eqn.params[CALLS[name]], inputs)
    if name in _LOOPS:
        return _LOOPS[name](labels, eqn, inputs)
    return outputs_of(labels, eqn, inputs)


def scan_parts(eqn: Any, operands: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """What a scan reads at every step, what it carries on, and what it reads step by step."""
    consts, carried = scan_sizes(eqn.params)
    return list(operands[:consts]), list(operands[consts : consts + carried]), list(operands[consts + carried :])


def _scan(labels: Labels, eqn: Any, inputs: list[Axes]) -> list[Axes]:
    consts, carry, xs = scan_parts(eqn, inputs)
    for axes in xs:
        labels.freeze(axes[0], "a scan runs along it")
    rows = [axes[1:] for axes in xs]
    carry, outputs = _settled(labels, carry, lambda carry: walk(labels, eqn.params["jaxpr"], [*consts, *carry, *rows]))
    ys = zip(eqn.outvars[len(carry) :], outputs[len(carry) :], strict=True)
    return [*carry, *(given_axes(variable.aval.shape[:1]) + axes for variable, axes in ys)]


def _while(labels: Labels, eqn: Any, inputs: list[Axes]) -> list[Axes]:
    params = eqn.params
    first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    test_consts, body_consts, carry = inputs[:first], inputs[first:second], inputs[second:]
    carry, _ = _settled(labels, carry, lambda carry: walk(labels, params["body_jaxpr"], [*body_consts, *carry]))
    labels.freeze_all(walk(labels, params["cond_jaxpr"], [*test_consts, *carry]), "a loop's end depends on it")
    return carry


def _settled(labels: Labels, carry: list[Axes], body: Callable) -> tuple[list[Axes], list[Axes]]:
    """What a loop carries, once what goes in and what comes out are one; and the body's outputs."""
    while True:
        before = labels.version, [[axis is None for axis in axes] for axes in carry]
        outputs = body(carry)
        carry = [merged(labels, pair) for pair in zip(carry, outputs[: len(carry)], strict=True)]
        if before == (labels.version, [[axis is None for axis in axes] for axes in carry]):
            return carry, outputs


def _cond(labels: Labels, eqn: Any, inputs: list[Axes]) -> list[Axes]:
    branches = [walk(labels, branch, inputs[1:]) for branch in eqn.params["branches"]]
    return [merged(labels, values) for values in zip(*branches, strict=True)]


_LOOPS = {"cond": _cond, "scan": _scan, "while": _while}
