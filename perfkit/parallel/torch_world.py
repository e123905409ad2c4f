"""The processes of a torch.distributed group."""

from __future__ import annotations

import atexit
import contextlib
import datetime as dt
import os
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from perfkit._errors import UnsupportedError
from perfkit.parallel.environment import launched
from perfkit.parallel.world import ALONE, World

T = TypeVar("T")
TIMEOUT_S = 600.0
"""After so long in one collective the others are taken for dead; PERFKIT_TIMEOUT_S sets it."""

GOODBYE_S = 5.0


class TorchWorld(World):
    """The default process group."""

    def __init__(self):
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.devices = self.size

    def gather(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def agree(self, value: T) -> T:
        held: list[Any] = [value if self.rank == 0 else None]
        dist.broadcast_object_list(held, src=0)
        return held[0]

    def barrier(self) -> None:
        dist.barrier()


def world() -> World:
    """The group that is there, or that the launcher's environment describes; alone where there is neither."""
    if not dist.is_available():
        return ALONE
    if not dist.is_initialized():
        join()
    return TorchWorld() if dist.is_initialized() and dist.get_world_size() > 1 else ALONE


def join() -> None:
    """Join the process group that a launcher described; without one, or with a group already there, do nothing.

    NCCL where this process has a GPU of its own, else gloo. The group is left when the process ends.

    Raises:
        UnsupportedError: the others cannot be reached.
    """
    about = launched()
    if about is None or dist.is_initialized():
        return
    timeout = dt.timedelta(seconds=float(os.environ.get("PERFKIT_TIMEOUT_S", TIMEOUT_S)))
    cuda = torch.cuda.is_available() and torch.cuda.device_count() >= about.local_size
    if cuda:
        torch.cuda.set_device(about.local_rank)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            init_method=f"tcp://{about.address}:{about.port}" if about.launcher != "torchrun" else "env://",
            rank=about.rank,
            world_size=about.size,
            timeout=timeout,
        )
    except Exception as error:
        raise UnsupportedError(
            f"rank {about.rank} of {about.size} cannot join the others at {about.address}:{about.port} "
            f"({about.launcher}): {type(error).__name__}: {error}"
        ) from error
    atexit.register(leave)


def leave() -> None:
    """Leave the process group, if there is one, together: one that is still talked to aborts its process (gloo)."""
    if not dist.is_initialized():
        return
    if dist.get_backend() == dist.Backend.GLOO:
        with contextlib.suppress(RuntimeError):  # others ended before: of an error, which they tell
            dist.monitored_barrier(timeout=dt.timedelta(seconds=GOODBYE_S))
    dist.destroy_process_group()
