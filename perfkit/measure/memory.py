"""How far a call drives up the memory of the process."""

from __future__ import annotations

import ctypes
import gc
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from perfkit._quantity import Quantity
from perfkit.measure import kept_memory


def process_high_water(call: Callable[[], Any], repeats: int = 3, proc: str | Path = "/proc/self") -> Quantity:
    """Bytes by which the resident memory of the process rises during one call: the median of `repeats` calls.

    Everything counts: tensors, the libraries' scratch and caches, Python's objects. Memory that the allocators hold
    from earlier calls is handed back first where the C library can (glibc); what they keep does not count as a rise.
    The kernel counts resident pages per processor and sums them now and then, so figures below 1 MB say little.

    Args:
        call: one whole, synchronized call; warmed up, or lazy set-up counts.
        proc: the process' folder under /proc.

    Source: proc(5), /proc/pid/clear_refs: writing 5 resets the peak resident set size (VmHWM).
    """
    clear_refs, status = Path(proc, "clear_refs"), Path(proc, "status")
    rises: list[int] = []
    for _ in range(repeats):
        gc.collect()
        trimmed = _trim()
        try:
            clear_refs.write_text("5")
            _resident_bytes(status, "VmHWM")  # some sandboxes' kernels keep no peak
            before = _resident_bytes(status, "VmRSS")
        except (OSError, ValueError) as error:
            return Quantity.missing("B", f"it needs Linux and a peak of resident memory that can be reset: {error}")
        call()
        rises.append(max(_resident_bytes(status, "VmHWM") - before, 0))
    freed = "after malloc_trim" if trimmed else "without malloc_trim, which this C library lacks"
    return Quantity(
        float(statistics.median(rises)),
        "B",
        method=f"VmHWM after the call - VmRSS before it, {freed}; median of {repeats}",
    )


_MALLINFO = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class _Mallinfo(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_size_t) for name in _MALLINFO)


def native_heap(without_bytes: float = 0) -> Quantity:
    """What the C library's allocator has handed out to the whole process and not got back.

    Args:
        without_bytes: of the tensors that are known of, which do not count.

    Source: mallinfo(3).
    """
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError, TypeError):
        return Quantity.missing("B", "this C library has no mallinfo2: it needs glibc 2.33")
    mallinfo2.restype = _Mallinfo
    told = mallinfo2()
    return Quantity(
        float(max(told.uordblks + told.hblkhd - kept_memory.held_bytes() - without_bytes, 0)),
        "B",
        method="mallinfo2 after a step: all of the process that malloc handed out, without tensors",
    )


def _resident_bytes(status: Path, field: str) -> int:
    for line in status.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024  # the kernel writes "kB" and means KiB
    raise ValueError(f"{status} has no line {field}")


def _trim() -> bool:
    """Hand freed memory back to the system, what models keep between calls too; False where this is not glibc."""
    kept_memory.hand_back()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return False
    return True
