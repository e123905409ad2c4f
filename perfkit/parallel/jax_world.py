"""The processes of a `jax.distributed` cluster, each with its devices."""

from __future__ import annotations

import pickle
from typing import Any, TypeVar, cast

import jax
import numpy as np

from perfkit._errors import UnsupportedError
from perfkit.parallel.environment import launched
from perfkit.parallel.world import Alone, World

T = TypeVar("T")


class JaxWorld(World):
    """All processes of the cluster."""

    def __init__(self):
        self.rank, self.size, self.devices = jax.process_index(), jax.process_count(), jax.device_count()

    def gather(self, value: T) -> list[T]:
        from jax.experimental import multihost_utils

        data = np.frombuffer(pickle.dumps(value), np.uint8)
        sizes = multihost_utils.process_allgather(np.array(data.size, np.int64))
        padded = np.zeros(int(sizes.max()), np.uint8)
        padded[: data.size] = data
        rows = multihost_utils.process_allgather(padded)
        return [pickle.loads(bytes(row[: int(size)])) for row, size in zip(rows, sizes, strict=True)]

    def agree(self, value: T) -> T:
        return self.gather(value if self.rank == 0 else None)[0]

    def barrier(self) -> None:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("perfkit")


def world() -> World:
    """The cluster that this process is in, or it alone with its devices."""
    return JaxWorld() if jax.process_count() > 1 else Alone(jax.device_count())


def join() -> None:
    """Join the cluster that a launcher described, before anything runs in JAX; without one do nothing.

    Raises:
        UnsupportedError: JAX runs already, or the others cannot be reached.
    """
    about, config = launched(), cast(Any, jax.config)  # types know nothing of its flags
    if about is None or about.size == 1 or jax.distributed.is_initialized():
        return
    try:
        jax.distributed.initialize(
            coordinator_address=f"{about.address}:{about.port + 1}",  # the launcher's own store may be at the port
            num_processes=about.size,
            process_id=about.rank,
            local_device_ids=None if config.jax_platforms == "cpu" else [about.local_rank],
        )
    except (RuntimeError, ValueError) as error:
        raise UnsupportedError(
            f"rank {about.rank} of {about.size} cannot join the others at {about.address}:{about.port + 1} "
            f"({about.launcher}): {error}"
        ) from error
