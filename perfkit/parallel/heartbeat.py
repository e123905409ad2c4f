"""How far each process has come, and what ended it: small files in a folder that the launcher watches.

A script that wants its steps watched calls `beat(step)` before each one and `rest()` after the last. Without a launcher
both do nothing.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from perfkit.parallel.environment import launched

FOLDER = "PERFKIT_RUN_FOLDER"
"""The environment variable by which the launcher says where it looks."""


@dataclass(frozen=True)
class Beat:
    """The last sign of life of a process.

    Args:
        pid: its process.
        step: the step that it began last; None before the first.
        watched: whether the next sign is due within the launcher's timeout.
        when: on the machine's monotonic clock, s.
    """

    pid: int
    step: int | None
    watched: bool
    when: float


@dataclass(frozen=True)
class Failure:
    """What ended a process, told by itself.

    Args:
        step: as in `Beat`.
        when: as in `Beat`.
        cause: one line.
        communication: whether it is about another process that could not be reached: then it follows from that one.
        traceback: the script's; empty for an error that explains itself.
    """

    step: int | None
    when: float
    cause: str
    communication: bool = False
    traceback: str = ""


def folder() -> Path | None:
    """Where this process tells of itself; None where nobody looks."""
    named = os.environ.get(FOLDER)
    return Path(named) if named and launched() is not None else None


def beat(step: int) -> None:
    """Say that this process begins a step, and that the next sign follows within the launcher's timeout."""
    _write(step, watched=True)


def rest() -> None:
    """Say that no step is under way: what comes now may take as long as it takes."""
    _write(last_step(), watched=False)


def last_step() -> int | None:
    """The step that this process began last, where it told."""
    told = _told()
    return told.step if told else None


def failed(cause: str, communication: bool, traceback: str) -> None:
    """Leave behind what ended this process."""
    if (where := folder()) is None:
        return
    failure = Failure(last_step(), time.monotonic(), cause, communication, traceback)
    partial = where / f"{launched().rank}.partial"
    partial.write_text(json.dumps(asdict(failure)))
    partial.replace(where / f"{launched().rank}.failed")


def read_beat(where: Path, rank: int) -> Beat | None:
    """The last sign of life of that rank; None where there was none yet."""
    try:
        pid, step, watched, when = (where / f"{rank}.beat").read_text().split()
    except (FileNotFoundError, ValueError):  # it has not started yet, or is about to write its first line
        return None
    return Beat(int(pid), int(step) if int(step) >= 0 else None, watched == "1", float(when))


def read_failure(where: Path, rank: int) -> Failure | None:
    """What that rank left behind; None where it ended without a word."""
    try:
        return Failure(**json.loads((where / f"{rank}.failed").read_text()))
    except FileNotFoundError:
        return None


def _told() -> Beat | None:
    where = folder()
    return None if where is None else read_beat(where, launched().rank)


def _write(step: int | None, *, watched: bool) -> None:
    if (where := folder()) is None:
        return
    line = f"{os.getpid():10d} {-1 if step is None else step:12d} {watched:d} {time.monotonic():18.6f}\n"
    file = os.open(where / f"{launched().rank}.beat", os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        os.pwrite(file, line.encode(), 0)  # always as long, so that a reader sees the old line or the new one
    finally:
        os.close(file)
