"""The CPU kernels under AddressSanitizer: no read or write outside of what they were given, on ragged sizes.

In a process of its own: the sanitizer must be loaded before Python is.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

from perfkit.kernels import _native


def _library(name: str) -> str | None:
    """A library of the compiler's, where it has that."""
    compiler = _native.find_compiler()
    if compiler is None:
        return None
    told = subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return told if Path(told).is_absolute() else None


PRELOADED = [_library("libasan.so"), _library("libstdc++.so")]
if None in PRELOADED:
    pytest.skip("the C++ compiler has no AddressSanitizer", allow_module_level=True)

FLAGS = (
    *("-fsanitize=address", "-fno-omit-frame-pointer", "-g1", "-O0"),
    # Checks are calls and not written out: kernels full of vectors take a third of the time to build.
    *("--param", "asan-instrumentation-with-call-threshold=0"),
)

SMASH = r"""
#include <cstdint>
extern "C" int64_t smash(const int64_t* numbers, int64_t count) { return numbers[count]; }
"""


def sanitized(code: str, cache: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {
        "PERFKIT_CACHE": str(cache),
        "PERFKIT_CXXFLAGS": shlex.join(FLAGS),
        "LD_PRELOAD": ":".join(PRELOADED),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "PYTHONMALLOC": "malloc",
        "OMP_NUM_THREADS": "2",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parent)


def test_kernels_stay_inside(tmp_path):
    done = sanitized("import sanitized; sanitized.main()", tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "calls under AddressSanitizer" in done.stdout


def test_the_sanitizer_is_awake(tmp_path):
    (tmp_path / "smash").mkdir()
    source = tmp_path / "smash" / "cpu_kernel.cpp"
    source.write_text(SMASH)
    code = f"""
import ctypes, pathlib
from perfkit.kernels import _native
numbers = (ctypes.c_int64 * 4)()
_native.load(pathlib.Path({str(source)!r})).smash(ctypes.byref(numbers), ctypes.c_int64(4))
"""
    done = sanitized(code, tmp_path)
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
