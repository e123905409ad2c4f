"""C++ kernels that ship as source: built once on the machine they run on, for exactly its processor, and cached.

A kernel is a set of framework-neutral `extern "C"` functions on raw pointers, loaded with ctypes, which lets go of
Python's lock while they run. Nothing of torch or JAX is included (but in `torch_memory`), so one build serves all of
their versions.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from perfkit._errors import UnsupportedError
from perfkit.kernels._cache import cache_folder

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

HEADERS = Path(__file__).parent

FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-shared",
    "-pthread",
    # Fused multiply-adds round once where the plain operations round twice: without them every processor, and the
    # reference in the framework's own operations, gives the same bits.
    "-ffp-contract=off",
    "-Wno-psabi",
)
NATIVE = ("-march=native", "-mcpu=native", "")
"""How compilers are told to build for this processor, in order of trial: x86 and most, some on ARM, none."""

_lock = threading.Lock()


def load(source: Path, flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The shared library built from `source`, which may include the `_*.hpp` beside this file and any beside itself.

    Args:
        flags: for the compiler, beside `FLAGS`, which they come after.

    Built at the first use on a machine, in a few seconds, and kept in perfkit's cache folder under the hash of
    everything it depends on: source, headers, flags, compiler version, instruction set. `$PERFKIT_CXXFLAGS` are
    further flags, a sanitizer's for instance.

    Raises:
        UnsupportedError: no C++ compiler, or it fails, or the result cannot be kept or loaded.
    """
    with _lock:
        return _load(source, flags)


@functools.cache
def _load(source: Path, more: tuple[str, ...]) -> ctypes.CDLL:
    compiler = find_compiler()
    if compiler is None:
        given = f"CXX={os.environ['CXX']!r} is not there" if "CXX" in os.environ else "neither g++ nor clang++ is there"
        raise UnsupportedError(
            f"{source.parent.name} needs a C++ compiler once to build its kernel for this machine, and {given}: "
            "install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install) "
            "or set CXX to its path"
        )
    native, macros = _target(compiler)
    flags = (*FLAGS, *filter(None, (native,)), *more, *shlex.split(os.environ.get("PERFKIT_CXXFLAGS", "")))
    library = _folder() / f"{source.parent.name}-{_key(source, compiler, flags, macros)}.so"
    if (kept := _kept(library)) is not None:
        return kept
    with _alone(library):
        if (kept := _kept(library)) is not None:  # another process built it meanwhile
            return kept
        _build(source, library, (*compiler, *flags))
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise UnsupportedError(
            f"the kernel built from {source.name} cannot be loaded ({error}): if the folder forbids executing, "
            "set PERFKIT_CACHE to one that does not"
        ) from error


def _kept(library: Path) -> ctypes.CDLL | None:
    """None where it is not built, or damaged, by a full disk for instance: building it anew replaces it."""
    try:
        return ctypes.CDLL(str(library)) if library.exists() else None
    except OSError:
        return None


@contextmanager
def _alone(library: Path) -> Iterator[None]:
    """While no other process builds it: all that start together would, and each takes longer then.

    Where files cannot be locked they do, and the last one's stays.
    """
    lock = library.with_suffix(".lock")
    with ExitStack() as stack:
        if fcntl is not None:
            with suppress(OSError):  # also where the folder cannot be written, of which `_build` tells
                file = stack.enter_context(lock.open("w"))
                stack.callback(lock.unlink, missing_ok=True)  # whoever comes later finds the library
                fcntl.flock(file, fcntl.LOCK_EX)
                stack.callback(fcntl.flock, file, fcntl.LOCK_UN)  # what was forked meanwhile has the file open, too
        yield


def missing() -> str | None:
    """Why no C++ kernel can be built in this environment; None where one can."""
    if find_compiler() is None:
        return "there is no C++ compiler to build it with (Debian, Ubuntu: apt install g++), or CXX does not name one"
    return None


def find_compiler() -> tuple[str, ...] | None:
    """The command of the C++ compiler: `$CXX` where it is set, else g++ or clang++; None where there is none."""
    named, path = os.environ.get("CXX"), os.environ.get("PATH")
    if (known := _compilers.get((named, path))) is not None:
        return known
    for command in (named,) if named else ("g++", "clang++"):
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            return _compilers.setdefault((named, path), tuple(words))
    return None


_compilers: dict[tuple[str | None, str | None], tuple[str, ...]] = {}
"""What was found where: calls of layers ask for it, and looking through folders takes longer than a small layer."""


def _target(compiler: tuple[str, ...]) -> tuple[str, str]:
    """The flag that builds for this processor, and what the compiler then defines: its version, the instructions."""
    errors = ""
    for native in NATIVE:
        command = (*compiler, *filter(None, (native,)), "-dM", "-E", "-x", "c++", os.devnull)
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            return native, done.stdout
        errors += done.stderr
    raise UnsupportedError(f"the C++ compiler {shlex.join(compiler)} does not run: {errors.strip()}")


def _key(source: Path, compiler: tuple[str, ...], flags: tuple[str, ...], macros: str) -> str:
    digest = hashlib.sha256(repr((compiler, flags, macros)).encode())
    for file in (source, *sorted(HEADERS.glob("_*.hpp")), *sorted(source.parent.glob("*.hpp"))):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:20]


def _folder() -> Path:
    """The folder of built kernels, made if needed."""
    folder = cache_folder("native")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise UnsupportedError(
            f"{folder} for built kernels cannot be made ({error}): set PERFKIT_CACHE to a folder that can"
        ) from error
    return folder


def _build(source: Path, library: Path, command: tuple[str, ...]) -> None:
    """Build under a name of its own and move it into place whole: whoever loads it finds all of it."""
    try:
        handle, partial = tempfile.mkstemp(dir=library.parent, prefix=f".{library.stem}-", suffix=".so")
    except OSError as error:
        raise UnsupportedError(
            f"{library.parent} cannot be written ({error}): set PERFKIT_CACHE to a folder that can"
        ) from error
    os.close(handle)
    try:
        done = subprocess.run((*command, f"-I{HEADERS}", str(source), "-o", partial), capture_output=True, text=True)
        if done.returncode:
            raise UnsupportedError(
                f"{shlex.join(command)} cannot build {source.name}: {done.stderr.strip()[-2000:]}\n"
                "Install g++ 9 or clang++ 12 or newer, or set CXX to one"
            )
        os.replace(partial, library)
    finally:
        Path(partial).unlink(missing_ok=True)
