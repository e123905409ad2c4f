"""Settings of the C library: when they are on, what is advised, and that they do what is said of them."""

import mmap
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from perfkit.measure import kept_memory
from perfkit.measure.kept_memory import KEPT_BYTES, SETTINGS, TYPED

LARGE = 100 << 20
IN_NO_ARENA = 68 << 20  # a thread's own has 64 MiB, and each page that is touched takes the system a while
FAULTS = """
import ctypes, resource, sys, threading
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
size, found = int(sys.argv[1]), []

def calls():
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        piece = libc.malloc(size)
        ctypes.memset(piece, 1, size)
        libc.free(piece)
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

thread = threading.Thread(target=calls)
thread.start()
thread.join()
print(*found)
"""


@pytest.fixture
def started(monkeypatch):
    """As in a process that glibc runs in, started with these variables."""

    def start(variables, reason=""):
        monkeypatch.setattr(kept_memory, "at_start", lambda: variables)
        monkeypatch.setattr(kept_memory, "unavailable", lambda: reason)

    return start


def test_all_settings_are_needed():
    assert kept_memory.kept(SETTINGS)
    assert kept_memory.kept(SETTINGS | {"MALLOC_TRIM_THRESHOLD_": str(2**40)})
    assert not kept_memory.kept({})
    for name in SETTINGS:
        assert not kept_memory.kept({other: value for other, value in SETTINGS.items() if other != name})
        assert not kept_memory.kept(SETTINGS | {name: "3"})
        assert not kept_memory.kept(SETTINGS | {name: "many"})


def test_they_may_be_tunables():
    told = ":".join(f"{tunable}={SETTINGS[name]}" for tunable, name in kept_memory.TUNABLES.items())
    assert kept_memory.kept({"GLIBC_TUNABLES": told})
    assert kept_memory.kept({"GLIBC_TUNABLES": f"glibc.malloc.check=1:{told}:glibc.rtld.nns"})
    assert kept_memory.kept(SETTINGS | {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=9000000000", "PATH": ""})
    assert not kept_memory.kept({"GLIBC_TUNABLES": told.replace("mmap_max=0", "mmap_max=9")})
    assert not kept_memory.kept(SETTINGS | {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"}), "tunables count first"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_glibc_takes_tunables_before_variables():
    """What `kept` says of a process is what its pages say: with neither, with both, and where the two differ."""
    off = {name: value for name, value in os.environ.items() if name not in (*SETTINGS, "GLIBC_TUNABLES")}
    told = ":".join(f"{tunable}={SETTINGS[name]}" for tunable, name in kept_memory.TUNABLES.items())
    for given in ({"GLIBC_TUNABLES": told}, SETTINGS | {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=65536"}):
        done = subprocess.run(
            [sys.executable, "-c", FAULTS, str(IN_NO_ARENA)],
            env=off | given,
            capture_output=True,
            text=True,
            check=True,
        )
        kept = int(done.stdout.split()[-1]) < 100
        assert kept == kept_memory.kept(given)


def test_what_is_advised_and_when(started):
    started({})
    advice = kept_memory.advice(LARGE)
    assert advice.startswith("each call takes 100 MiB from the system anew")
    assert TYPED in advice
    assert "may be quicker" in advice
    assert kept_memory.advice(KEPT_BYTES) == ""
    assert "above 32 MiB given back" in kept_memory.told()
    started(SETTINGS)
    assert kept_memory.advice(LARGE) == ""
    assert kept_memory.told().startswith("kept from call to call")
    started({}, "this is another C library")
    assert kept_memory.advice(LARGE) == ""
    assert "since this is another C library" in kept_memory.told()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere pages are counted in other ways")
def test_pages_that_a_call_touches_first_are_counted():
    held = []

    def taking():
        held.append(mmap.mmap(-1, 2**22))
        held[-1].madvise(mmap.MADV_NOHUGEPAGE)  # one of which would count as one
        held[-1].write(b"x" * 2**22)

    def reusing():
        held[0].seek(0)
        held[0].write(b"y" * 2**22)

    assert 2**22 <= kept_memory.touched_anew(taking) < 2**23

    assert kept_memory.touched_anew(reusing) < 2**21


def test_where_the_settings_do_nothing(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.39"))
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    assert kept_memory.unavailable() == ""
    monkeypatch.setenv("LD_PRELOAD", "libjemalloc.so.2")
    assert "another malloc" in kept_memory.unavailable()
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert "glibc" in kept_memory.unavailable()


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="no /proc/self/environ to see the start from")
def test_what_is_set_after_the_start_does_not_count():
    code = "import os\nfrom perfkit.measure import kept_memory\nos.environ |= kept_memory.SETTINGS\n"
    command = [sys.executable, "-c", f"{code}print(kept_memory.kept())"]
    without = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    for variables, kept in ((without, "False"), (without | SETTINGS, "True")):
        assert subprocess.run(command, env=variables, capture_output=True, text=True).stdout.strip() == kept


@pytest.mark.skipif(bool(kept_memory.unavailable()), reason="not glibc's malloc")
def test_a_large_piece_is_touched_anew_in_each_call_unless_it_is_kept():
    """In a thread, as XLA does it."""

    def faults(variables):
        command = [sys.executable, "-c", FAULTS, str(IN_NO_ARENA)]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
        return list(map(int, done.stdout.split()))

    without = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    for absent in SETTINGS:
        first, *later = faults(without | {name: value for name, value in SETTINGS.items() if name != absent})
        assert min(later) > first / 2
    first, *later = faults(without | SETTINGS)
    assert max(later) < first / 10
