"""Memory that models keep from call to call, in a process that hands large pieces back.

glibc maps a large piece by itself only where nothing that is free in its heap can hold it, and hands back only what is
free at the heap's end. So a piece in the middle of the heap that is freed when a model is called holds what the call
takes, and when it returns is allocated again as a whole: its pages stay mapped for the next call, and nothing else of
the process finds them. No setting is changed, and all else, another model in a comparison too, meets malloc as it was.

glibc has one arena that can grow so, that of the main thread; those of other threads are made of heaps of 64 MiB. Only
calls in threads of the main arena keep memory.

Sources: `struct malloc_chunk`, `sysmalloc` and `systrim` in malloc/malloc.c
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import threading
import weakref

from perfkit.measure import kept_memory
from perfkit.measure.kept_memory import KEPT_BYTES

WORD = ctypes.sizeof(ctypes.c_size_t)
MAPPED, ELSEWHERE, FLAGS = 2, 4, 7
"""In the word before a piece: its size, and in the lowest bits whether it is mapped, and of another arena than main."""

OTHER_THREAD = (
    "the C library takes memory for this thread from a part of the heap that cannot grow beyond 64 MiB: optimize and "
    f"call the model in the main thread, or start Python with {kept_memory.TYPED}"
)
"""Of threads that `reached` is not true of."""

PART = 1 << 16
"""Pieces of this size are never mapped by themselves, if nothing is set, and no thread has a cache of them."""

SPARE = KEPT_BYTES + (4 << 20)
"""Room for small pieces. malloc takes the smallest free one that is large enough, and has no other for some: those that
outlive a call would cut what large ones need in two."""

LEAST_MISSED = 4 << 20
"""A call that takes so many bytes anew has not found room; the second one in a row gets more."""

MOST_ROOM = 4
"""Times the room that was asked for: small pieces that outlive calls cut it, and calls may need more one day."""

MOST_TRIED = 1 << 30
"""So many bytes that are free in the heap may be in the way of growing it."""


class User:
    """Someone who keeps memory. When the last one is gone, the memory goes back to the system."""

    __slots__ = ("__weakref__",)

    def __init__(self):
        with _REGION.lock:
            _REGION.users += 1
        weakref.finalize(self, _REGION.left).atexit = False


class Keeping:
    """Within it this thread takes memory from what is kept; calls may be nested, and made in several threads.

    Args:
        user: for as long as there is one, memory is kept.
    """

    __slots__ = ("inside", "user")

    def __init__(self, user: User):
        self.user = user

    def __enter__(self):
        self.inside = reached()
        if self.inside:
            _REGION.enter()

    def __exit__(self, *_):
        if self.inside:
            _REGION.leave()


class _Region:
    """The one of this process.

    Args:
        depth: calls that keep memory now.
        users: of whom each may make one.
        ranges: addresses that the region's parts lie between.
        most: bytes that it may grow to.
        held: the pieces that are free in them, allocated between the calls.
        cold: whether pages were given to the system since the last call, which the next one touches anew.
        missed: whether the last call took much anew all the same.
    """

    def __init__(self):
        self.lock = threading.RLock()
        self.depth = self.users = self.most = self.before = 0
        self.cold = self.missed = False
        self.ranges: list[tuple[int, int]] = []
        self.held: list[int] = []

    def enter(self) -> None:
        with self.lock:
            if self.depth == 0:
                self.before = kept_memory.touched()
                held, self.held = self.held, []  # first: nobody may find here what is free
                self._free(held)
            self.depth += 1

    def leave(self) -> None:
        with self.lock:
            self.depth -= 1
            if self.depth == 0:
                pieces = _free_pieces()  # those of others among them
                self.held = [piece for piece in pieces if self._has(piece)]
                self._free([piece for piece in pieces if not self._has(piece)])
                self._mend(kept_memory.touched() - self.before)
                if not self.users:  # the last one left meanwhile
                    self.hand_back()

    def enlarge(self, size: int) -> bool:
        with self.lock:
            assert self.depth == 0
            self.most = max(self.most, MOST_ROOM * size + 2 * SPARE)
            return self._add(size) and self._add(SPARE)

    def _mend(self, taken: int) -> None:
        """Make room where calls do not find any."""
        missed, self.missed = self.missed, taken > LEAST_MISSED and not self.cold
        self.cold = False
        if missed and self.missed and size() + taken <= self.most and self._add(taken):
            self.hand_back()  # of what is left in small pieces nothing may be touched any more

    def _add(self, size: int) -> bool:
        if (piece := _grown(max(size, KEPT_BYTES))) is None:
            return False
        self.ranges.append((piece, piece + _usable(piece)))
        self.held.append(piece)
        self.cold = True
        return True

    def left(self) -> None:
        """A user is gone. It may happen in the middle of anything this thread does: `held` tells what is not free."""
        with self.lock:
            self.users -= 1
            if self.users == 0 and self.depth == 0:
                self.hand_back()

    def hand_back(self) -> None:
        self.cold = True
        for piece in self.held:
            _untouch(piece)

    def _has(self, piece: int) -> bool:
        return any(begin <= piece < end for begin, end in self.ranges)

    @staticmethod
    def _free(pieces: list[int]) -> None:
        for piece in pieces:
            _FREE(piece)


def size() -> int:
    """Bytes that can be kept."""
    return sum(end - begin for begin, end in _REGION.ranges)


def held_bytes() -> int:
    """What of it is free between calls, and allocated so that nothing else takes it."""
    return sum(map(_usable, _REGION.held))


def enlarge(size: int) -> bool:
    """Keep up to so many bytes more, in one piece; False where the heap cannot grow so."""
    return _REGION.enlarge(size)


def hand_back() -> None:
    """Give the pages that are kept to the system, between the calls, as if none had touched them yet."""
    with _REGION.lock:
        if _REGION.depth == 0:
            _REGION.hand_back()


def reached() -> bool:
    """Whether this thread takes memory from the main arena."""
    try:
        return _THREAD.of_main
    except AttributeError:
        piece = _MALLOC(PART)
        _THREAD.of_main = not _word(piece) & (MAPPED | ELSEWHERE)
        _FREE(piece)
        return _THREAD.of_main


def unavailable() -> str:
    """Why memory cannot be kept so here; empty where it can."""
    if kept_memory.kept():
        return f"there is nothing to do: this process was started with {kept_memory.TYPED}, and keeps what it frees"
    if reason := kept_memory.unavailable():
        return f"it works on the heap of glibc's malloc: {reason}"
    return _not_there()


@functools.cache
def _not_there() -> str:
    """Whether this process calls glibc's malloc, and its pieces are as they are read here."""
    if _LIBC is None or _address(_LIBC.malloc) != _address(ctypes.PyDLL("libc.so.6").malloc):
        return "it works on the heap of glibc's malloc, and another malloc has taken the place of that"
    small, large = _MALLOC(PART), _MALLOC(2 * KEPT_BYTES)
    as_known = (
        WORD == 8
        and _word(small) & ~FLAGS == _usable(small) + WORD
        and not _word(small) & MAPPED
        and (not _word(large) & MAPPED or _word(large) & ~FLAGS == _usable(large) + 2 * WORD)
    )
    _REGION._free([small, large])
    return "" if as_known else "pieces of memory are not as glibc makes them on 64 bits"


def _grown(size: int) -> int | None:
    """A piece of that size behind all that is in the heap, allocated; None where the heap cannot grow so.

    It is made of small ones, since malloc would map a large one. The first and the last stay: what is beside them may
    come free some day, and would merge with it.
    """
    parts, begin, tried = [], 0, 0  # parts[begin:] lie one behind the other
    while (len(parts) - begin - 2) * PART < size:
        piece = _MALLOC(PART)
        if not piece or _word(piece) & (MAPPED | ELSEWHERE) or tried > MOST_TRIED + 2 * size:
            _REGION._free([*parts, *([piece] if piece else [])])
            return None
        if parts and piece != parts[-1] + _usable(parts[-1]) + WORD:
            begin = len(parts)
        parts.append(piece)
        tried += PART
    inside = parts[begin + 1 : -1]
    whole = parts[-1] - inside[0] - WORD
    _REGION._free(parts[:begin] + inside)
    piece = _of_the_heap(whole)
    if piece != inside[0]:  # another thread took of it
        _REGION._free([each for each in (parts[begin], parts[-1], piece) if each])
        return None
    _untouch(piece)
    return piece


def _free_pieces() -> list[int]:
    """The free pieces of the heap of which each could hold `KEPT_BYTES`, allocated; but for its end."""
    found = []
    while piece := _of_the_heap(KEPT_BYTES):
        _FREE(piece)  # it was the beginning of a free one, and tells the size of that now
        whole = _of_the_heap((_word(piece) & ~FLAGS) - WORD)
        if not whole:  # the heap's end is never given out as a whole
            break
        found.append(whole)
    return found


def _of_the_heap(size: int) -> int | None:
    """A piece that was free; None where the system would have to give it.

    Not for less than `KEPT_BYTES`: glibc raises its limits when a smaller one that was mapped is freed.
    """
    assert size >= KEPT_BYTES
    piece = _MALLOC(size)
    if piece and _word(piece) & MAPPED:
        _FREE(piece)
        return None
    return piece


def _untouch(piece: int) -> None:
    begin = -(-piece // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (piece + _usable(piece)) // mmap.PAGESIZE * mmap.PAGESIZE
    _ADVISE(begin, end - begin, mmap.MADV_DONTNEED)


def _word(piece: int) -> int:
    return ctypes.c_size_t.from_address(piece - WORD).value


def _address(function) -> int | None:
    return ctypes.cast(function, ctypes.c_void_p).value


def _libc() -> ctypes.PyDLL | None:
    """The C library as this process calls it, if it has what is needed."""
    try:
        found = ctypes.PyDLL(None)  # PyDLL: calls take nanoseconds, for which no lock is given away
        found.malloc.restype, found.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        found.free.restype, found.free.argtypes = None, [ctypes.c_void_p]
        found.malloc_usable_size.restype, found.malloc_usable_size.argtypes = ctypes.c_size_t, [ctypes.c_void_p]
        found.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    except (AttributeError, OSError, TypeError):  # TypeError: Windows has no namespace of all libraries
        return None
    return found


def _after_fork() -> None:
    _REGION.lock = threading.RLock()  # another thread, which is not there any more, may have held it


_LIBC = _libc()
if _LIBC is not None:
    _MALLOC, _FREE, _ADVISE, _usable = _LIBC.malloc, _LIBC.free, _LIBC.madvise, _LIBC.malloc_usable_size

_THREAD = threading.local()
_REGION = _Region()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
