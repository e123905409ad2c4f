"""A process whose calls take two large pieces each, with and without memory that is kept; prints what it saw."""

import ctypes
import gc
import json
import os
import threading

from perfkit.measure import kept_memory, kept_region, memory
from perfkit.measure.kept_region import Keeping, User

MIB = 1 << 20
SIZES = (40 * MIB, 70 * MIB)
NO_HUGE_PAGES = 41
"""Of prctl: each of them would count as one page."""

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
libc.prctl(NO_HUGE_PAGES, 1, 0, 0, 0)


def taken(size):
    piece = libc.malloc(size)
    ctypes.memset(piece, 1, size)
    return piece


def plain():
    for piece in [taken(size) for size in SIZES]:
        libc.free(piece)


def keeping(call, user):
    def kept():
        with Keeping(user):
            call()

    return kept


def counted(call):
    call()
    return kept_memory.touched_anew(call) // MIB


def in_a_thread(call):
    found = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]


def nested(user):
    with Keeping(user):
        plain()
        with Keeping(User()):
            plain()
        plain()


def raising(user):
    try:
        with Keeping(user):
            piece = taken(SIZES[0])
            libc.free(piece)
            raise KeyError
    except KeyError:
        pass


def outlives(user):
    """A piece that a call returns, with what it held after other calls, and after calls that keep no memory."""
    with Keeping(user):
        piece = taken(SIZES[0])
    ctypes.memset(piece, 7, SIZES[0])
    for call in (plain, keeping(plain, user), plain):
        call()
    same = ctypes.string_at(piece, SIZES[0]) == b"\7" * SIZES[0]
    libc.free(piece)
    return same


def forked(user):
    child = os.fork()
    if child == 0:
        os._exit(0 if counted(keeping(plain, user)) < 2 else 1)
    return os.waitpid(child, 0)[1]


def main():
    user = User()
    kept = keeping(plain, user)
    found = {"unavailable": kept_region.unavailable(), "plain": counted(plain), "no room": counted(kept)}
    found["grown"] = kept_region.enlarge(sum(SIZES) + MIB)
    found["held"] = kept_region.held_bytes() // MIB
    found["in turns"] = [(counted(kept), counted(plain)) for _ in range(3)]
    found["nested"], found["after nested"] = counted(lambda: nested(user)), counted(plain)
    raising(user)
    found["after raising"] = counted(kept), counted(plain), kept_region.held_bytes() // MIB
    found["outlives"] = outlives(user)
    found["after what outlived"] = counted(kept), counted(plain)
    found["main reached"], found["thread reached"] = kept_region.reached(), in_a_thread(kept_region.reached)
    found["in a thread"] = in_a_thread(lambda: counted(kept))
    found["after a thread"] = counted(kept), counted(plain), kept_region.held_bytes() // MIB
    found["beside"] = beside(user)
    found["status of a fork"] = forked(user)
    found["high water"] = [int(memory.process_high_water(call).value or -1) // MIB for call in (kept, plain)]
    found["short"] = short(user)
    return found


def leaving():
    """What goes back to the system when one of two users goes, and the other; and what calls find then."""
    users = [User(), User()]
    counted(keeping(plain, users[0]))
    before, freed = memory.resident_bytes(), []
    while users:
        users.pop()
        gc.collect()
        freed.append((before - memory.resident_bytes()) // MIB)
    return [*freed, counted(plain), counted(keeping(plain, User()))]


def short(user):
    """What calls take anew that need twice the room there is."""

    def more():
        for piece in [taken(size) for size in (*SIZES, *SIZES)]:
            libc.free(piece)

    calls = [counted(keeping(more, user)) for _ in range(3)]
    return calls[-1], counted(plain)


def beside(user):
    """What a piece takes anew in one thread while another one is in a call and leaves it, over and over."""
    over = threading.Event()
    wrong = []

    def others():
        while not over.is_set():
            with Keeping(user):
                pass

    threads = [threading.Thread(target=others) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(5):
        with Keeping(user):
            piece = taken(SIZES[0])
            ctypes.memset(piece, number, SIZES[0])
            if ctypes.string_at(piece, SIZES[0]) != bytes([number]) * SIZES[0]:
                wrong.append(number)
            libc.free(piece)
    over.set()
    for thread in threads:
        thread.join()
    return wrong


if __name__ == "__main__":
    seen = main()
    print(json.dumps(seen | {"leaving": leaving()}))
