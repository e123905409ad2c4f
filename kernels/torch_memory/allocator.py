"""Calls whose tensors find the memory that those of earlier ones left: `allocator.cpp`.

Source: `c10::SetCPUAllocator` in c10/core/CPUAllocator.h
"""

from __future__ import annotations

import ctypes
import functools
import sys
import weakref
from pathlib import Path
from typing import Any

import torch

from perfkit._errors import UnsupportedError
from perfkit.kernels import _native
from perfkit.measure import kept_memory

SOURCE = Path(__file__).with_name("allocator.cpp")
TORCH = Path(torch.__file__).parent


class User:
    """Someone who keeps memory, as each copy does. When the last one is gone, what is kept goes back.

    Raises:
        UnsupportedError: see `library`.
    """

    __slots__ = ("__weakref__",)

    def __init__(self):
        count = library().perfkit_memory_users
        count(1)
        weakref.finalize(self, count, -1).atexit = False

    def __deepcopy__(self, memo: Any) -> User:
        return User()


class Keeping:
    """Within it this thread's tensors on the CPU are put where earlier ones were, for as long as there is a user.

    Calls may be nested.
    """

    __slots__ = ("within",)

    def __init__(self):
        self.within = library().perfkit_memory_within

    def __enter__(self):
        self.within(1)

    def __exit__(self, *_):
        self.within(-1)


@functools.cache
def library() -> ctypes.PyDLL:
    """The allocator, built at the first use and put before torch's.

    Raises:
        UnsupportedError: it cannot be built, or another one is there that torch prefers.
    """
    flags = (
        f"-I{TORCH / 'include'}",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        f"-DPERFKIT_FOR_TORCH={torch.__version__}",  # for nothing but to be built anew for another one
        f"-L{TORCH / 'lib'}",
        f"-Wl,--no-as-needed,-rpath,{TORCH / 'lib'}",
        "-lc10",
    )
    found = ctypes.PyDLL(_native.load(SOURCE, flags)._name)  # calls take too little time to let go of Python's lock
    found.perfkit_memory_held.restype = ctypes.c_int64
    if not found.perfkit_memory_install():
        raise UnsupportedError("torch keeps to another allocator of CPU memory, which was put before its own")
    kept_memory.hold(found.perfkit_memory_drop, found.perfkit_memory_held)
    return found


def unavailable() -> str:
    """Why memory cannot be kept so here; empty where it can."""
    if kept_memory.kept():
        return f"there is nothing to do: this process was started with {kept_memory.TYPED}, and keeps what it frees"
    if not sys.platform.startswith("linux"):
        return f"it was written for memory as Linux gives it, and this is {sys.platform}"
    if not (TORCH / "include" / "c10" / "core" / "CPUAllocator.h").exists():
        return f"it is built with torch's headers, and {TORCH / 'include'} has none"
    return _native.missing() or ""
