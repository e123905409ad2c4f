"""Floating-point operations of a JAX program, read from its jaxpr: by module and by phase.

XLA's own analysis counts a loop's body once, custom calls not at all, and of a convolution only taps that read no
padding. What is counted here, and how, is what `flops.py` says. Loops that run until something is true count as one
round, and of branches the costliest counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from jax.extend.core import Literal

from perfkit.profiling.jax_scopes import place

_INNER = ("jaxpr", "call_jaxpr", "call", "fun_jaxpr", "body_jaxpr")
"""Parameters in which an equation holds what it runs, and runs once."""


@dataclass
class Counted:
    """What a program takes.

    Attributes:
        by_place: floating-point operations by module and phase.
        times: how often what a module computes runs in one call of it, by its products where it has any: the rounds of
            the loops around it.
        unknown: what could not be counted, one line each.
        paths: by module and phase, where the first product stands, as XLA would name it.
    """

    by_place: dict[tuple[str, str], float] = field(default_factory=dict)
    times: dict[str, int] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    paths: dict[tuple[str, str], str] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return sum(self.by_place.values())


def counted(jaxpr: Any, trains: bool, scopes: frozenset[str] = frozenset()) -> Counted:
    """Of a closed jaxpr.

    Args:
        trains: whether it is a training step.
        scopes: the author's own scopes, which count as modules where there are no marks.
    """
    found, rounds = Counted(), {}
    for where, times, flops, unknown in _walked(jaxpr, "", 1):
        at = place(where, trains, scopes)
        if flops:
            key = at.module, at.phase
            found.by_place[key] = found.by_place.get(key, 0.0) + flops * times
            found.paths.setdefault(key, where)
        if at.phase == "forward":
            least, most = rounds.get(at.module, (times, 0))
            rounds[at.module] = min(least, times), max(most, times if flops else 0)
        if unknown and unknown not in found.unknown:
            found.unknown.append(unknown)
    found.times = {module: most or least for module, (least, most) in rounds.items()}
    return found


def own_scopes(jaxpr: Any) -> frozenset[str]:
    """The scopes that the author of a function opened, marks of modules and phases aside."""
    found: set[str] = set()
    for eqn in _equations(jaxpr):
        found.update(part.name for part in eqn.source_info.name_stack.stack if type(part).__name__ == "Scope")
    return frozenset(name for name in found if "{" not in name)


def _equations(jaxpr: Any) -> Iterator[Any]:
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from _equations(inner)


def _walked(
    jaxpr: Any, within: str, times: int, wanted: Sequence[bool] | None = None
) -> Iterator[tuple[str, int, float, str]]:
    """Of every equation: its path, how often it runs, its operations each time, and why they are not known.

    What nobody reads is left out, as XLA leaves it out.

    Args:
        wanted: which of the jaxpr's results are read; None for all.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for eqn, read in _needed(jaxpr, wanted):
        name, params = eqn.primitive.name, eqn.params
        path = f"{within}/{eqn.source_info.name_stack}/{name}"
        if name in _FORMULAS:
            yield path, times, float(_FORMULAS[name](eqn, path)), ""
        elif name == "ffi_call":
            yield (path, times, *_custom_call(eqn, read))
        elif name == "scan":
            yield path, times, 0.0, ""
            yield from _walked(params["jaxpr"], path, times * params["length"])
        elif name == "cond":
            branches = [list(_walked(branch, path, times)) for branch in params["branches"]]
            yield from max(branches, key=lambda rows: sum(each * flops for _, each, flops, _ in rows))
        elif name == "pallas_call":
            grid = math.prod(size for size in params["grid_mapping"].grid if isinstance(size, int))
            yield from _walked(params["jaxpr"], path, times * grid)
        else:
            inner = next((params[key] for key in _INNER if key in params), None)
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                rows = list(_walked(inner, path, times * _devices(eqn), None if name == "while" else read))
                yield from rows
                if name == "while" and any(flops for _, _, flops, _ in rows):
                    yield path, times, 0.0, "products in a loop of unknown length are counted as one round"
            else:
                yield path, times, 0.0, ""


def _needed(jaxpr: Any, wanted: Sequence[bool] | None) -> list[tuple[Any, list[bool]]]:
    """The equations of which a result is read, or that have effects; with which of their results are."""
    outputs = jaxpr.outvars
    if wanted is not None and len(wanted) == len(outputs):
        outputs = [var for var, read in zip(outputs, wanted, strict=True) if read]
    live = {var for var in outputs if not isinstance(var, Literal)}
    found = []
    for eqn in reversed(jaxpr.eqns):
        read = [var in live for var in eqn.outvars]
        if any(read) or eqn.effects or not read:
            live.update(var for var in eqn.invars if not isinstance(var, Literal))
            found.append((eqn, read))
    return found[::-1]


def _devices(eqn: Any) -> int:
    """On how many devices the inner program of a `shard_map` runs, each with its part."""
    return eqn.params["mesh"].size if eqn.primitive.name == "shard_map" else 1


def _dot_general(eqn: Any, _: str) -> int:
    left, right = (var.aval.shape for var in eqn.invars[:2])
    (_, summed_right), (_, batch_right) = eqn.params["dimension_numbers"]
    free = math.prod(size for axis, size in enumerate(right) if axis not in (*summed_right, *batch_right))
    return 2 * math.prod(left) * free


def _ragged_dot(eqn: Any, _: str) -> int:
    rows, weights = (var.aval.shape for var in eqn.invars[:2])
    return 2 * math.prod(rows) * weights[-1]


def _convolution(eqn: Any, path: str) -> int:
    """Each tap at each position of the output; where it is a transposed one, at each position of the input.

    The gradient of a convolution's input is a transposed one, whatever its own strides and padding are.
    """
    left, right, out = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape, eqn.outvars[0].aval.shape
    numbers, params = eqn.params["dimension_numbers"], eqn.params
    of_weights = numbers.lhs_spec[0] != 0  # differentiation swaps the batch with the channels
    transposed = any(size > 1 for size in params["lhs_dilation"]) or ("transpose(" in path and not of_weights)
    inputs, outputs = right[numbers.rhs_spec[1]], right[numbers.rhs_spec[0]]
    taps = math.prod(right[axis] for axis in numbers.rhs_spec[2:])
    if not transposed:
        return 2 * math.prod(out) * inputs * taps
    return 2 * math.prod(left) * taps * outputs // params["feature_group_count"]


_FORMULAS: dict[str, Callable[[Any, str], int]] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    "ragged_dot_general": _ragged_dot,
    "ragged_dot": _ragged_dot,
}


def _custom_call(eqn: Any, read: Sequence[bool]) -> tuple[float, str]:
    """Of perfkit's own kernels; what other custom calls compute, nobody knows."""
    target, shapes = eqn.params["target_name"], [var.aval.shape for var in eqn.invars]
    attributes = dict(eqn.params["attributes"] or ())
    if target.startswith("perfkit_rnn_xla"):
        backward = target.endswith("backward")
        matrices = [shape for shape in shapes[4:] if len(shape) == 2]
        rows = math.prod(shapes[0][:2])
        forward = 2.0 * rows * sum(map(math.prod, matrices))
        if not backward:
            return forward, ""
        of_inputs = matrices[: 2 * attributes["directions"] : 2]  # each direction's: with its inputs, with its state
        return 2 * forward - (0.0 if read[0] else 2.0 * rows * sum(map(math.prod, of_inputs))), ""
    if target.startswith("perfkit_conv2d_xla"):
        return _own_convolution([int(size) for size in _array(attributes["shape"])]), ""
    return 0.0, f"custom call {target} is not counted"


def _own_convolution(shape: list[int]) -> float:
    batch, inputs, height, width, outputs, *rest = shape
    kernel, stride, padding, dilation, groups = rest[:2], rest[2:4], rest[4:6], rest[6:8], rest[8]
    positions = [
        (size + 2 * pad - gap * (taps - 1) - 1) // step + 1
        for size, taps, step, pad, gap in zip((height, width), kernel, stride, padding, dilation, strict=True)
    ]
    return 2.0 * batch * math.prod(positions) * outputs * (inputs // groups) * math.prod(kernel)


def _array(attribute: Any) -> Any:
    """An attribute as it was given; JAX wraps arrays to make them hashable."""
    return getattr(attribute, "val", attribute)
