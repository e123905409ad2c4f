"""What the operating system and the hypervisor took away while the clock ran."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    resource = None


class Interruptions:
    """Counts what interrupted this process: involuntary context switches, and time stolen by the hypervisor.

    Of the whole process rather than of the calling thread: a model's worker threads are interrupted just as well.
    """

    def __init__(self, stat: str | Path = "/proc/stat"):
        self._stat = stat
        self._file = -1

    def __enter__(self) -> Interruptions:
        with contextlib.suppress(OSError):
            self._file = os.open(self._stat, os.O_RDONLY)
        return self

    def __exit__(self, *_: object) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    @property
    def method(self) -> str:
        """What is counted, in a few words; empty where the platform counts nothing."""
        sources = []
        if resource is not None:
            sources.append("involuntary context switches (getrusage)")
        if self._file >= 0:
            sources.append(f"stolen time ({self._stat})")
        return " or ".join(sources)

    def count(self) -> tuple[int, int]:
        """Context switches and stolen ticks so far; only whether they change between two calls matters."""
        switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw if resource is not None else 0
        return switches, _stolen_ticks(os.pread(self._file, 256, 0)) if self._file >= 0 else 0


def waited_s(tasks: str | Path = "/proc/self/task", stat: str | Path = "/proc/stat") -> float | None:
    """Seconds that this process' threads, together, had work but no processor; None where Linux does not tell.

    What the hypervisor took from the whole machine is counted in: threads that run meanwhile do not know of it.
    """
    waited = None
    with contextlib.suppress(OSError):
        for thread in os.listdir(tasks):
            # A thread may end between the listing and the reading.
            with contextlib.suppress(OSError, IndexError):
                # "nanoseconds run, nanoseconds waited on a run queue, time slices"
                waited = (waited or 0.0) + int(Path(tasks, thread, "schedstat").read_text().split()[1]) / 1e9
    if waited is not None:
        with contextlib.suppress(OSError):
            waited += _stolen_ticks(Path(stat).read_bytes()) / os.sysconf("SC_CLK_TCK")
    return waited


def _stolen_ticks(stat: bytes) -> int:
    """Of the first line: "cpu user nice system idle iowait irq softirq steal guest guest_nice", in ticks."""
    fields = stat.split(b"\n", 1)[0].split()
    return int(fields[8]) if len(fields) > 8 else 0
