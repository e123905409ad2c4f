"""The modules of a JAX model and what is within them: time, operations, parameters, what the backward pass needs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jax.extend.core import Literal

from perfkit.backends.jax_trees import leaves_with_names
from perfkit.profiling._time_data import Module, Op
from perfkit.profiling.jax_flops import Counted
from perfkit.profiling.jax_run import Run


def modules(run: Run, ops: Iterable[Op], count: Counted) -> tuple[Module, ...]:
    """Every module that was called, the model itself first."""
    ops = tuple(ops)
    saved = saved_bytes(run)
    parameters = [
        (name, leaf.size) for name, leaf in leaves_with_names(run.work.model.params)[0] if hasattr(leaf, "size")
    ]
    paths = {"", *run.called, *(op.module for op in ops)}
    found = []
    for path in sorted(paths, key=lambda path: path.split(".") if path else []):
        called = run.called.get(path)
        within = [op for op in ops if is_within(op.module, path)]
        own = [op for op in within if op.module == path and op.phase in ("forward", "backward")]
        found.append(
            Module(
                path=path,
                kind=called.kind if called else run.work.model.name if not path else "scope",
                calls=float(called.calls * count.times.get(path, 1)) if called else 1.0,
                forward_ms=sum(op.self_ms for op in within if op.phase == "forward"),
                backward_ms=sum(op.self_ms for op in within if op.phase == "backward"),
                self_ms=sum(op.self_ms for op in own),
                flops=sum(flops for (module, _), flops in count.by_place.items() if is_within(module, path)),
                parameters=sum(size for name, size in parameters if is_within(name, path)),
                saved_bytes=sum(size for module, size in saved.items() if is_within(module, path)),
                output_bytes=called.output_bytes if called else 0.0,
            )
        )
    return tuple(found)


def is_within(path: str, outer: str) -> bool:
    return not outer or path == outer or path.startswith(f"{outer}.")


def saved_bytes(run: Run) -> dict[str, float]:
    """By module, what its forward pass makes that the backward pass reads; the step's own arguments aside."""
    if not run.work.trains:
        return {}
    made: dict[Any, tuple[str, float]] = {}
    kept: dict[Any, tuple[str, float]] = {}
    for eqn in _inlined(run.jaxpr.jaxpr):
        at = run.place(f"{eqn.source_info.name_stack}/{eqn.primitive.name}")
        for var in eqn.invars:
            if not isinstance(var, Literal) and var in made and at.phase == "backward":
                kept[var] = made[var]
        if at.phase in ("forward", "loss"):
            for var in eqn.outvars:
                made[var] = at.module, float(getattr(var.aval, "size", 0) * var.aval.dtype.itemsize)
    found: dict[str, float] = {}
    for module, size in kept.values():
        found[module] = found.get(module, 0.0) + size
    return found


def _inlined(jaxpr: Any) -> list[Any]:
    """The equations of a step, of which the outermost may be one call of a jitted function."""
    while len(jaxpr.eqns) == 1 and "jaxpr" in jaxpr.eqns[0].params and hasattr(jaxpr.eqns[0].params["jaxpr"], "jaxpr"):
        jaxpr = jaxpr.eqns[0].params["jaxpr"].jaxpr
    return list(jaxpr.eqns)
