"""Torch models on a CPU whose calls find the memory that the last one took: `perfkit.kernels.torch_memory`."""

from __future__ import annotations

from collections.abc import Callable

from perfkit._report import Effect
from perfkit._workload import Workload
from perfkit.backends.torch_training import anew, within
from perfkit.kernels.torch_memory.allocator import Keeping, User
from perfkit.measure import kept_memory
from perfkit.measure.kept_memory import mib

WARM = 3
"""Calls before one is counted: in the first ones programs are compiled, state is made, and memory is first touched."""

USER = "_perfkit_memory"
"""In modules that keep memory: the user, which is gone with them."""

LEAST_BYTES = 4 << 20
"""What takes less anew in each call is left as it is."""


def keeping(work: Workload) -> tuple[Workload, Effect]:
    """The same workload, of which each call finds what the last one took; as it is where that is little.

    Raises:
        UnsupportedError: the allocator cannot be built.
    """
    user = User()
    if work.inputs is None:
        return _bound(work, user, "what a call takes is kept for the next one")
    tried, held_by_others = anew(work), kept_memory.held_bytes()
    finished = work.backend.finish(tried)
    plain = work.backend.caller(tried, finished)

    def kept() -> None:
        with Keeping():
            plain()

    with finished.keeping_state():
        if (before := _taken(plain)) < LEAST_BYTES:
            return work, Effect(notes=(_too_little(before),))
        left = _taken(kept)
    told = f"each call takes {mib(before)} from the system anew, and {mib(left)} where it finds what the last one took"
    if left > before / 2:
        return work, Effect(notes=(told,))
    held = kept_memory.held_bytes() - held_by_others
    return _bound(work, user, told, f"between calls the process holds {mib(max(held, 0))} for it")


def _bound(work: Workload, user: User, *notes: str) -> tuple[Workload, Effect]:
    # With the module and not with its class: where torch 2.11 compiles on Python 3.12, that outlives it.
    vars(work.model)[USER] = user
    return within(work, Keeping), Effect((work.backend.model_name(work),), notes=notes)


def _taken(call: Callable[[], object]) -> int:
    """Bytes of the pages that a call touches for the first time, once it has been called before."""
    for _ in range(WARM):
        call()
    return kept_memory.touched_anew(call)


def _too_little(before: int) -> str:
    told = f"each call takes {mib(before)} from the system anew, which is little: there is nothing to keep"
    if kept_memory.huge_pages():
        told += "; pages are huge on this system, and each counts as a small one: pass no example_inputs to keep all"
    return told
