"""Which dimensions of a JAX model's inputs are time and batch: loops over time tell."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax

from perfkit._workload import Workload
from perfkit.backends.jax_autocast_rules import equations, scan_sizes


def sequences_seen(work: Workload) -> set[tuple[int, int]]:
    """(steps, rows) of what the model's loops over time read; none of a model that cannot be traced."""
    model, inputs = work.model, work.inputs
    try:
        traced = jax.make_jaxpr(model.function())(model.params, model.rest, *inputs.args, **inputs.kwargs)
    except Exception:  # whatever code raises that needs the value of something it is not told
        return set()
    return set(_loops(traced))


def _loops(jaxpr: Any) -> Iterator[tuple[int, int]]:
    """Of each loop that reads rows step by step and carries as many from step to step; or reads a sequence alone."""
    for eqn in equations(jaxpr):
        if eqn.primitive.name == "scan":
            fixed, carried = scan_sizes(eqn.params)
            shapes = [atom.aval.shape for atom in eqn.invars[fixed:]]
            rows = {shape[0] for shape in shapes[:carried] if shape}
            read = shapes[carried:]
            batches = [shape[:2] for shape in read if len(shape) > 1 and shape[1] in rows]
            yield from batches
            if carried and not batches and all(len(shape) < 3 for shape in read):  # layers' weights have three
                yield eqn.params["length"], 0
