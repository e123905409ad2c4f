"""Whether this process keeps the memory that it frees, or hands large pieces back and takes them from the system anew.

XLA takes a program's temporary memory on a CPU in one piece, by malloc, in each call, and torch each tensor. glibc maps
a piece above `KEPT_BYTES` by itself and unmaps it when it is freed; the threads' own arenas do so too, in heaps of 64
MiB. The kernel then zeroes and maps each page again when it is next touched. `SETTINGS` turn this off. glibc reads them
once, when a process starts. docs/memory.md has what that gives and takes.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from perfkit.measure.calls import Call

resource: ModuleType | None
try:
    import resource
except ImportError:  # Windows
    resource = None

KEPT_BYTES = 32 << 20
"""Up to so many bytes glibc keeps what a program gives back, and takes larger pieces from the system in each call.

Source: `DEFAULT_MMAP_THRESHOLD_MAX` in malloc/malloc.c
"""

MOST_CALLS, LONG_S = 4, 0.5
"""So many calls tell what one takes anew, or as few as last so long: some take it in every other one."""

SETTINGS = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "8000000000"}
"""All are needed: one arena, which may grow beyond 64 MiB; no piece mapped by itself; nothing given back from its end.

Source: mallopt(3).
"""

TYPED = " ".join(f"{name}={value}" for name, value in SETTINGS.items())
"""As they stand before a command."""

KEEPING = (
    f"started with {TYPED}, Python keeps it, which may be quicker: the process then holds the most memory that it ever "
    "needed, and its threads share one malloc arena (docs/memory.md)"
)
"""What can be done, and what it costs."""


def fresh(temporary: int) -> int:
    """Bytes that the system gives in each call to a program that takes so many while it runs, in one piece."""
    return temporary if temporary > KEPT_BYTES else 0


def touched_anew(call: Call) -> int:
    """Bytes of the pages that this process touches for the first time in a call, on average over a few.

    Each page is counted as if it were no huge one.
    """
    if resource is None:
        return 0
    before, began, calls = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter(), 0
    while not calls or (calls < MOST_CALLS and time.perf_counter() - began < LONG_S):
        call()
        calls += 1
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() // calls


def unavailable() -> str:
    """Why the settings do nothing in processes that are started here; empty where they do."""
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return f"they are glibc's, and this is {platform.system()} without it"
    return replaced(os.environ)


def replaced(variables: Mapping[str, str]) -> str:
    """What takes the place of glibc's malloc in a process with these variables; empty where nothing does."""
    preloaded = variables.get("LD_PRELOAD", "")
    return f"LD_PRELOAD={preloaded} puts another malloc in the place of glibc's" if "malloc" in preloaded else ""


def kept(variables: Mapping[str, str] | None = None) -> bool:
    """Whether a process that was started with these variables keeps what it frees; None: this one."""
    given = _at_start() if variables is None else variables
    arenas, mapped, trim = (_number(given.get(name)) for name in SETTINGS)
    return arenas == 1 and mapped == 0 and trim is not None and trim >= int(SETTINGS["MALLOC_TRIM_THRESHOLD_"])


def settled() -> bool:
    """Whether there is nothing to do: memory is kept already, or the settings do nothing here."""
    return kept() or bool(unavailable())


def advice(temporary: int) -> str:
    """What to tell of a program on the CPU that takes so many bytes in each call; empty where there is nothing to."""
    if not fresh(temporary) or settled():
        return ""
    return f"each call takes {temporary / 2**20:.0f} MiB from the system anew and gives that back; {KEEPING}"


def told() -> str:
    """What this process does, in one line."""
    if reason := unavailable():
        return f"as the C library does it: the settings to keep it do nothing here, since {reason}"
    if kept():
        return f"kept from call to call ({TYPED})"
    return f"above {KEPT_BYTES >> 20} MiB given back after each call; kept, if Python is started with {TYPED}"


def _at_start() -> Mapping[str, str]:
    """The environment variables that this process began with: what was set later, glibc has not seen."""
    try:
        lines = Path("/proc/self/environ").read_bytes().split(b"\0")
    except OSError:
        return os.environ
    return dict(line.decode(errors="replace").split("=", 1) for line in lines if b"=" in line)


def _number(value: str | None) -> int | None:
    try:
        return None if value is None else int(value, 0)
    except ValueError:
        return None
