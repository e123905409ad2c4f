"""Pruning of JAX models."""

from __future__ import annotations

from typing import Any

import jax

from perfkit._errors import UnsupportedError
from perfkit._report import Effect
from perfkit._workload import Workload
from perfkit.backends import jax_prune_channels as channels


def pruned(work: Workload, recipe: Any) -> tuple[Workload, Effect]:
    """The workload with the least important weights or units gone."""
    if not jax.tree.leaves(work.model.params):
        raise UnsupportedError(f"{recipe.name}: {work.model.name} has no parameters: pass a function's as params=")
    params = jax.tree.leaves(work.model.params)
    return channels.smaller(work, recipe, lambda units: channels.magnitude(units, params))
