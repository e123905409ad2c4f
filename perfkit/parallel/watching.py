"""The launcher's watch: which of its processes has been silent for too long, and where it is."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from perfkit.parallel import heartbeat
from perfkit.parallel.heartbeat import Beat

POLL_S = 0.2
ANSWER_S = 1.0
"""How long a silent process may take to say where it is."""
WAITING = re.compile(r"/torch/(distributed|autograd)/|/jax/")
"""Where a process is that may wait for another one: in a collective, or in a backward pass that holds some."""


@dataclass(frozen=True)
class Silence:
    """A process that was silent for too long.

    Args:
        seconds: since its last sign of life.
        where: the line of code that it was at, in words.
        order: the smaller, the likelier that the others waited for it.
    """

    seconds: float
    where: str
    order: tuple


class Watch:
    """A thread that ends processes which began a step and did not come to the next one in time.

    Those that wait for a hung one are silent too: all are asked where they are, and told apart by how far they came.

    Attributes:
        silent: the ranks that were ended for it.
    """

    def __init__(self, folder: Path, ranks: range, timeout_s: float):
        self.folder, self.ranks, self.timeout_s = folder, ranks, timeout_s
        self.silent: dict[int, Silence] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(POLL_S):
            if any(self._late(beat) for beat in self._beats().values()):
                self._over.wait(POLL_S * 2)  # those that wait for it have begun their step a moment later
                if not self._over.is_set():
                    self._end({rank: beat for rank, beat in self._beats().items() if self._late(beat, POLL_S * 2)})
                return

    def _beats(self) -> dict[int, Beat]:
        found = {rank: heartbeat.read_beat(self.folder, rank) for rank in self.ranks}
        return {rank: beat for rank, beat in found.items() if beat is not None}

    def _late(self, beat: Beat, early_s: float = 0.0) -> bool:
        return beat.watched and time.monotonic() - beat.when > self.timeout_s - early_s

    def _end(self, late: dict[int, Beat]) -> None:
        for beat in late.values():
            _send(beat.pid, signal.SIGUSR1)
        time.sleep(ANSWER_S)
        for rank, beat in late.items():
            stack = self.folder / f"{rank}.stack"
            where = innermost(stack)
            waits = where is not None and WAITING.search(stack.read_text()) is not None
            order = (where is not None, waits, -1 if beat.step is None else beat.step, beat.when)
            told = f"it was at {where}" if where else "it does not answer: stopped, or stuck in the system"
            self.silent[rank] = Silence(time.monotonic() - beat.when, told, order)
        for beat in late.values():
            _send(beat.pid, signal.SIGKILL)


def innermost(stack: Path) -> str | None:
    """Where a process was, by what faulthandler wrote about it: "train.py:12 in step"; None where it wrote nothing."""
    if not stack.exists():
        return None
    frames = re.findall(r'File "([^"]*)", line (\d+) in (\S+)', stack.read_text())
    if not frames:
        return None
    path, line, function = frames[0]
    return f"{os.path.basename(path)}:{line} in {function}"


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return  # it ended meanwhile, which is what is wanted
