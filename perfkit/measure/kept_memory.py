"""Whether this process keeps the memory that it frees, or hands large pieces back and takes them from the system anew.

XLA takes a program's temporary memory on a CPU in one piece, by malloc, in each call, and torch each tensor. glibc maps
a piece above `KEPT_BYTES` by itself and unmaps it when it is freed; the threads' own arenas do so too, in heaps of 64
MiB. The kernel then zeroes and maps each page again when it is next touched. `SETTINGS` turn this off for a whole
process. glibc reads them once, when it starts; later, allocators of our own can keep memory (`hold`). docs/memory.md
has what that gives and takes.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
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

TUNABLES = {
    "glibc.malloc.arena_max": "MALLOC_ARENA_MAX",
    "glibc.malloc.mmap_max": "MALLOC_MMAP_MAX_",
    "glibc.malloc.trim_threshold": "MALLOC_TRIM_THRESHOLD_",
}
"""The same as parts of the variable GLIBC_TUNABLES, which count before variables of their own.

Source: https://www.gnu.org/software/libc/manual/html_node/Memory-Allocation-Tunables.html
"""

TYPED = " ".join(f"{name}={value}" for name, value in SETTINGS.items())
"""As they stand before a command."""

KEEPING = (
    f"started with {TYPED}, Python keeps it, which may be quicker: the process then holds the most memory that it ever "
    "needed, and its threads share one malloc arena (docs/memory.md)"
)
"""What can be done, and what it costs."""

BY_RECIPE = (
    "the recipe keep_memory keeps it, which may be quicker: the process then holds it between calls, too. So does "
    f"Python, started with {TYPED} (docs/memory.md)"
)
"""The same where memory can be kept while a process runs."""

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def fresh(temporary: int) -> int:
    """Bytes that the system gives in each call to a program that takes so many while it runs, in one piece."""
    return temporary if temporary > KEPT_BYTES else 0


def touched_anew(call: Call) -> int:
    """Bytes of the pages that this process touches for the first time in a call, on average over a few.

    Each page is counted as if it were no huge one.
    """
    before, began, calls = touched(), time.perf_counter(), 0
    while not calls or (calls < MOST_CALLS and time.perf_counter() - began < LONG_S):
        call()
        calls += 1
    return (touched() - before) // calls


def touched() -> int:
    """Bytes of the pages that this process has touched for the first time, or again after they went back."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt * resource.getpagesize() if resource else 0


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
    given = at_start() if variables is None else variables
    parts = (part.split("=", 1) for part in given.get("GLIBC_TUNABLES", "").split(":") if "=" in part)
    given = {**given, **{TUNABLES[name]: value for name, value in parts if name in TUNABLES}}
    arenas, mapped, trim = (_number(given.get(name)) for name in SETTINGS)
    return arenas == 1 and mapped == 0 and trim is not None and trim >= int(SETTINGS["MALLOC_TRIM_THRESHOLD_"])


def settled() -> bool:
    """Whether there is nothing to do: memory is kept already, or the settings do nothing here."""
    return kept() or bool(unavailable())


def advice(temporary: int, by_recipe: bool = False) -> str:
    """What to tell of a program on the CPU that takes so many bytes in each call; empty where there is nothing to."""
    if not fresh(temporary) or settled():
        return ""
    keeping = BY_RECIPE if by_recipe else KEEPING
    return f"each call takes {mib(temporary)} from the system anew and gives that back; {keeping}"


def told() -> str:
    """What this process does, in one line."""
    if reason := unavailable():
        return f"as the C library does it: the settings to keep it do nothing here, since {reason}"
    if kept():
        return f"kept from call to call ({TYPED})"
    return (
        f"above {mib(KEPT_BYTES)} given back after each call; kept for models in torch by the recipe keep_memory, and "
        f"for all, if Python is started with {TYPED}"
    )


def mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"


def huge_pages() -> bool:
    """Whether all of a process may have huge pages, of which `touched_anew` counts each as a small one."""
    try:
        return "[always]" in HUGE_PAGES.read_text()
    except OSError:
        return False


def at_start() -> Mapping[str, str]:
    """The environment variables that this process began with: what was set later, glibc has not seen."""
    try:
        lines = Path("/proc/self/environ").read_bytes().split(b"\0")
    except OSError:
        return os.environ
    return dict(line.decode(errors="replace").split("=", 1) for line in lines if b"=" in line)


def hold(drop: Callable[[], None], held: Callable[[], int]) -> None:
    """Tell of an allocator that keeps memory between calls: how it hands that back, and how many bytes there are."""
    _holders.append((drop, held))


def hand_back() -> None:
    """Have allocators hand back what they keep between calls."""
    for drop, _ in _holders:
        drop()


def held_bytes() -> int:
    """What allocators keep between calls."""
    return sum(held() for _, held in _holders)


_holders: list[tuple[Callable[[], None], Callable[[], int]]] = []


def _number(value: str | None) -> int | None:
    try:
        return None if value is None else int(value, 0)
    except ValueError:
        return None
