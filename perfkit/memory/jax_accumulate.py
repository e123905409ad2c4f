"""What a JAX model makes of a batch that comes in micro-batches."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from perfkit._report import Effect
from perfkit._workload import Workload
from perfkit.backends.jax_autocast_rules import primitives
from perfkit.backends.jax_keys import is_key
from perfkit.memory import micro_batches


def accumulate(work: Workload, parts: int, batch_dim: int) -> tuple[Workload, Effect]:
    """Cut each training step into micro-batches.

    Raises:
        UnsupportedError: the loss is no mean over the batch.
    """
    model, function = work.model, jax.jit(work.model.function())

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(model.params, model.rest, *args, **kwargs)[0]

    return micro_batches.accumulated(work, parts, batch_dim, call, _rounding, jax.tree.map, _notes(work))


def _rounding(outputs: Any) -> float:
    floats = [leaf for leaf in jax.tree.leaves(outputs) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return max((float(jnp.finfo(leaf.dtype).eps) for leaf in floats), default=0.0)


def _notes(work: Workload) -> list[str]:
    rest = jax.tree.leaves(work.model.rest)
    notes = []
    if any(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in rest):
        notes.append("running statistics are those of each micro-batch, so losses differ from the whole batch's")
    if any(map(is_key, rest)):
        notes.append("random numbers are drawn for each micro-batch, in another order")
    elif _draws_from_inputs(work):
        notes.append(
            "random numbers come from a key that is no state of the model's, and are the same in each micro-batch: "
            "with the key in the model (nnx.Rngs) each draws its own"
        )
    return notes


def _draws_from_inputs(work: Workload) -> bool:
    """Whether the model draws random numbers although it holds no key."""
    model, inputs = work.model, work.inputs
    traced = jax.jit(model.function()).trace(model.params, model.rest, *inputs.args, **inputs.kwargs)
    return "random_bits" in primitives(traced.jaxpr)
