"""Checkpoints of a training: whole or not there, and readable by another number of processes.

All processes write their parts into a folder of another name, which takes its final one when everything is there; the
last two are kept. Several machines must see the same folder.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from perfkit._errors import InvalidInputError
from perfkit.backends.adapter import Finished
from perfkit.parallel import world

KEPT = 2
PARTIAL, WHOLE, ABOUT = ".writing-", re.compile(r"step-(\d{8,})"), "about.json"


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one training.

    Args:
        folder: where they lie; made at the first.
        framework: "torch" or "jax".
        about: what must be the same when the training goes on: model, seed, batch size.
    """

    folder: Path
    framework: str
    about: Mapping[str, Any]

    def save(self, finished: Finished, step: int) -> Path:
        """Write what training has changed so far, after `step` steps; every process calls it."""
        found = world.of(self.framework)
        whole, partial = self.folder / f"step-{step:08d}", self.folder / f"{PARTIAL}step-{step:08d}"
        if found.leads:
            self.clean()
            partial.mkdir(parents=True)
        found.barrier()
        self._side().write(partial / "state", finished)
        found.barrier()
        if found.leads:
            told = {"step": step, "framework": self.framework, "processes": found.size, **self.about}
            (partial / ABOUT).write_text(json.dumps(told, indent=1))
            _flush(partial)
            partial.replace(whole)
            _flush_folder(self.folder)
            for _, old in self.there()[:-KEPT]:
                shutil.rmtree(old)
        found.barrier()
        return whole

    def restore(self, finished: Finished) -> int:
        """Take over the last checkpoint; every process calls it. Returns its step.

        Raises:
            InvalidInputError: there is none, or it is of another training.
        """
        found = world.of(self.framework)
        if found.leads:
            self.clean()
        last = found.agree(self.there()[-1:])
        if not last:
            raise InvalidInputError(f"{self.folder} holds no checkpoint to resume from: leave --resume out to begin")
        ((step, whole),) = last
        told = json.loads((whole / ABOUT).read_text())
        for name, wanted in {"framework": self.framework, **self.about}.items():
            if told.get(name) != wanted:
                raise InvalidInputError(
                    f"{whole} is of a training with {name} {told.get(name)!r}, and this one has {wanted!r}: "
                    "give the same, or another folder"
                )
        self._side().read(whole / "state", finished)
        found.barrier()
        return step

    def refuse_others(self) -> None:
        """Refuse to begin anew where checkpoints lie that would be overwritten.

        Raises:
            InvalidInputError: with the last one's step.
        """
        if there := self.there():
            raise InvalidInputError(
                f"{self.folder} holds a checkpoint of step {there[-1][0]} already: go on from it with --resume, "
                "or give another folder"
            )

    def there(self) -> list[tuple[int, Path]]:
        """The whole ones, by step."""
        if not self.folder.is_dir():
            return []
        named = ((WHOLE.fullmatch(path.name), path) for path in self.folder.iterdir())
        return sorted((int(match.group(1)), path) for match, path in named if match)

    def clean(self) -> None:
        """Remove what a training left half-written that was ended meanwhile."""
        if self.folder.is_dir():
            for path in self.folder.glob(f"{PARTIAL}*"):
                shutil.rmtree(path)

    def _side(self) -> Any:
        return import_module(f"perfkit.parallel.{self.framework}_checkpoint")


def _flush(folder: Path) -> None:
    """Have the disk hold every file of a folder, before its name says that it does."""
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)
            os.close(file)
        else:
            _flush_folder(path)
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere folders cannot be opened
        file = os.open(folder, os.O_RDONLY)
        os.fsync(file)
        os.close(file)
