"""A JAX training's state in files: orbax, which flax brings along; each process writes its shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from perfkit.backends.adapter import Finished


def write(folder: Path, finished: Finished) -> None:
    """Write parameters, other state, optimizer state and loss scale; all processes together.

    Where the devices' models differ for some steps they are brought together first, and what is known of those steps
    lies beside.
    """
    if finished.rounds is not None:
        finished.rounds.settle()
    state, remembered = finished.trainer.settled
    _save(folder, finished.trainer.placement.stored(state))
    if jax.tree.leaves(remembered):
        _save(_beside(folder), remembered)


def read(folder: Path, finished: Finished) -> None:
    """Read the same, sharded as the state lies now."""
    (state, remembered), placement = finished.trainer.settled, finished.trainer.placement
    there = _beside(folder)
    same = there.is_dir() and _many(there) == len(jax.tree.leaves(remembered))
    found = placement.loaded(state, _restored(folder, placement.stored(state)))
    finished.restore(found, _restored(there, remembered) if same else None)


def _beside(folder: Path) -> Path:
    return folder.with_name("rounds")


def _save(folder: Path, tree: Any) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.resolve(), jax.tree.leaves(tree))


def _many(folder: Path) -> int:
    """How many leaves it holds."""
    with ocp.StandardCheckpointer() as checkpointer:
        return len(jax.tree.leaves(checkpointer.metadata(folder.resolve()).item_metadata.tree))


def _restored(folder: Path, like: Any) -> Any:
    leaves, structure = jax.tree.flatten(like)
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(folder.resolve(), jax.tree.map(ocp.utils.to_shape_dtype_struct, leaves))
    return jax.tree.unflatten(structure, found)
