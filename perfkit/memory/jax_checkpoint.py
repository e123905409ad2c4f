"""Rematerialization in JAX: how a model is cut is chosen by what XLA says each program needs."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax

from perfkit._report import Effect
from perfkit._workload import Workload
from perfkit.backends.jax_compile import counted_bytes
from perfkit.memory.jax_segments import Cut, has_long_loops, in_segments
from perfkit.memory.segments import budget_bytes

SEGMENTS = (4, 8, 16)


def checkpointed(work: Workload, budget: float) -> tuple[Workload, Effect]:
    """Take the first way of cutting the model that keeps the budget; else the one that needs least."""
    before = _needed(work)
    limit = budget_bytes(budget, before)
    tried: list[tuple[float, Cut]] = []
    for cut in _cuts(work.device):
        needs = _needed(cut_into(work, cut))
        tried.append((needs, cut))
        if needs <= limit:
            break
    needs, cut = min(tried, key=lambda entry: entry[0])
    if needs >= before:
        return work, Effect(notes=(f"no way of cutting it needs less than its {before / 1e6:.3g} MB",))
    model, inputs = work.model, work.inputs
    loops = has_long_loops(model.function(), model.params, model.rest, *inputs.args, **inputs.kwargs)
    notes = [
        f"{cut.told(loops)}: the gradient's program needs {needs / 1e6:.3g} MB in place of {before / 1e6:.3g} MB; "
        f"{len(tried)} way(s) were compiled"
    ]
    if needs > limit:
        notes.append(f"the budget of {limit / 1e6:.3g} MB cannot be kept: this is the least")
    return cut_into(work, cut), Effect((work.backend.model_name(work),), notes=tuple(notes))


def _cuts(device: str) -> list[Cut]:
    """What is tried, in the order of what it costs in time."""
    return [Cut(keeps_products=True), *(Cut(segments, opaque=device == "cpu") for segments in SEGMENTS)]


def cut_into(work: Workload, cut: Cut) -> Workload:
    """The model, cut in this way."""
    return work.replace(model=work.model.then(partial(in_segments, cut=cut)))


def _needed(work: Workload) -> float:
    """Temporary bytes of the program that computes the gradient."""
    model, inputs, training = work.model, work.inputs, work.training
    function = model.function()

    def loss(params: Any, rest: Any, args: tuple, kwargs: dict, targets: Any) -> Any:
        outputs, new_rest = function(params, rest, *args, **kwargs)
        return training.loss(outputs, targets), new_rest

    step = jax.jit(jax.grad(loss, has_aux=True))
    lowered = step.lower(model.params, model.rest, inputs.args, dict(inputs.kwargs), training.targets)
    return counted_bytes(lowered, work.device)
