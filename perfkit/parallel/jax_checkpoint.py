"""A JAX training's state in files: orbax, which flax brings along; each process writes its shards."""

from __future__ import annotations

from pathlib import Path

import jax
import orbax.checkpoint as ocp

from perfkit.backends import Finished


def write(folder: Path, finished: Finished) -> None:
    """Write parameters, other state, optimizer state and loss scale; all processes together."""
    trainer = finished.trainer
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.resolve(), trainer.placement.stored(trainer.state))


def read(folder: Path, finished: Finished) -> None:
    """Read the same, sharded as the state lies now."""
    trainer = finished.trainer
    leaves = trainer.placement.stored(trainer.state)
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(folder.resolve(), jax.tree.map(ocp.utils.to_shape_dtype_struct, leaves))
    finished.restore(trainer.placement.loaded(trainer.state, found))
