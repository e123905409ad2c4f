"""A torch training's state in files: each process writes its shards, and any number of them reads those."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from perfkit.backends.adapter import Finished

BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)
"""The optimizer's state and settings by parameter: processes may hold different ones, as the stages of a pipeline."""


def write(folder: Path, finished: Finished) -> None:
    """Write model, optimizer, loss scale and this process' random state; all processes together.

    Where the processes' models differ for some steps they are brought together first.
    """
    if finished.trainer.rounds is not None:
        finished.trainer.rounds.settle()
    state = _state(finished) | _random()
    with _alone_or_not() as alone:
        dcp.save(state, checkpoint_id=folder, no_dist=alone)


def read(folder: Path, finished: Finished) -> None:
    """Read the same into the model and the optimizer as they lie now.

    A process that was not there when it was written keeps its own random state.
    """
    trainer = finished.trainer
    held = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    state = _state(finished)
    if trainer.rounds is not None and not trainer.rounds.written_in(held):
        del state["rounds"]
    state |= {name: value for name, value in _random().items() if name in held}
    with _alone_or_not() as alone:
        dcp.load(state, checkpoint_id=folder, no_dist=alone)
    if _learns(trainer.model):
        parts = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
        set_state_dict(trainer.model, trainer.optimizer, **parts, options=BY_NAME)
    else:
        trainer.model.load_state_dict(state["model"])
    trainer.scaler.load_state_dict(state["scaler"])
    if trainer.rounds is not None:
        trainer.rounds.load_state_dict(state.get("rounds") or trainer.rounds.begun())
    if (cpu := state.get(_name("cpu"))) is not None:
        torch.set_rng_state(cpu)
    if (cuda := state.get(_name("cuda"))) is not None:
        torch.cuda.set_rng_state(cuda)


@contextmanager
def _alone_or_not() -> Iterator[bool]:
    """Whether there is no group; torch warns of that, even where it was told."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield not dist.is_initialized()


def _state(finished: Finished) -> dict[str, Any]:
    trainer = finished.trainer
    if _learns(trainer.model):
        model, optimizer = get_state_dict(trainer.model, trainer.optimizer, options=BY_NAME)
    else:
        model, optimizer = trainer.model.state_dict(), {}
    state = {"model": model, "optimizer": optimizer, "scaler": trainer.scaler.state_dict()}
    return state if trainer.rounds is None else state | {"rounds": trainer.rounds.state_dict()}


def _learns(model: torch.nn.Module) -> bool:
    """Whether this process holds parameters: a pipeline's stage may have none, and torch refuses to tell its state."""
    return next(model.parameters(), None) is not None


def _random() -> dict[str, torch.Tensor]:
    found = {_name("cpu"): torch.get_rng_state()}
    if torch.cuda.is_available():
        found[_name("cuda")] = torch.cuda.get_rng_state()
    return found


def _name(device: str) -> str:
    return f"random.{device}.{dist.get_rank() if dist.is_initialized() else 0}"
