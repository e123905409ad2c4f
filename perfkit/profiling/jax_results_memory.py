"""The memory of a model that runs operation by operation: its arrays, from being made to their last use."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from jax.extend.core import Literal

from perfkit._quantity import Quantity
from perfkit.profiling._memory_data import Allocation
from perfkit.profiling.jax_held import Moment, argument, argument_names, described
from perfkit.profiling.jax_run import Run
from perfkit.profiling.jax_scopes import Place

_CATEGORIES = {"forward": "activations", "loss": "activations", "backward": "temporaries"}
"""Of what a training step makes, by phase; what the optimizer makes is the new state."""


def moments(run: Run) -> tuple[list[Moment], Quantity, dict[str, float]]:
    """The moments of a call, one for each operation, and the peak; there is no program to tell of."""
    found = list(_moments(run))
    sums = [sum(held.bytes for held in moment.held) for moment in found]
    peak = max(sums)
    found[sums.index(peak)] = replace(found[sums.index(peak)], peak=True)
    method = (
        "arguments, and each operation's results until their last use, by the jaxpr; what an operation needs within "
        "itself is not in it"
    )
    return found, Quantity(peak, "B", method=method), {}


def _moments(run: Run) -> Iterator[Moment]:
    jaxpr = run.jaxpr.jaxpr
    always = []
    for name, var in zip(argument_names(run), jaxpr.invars, strict=True):
        category, module = argument(name)
        always.append(Allocation(_bytes(var), category, module, "argument", described(var.aval)))
    last: dict[Any, int] = {}
    for index, eqn in enumerate(jaxpr.eqns):
        last |= {var: index for var in eqn.invars if not isinstance(var, Literal)}
    last |= {var: len(jaxpr.eqns) for var in jaxpr.outvars if not isinstance(var, Literal)}
    places = [run.place(f"{eqn.source_info.name_stack}/{eqn.primitive.name}") for eqn in jaxpr.eqns]
    gradients = _gradients(jaxpr.eqns, places) if run.work.trains else set()
    times = _times(run, len(jaxpr.eqns))
    living: dict[Any, Allocation] = {}
    yield Moment(0.0, tuple(always))
    for index, (eqn, at) in enumerate(zip(jaxpr.eqns, places, strict=True)):
        for var in eqn.outvars:
            until = last.get(var, index)
            freed = times[until + 1] if until < len(jaxpr.eqns) else None
            category = _CATEGORIES.get(at.phase, "other") if run.work.trains else "activations"
            category = "gradients" if var in gradients else category
            name = str(eqn.params.get("name") or at.primitive)  # of a jitted function its own
            living[var] = Allocation(_bytes(var), category, at.module, name, described(var.aval), times[index], freed)
        yield Moment(times[index], (*always, *living.values()))
        living = {var: held for var, held in living.items() if last.get(var, -1) > index}


def _gradients(eqns: list[Any], places: list[Place]) -> set[Any]:
    """What the backward pass makes and the optimizer alone reads."""
    readers: dict[Any, set[str]] = {}
    for eqn, at in zip(eqns, places, strict=True):
        for var in eqn.invars:
            if not isinstance(var, Literal):
                readers.setdefault(var, set()).add(at.phase)
    made = (var for eqn, at in zip(eqns, places, strict=True) if at.phase == "backward" for var in eqn.outvars)
    return {var for var in made if readers.get(var) == {"optimizer"}}


def _times(run: Run, count: int) -> list[float]:
    """When each operation is launched, in ms: evenly spread over a call, since several may share one launch."""
    start = time.perf_counter()
    run.call()
    length_ms = (time.perf_counter() - start) * 1e3
    return [index * length_ms / max(count, 1) for index in range(count + 1)]


def _bytes(var: Any) -> float:
    return float(getattr(var.aval, "size", 0) * var.aval.dtype.itemsize)
