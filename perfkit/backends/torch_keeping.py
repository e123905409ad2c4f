"""Torch models on a CPU whose calls find the memory that the last one took: `perfkit.measure.kept_region`."""

from __future__ import annotations

import functools

from perfkit._report import Effect
from perfkit._workload import Workload
from perfkit.backends.torch_training import anew, within
from perfkit.measure import kept_memory, kept_region, memory
from perfkit.measure.kept_memory import mib
from perfkit.measure.kept_region import Keeping, User

WARM = 2
"""Calls before one is counted: in the first ones programs are compiled, and state is made."""

LEAST_BYTES = 4 << 20
"""What takes less anew in each call is left as it is."""

LITTLE, ROUNDS = 0.1, 4
"""Calls are made until one takes no more than this share of what it took, so many times at most: more room is made
meanwhile, where one piece needs more in one place than another has left."""


def keeping(work: Workload, size: int) -> tuple[Workload, Effect]:
    """The same workload with room for so many bytes, which it shares with what else keeps memory."""
    missing = size - kept_region.size()
    if missing > 0 and not kept_region.enlarge(missing):
        return work, Effect(notes=(NO_ROOM.format(mib(missing)),))
    return _bound(work, User(), f"up to {mib(kept_region.size())} are kept between calls")


def as_needed(work: Workload) -> tuple[Workload, Effect]:
    """The same workload with room for what a call takes from the system anew, if that is much."""
    tried, user = anew(work), User()
    finished = work.backend.finish(tried)
    plain = work.backend.caller(tried, finished)

    def kept() -> None:
        with Keeping(user):
            plain()

    with finished.keeping_state():
        before = _taken(plain)
        if before < LEAST_BYTES:
            return work, Effect(notes=(_too_little(before),))
        left = _taken(kept) if kept_region.size() else before
        if left > LITTLE * before and not kept_region.enlarge(left):
            return work, Effect(notes=(NO_ROOM.format(mib(left)),))
        for _ in range(ROUNDS):
            if left > LITTLE * before:
                left = _taken(kept)
    if left > before / 2:
        told = f"each call takes {mib(before)} from the system anew, and still {mib(left)} where there is room for it"
        return work, Effect(notes=(told,))
    held = memory.resident_bytes()
    kept_region.hand_back()
    held -= memory.resident_bytes()
    told = f"each call took {mib(before)} from the system anew, and takes {mib(left)} now"
    return _bound(work, user, told, f"between calls the process holds {mib(max(held, 0))} of memory for it")


NO_ROOM = "the heap cannot grow by {} in one piece, so nothing is kept"


def _bound(work: Workload, user: User, *notes: str) -> tuple[Workload, Effect]:
    return within(work, functools.partial(Keeping, user)), Effect((work.backend.model_name(work),), notes=notes)


def _taken(call) -> int:
    """Bytes of the pages that a call touches for the first time, once it has been called before."""
    for _ in range(WARM):
        call()
    return kept_memory.touched_anew(call)


def _too_little(before: int) -> str:
    told = f"each call takes {mib(before)} from the system anew, which is little: there is nothing to keep"
    if kept_memory.huge_pages():
        told += "; pages are huge on this system and each counts as a small one: try 'keep_memory(300)' for 300 MiB"
    return told
