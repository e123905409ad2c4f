"""The recurrent CPU kernel on every instruction path; what the processor lacks is replaced by what its manual says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch
from instruction_paths import EMULATED, X86, built, need
from rnn_cpu_calls import MODES, Case, assert_is_torch, assert_rounds

from perfkit.kernels import _native
from perfkit.kernels.rnn import cpu_kernel

if _native.find_compiler() is None:
    pytest.skip("no C++ compiler is installed", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("threads")

TILED = "AMX-BF16, AVX512-BF16, AVX-512"
VARIANTS = {
    TILED: (EMULATED, (), "avx512f"),
    "AVX2": ("", ("-mno-avx512f",), "avx2"),
    "plain C++": ("", ("-march=x86-64", "-DPERFKIT_LANES=4"), ""),  # in vectors as ARM's registers have them
}
"""What is written before the kernel, the compiler's flags, and what the processor must have all the same."""
PRODUCT = """
#include "rnn/cpu_products.hpp"
using perfkit::Low;
template void perfkit::product<4>(perfkit::Factors<Low> (&&)[1], i64, bool, const float*, i64, float*, i64);
"""
ON_PATHS = [
    Case(3, 21, 33, 50, 1, 1),
    Case(5, 9, 7, 17, 2, 2, "lengths", batch_first=True),
    Case(2, 1, 3, 70, 1, 2),
    Case(2, 40, 40, 40, threads=1),
    Case(4, 45, 7, 18, 2, 1, "lengths", threads=1),
    Case(3, 83, 3, 33, 1, 2, "packed", threads=1, bias=False),
]


def variant(name: str, folder: Path):
    """The kernel for other instructions."""
    before, flags, feature = VARIANTS[name]
    need(feature)
    return built(cpu_kernel, folder, before, flags)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_instruction_path(name, tmp_path, monkeypatch):
    """Each path of the kernel as it stands, what the processor may lack replaced by what the manual says."""
    library = variant(name, tmp_path)
    monkeypatch.setattr(cpu_kernel, "library", lambda: library)
    assert cpu_kernel.instructions() == name
    for mode in MODES:
        assert_rounds(mode)
        for case in ON_PATHS:
            for dtype in (torch.float32, torch.bfloat16):
                assert_is_torch(mode, case, dtype)


WRONG = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
library.perfkit_rnn_instructions.restype = ctypes.c_char_p
print(library.perfkit_rnn_instructions().decode())
"""


def test_tiles_that_multiply_wrongly_are_not_used(tmp_path, monkeypatch):
    path = variant(TILED, tmp_path)._name
    found = [
        subprocess.check_output([sys.executable, "-c", WRONG, path], text=True, env=os.environ | more)
        for more in ({}, {"PERFKIT_TEST_WRONG_TILES": "1"})
    ]
    assert [line.strip() for line in found] == [TILED, "AVX512-BF16, AVX-512"]


@pytest.mark.skipif(not X86, reason="flags of x86 compilers")
@pytest.mark.parametrize(
    ("flags", "instruction"),
    [(("-march=cooperlake",), "vdpbf16ps"), (("-march=sapphirerapids",), "tdpbf16ps"), (("-march=haswell",), "vfmadd")],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_the_paths_compile_to_their_instructions(flags, instruction, tmp_path):
    (tmp_path / "product.cpp").write_text(PRODUCT)
    command = (*_native.find_compiler(), "-std=c++17", "-O2", "-ffp-contract=fast", "-Wno-psabi", *flags)
    command += (f"-I{_native.HEADERS}", "-S", str(tmp_path / "product.cpp"), "-o", str(tmp_path / "product.s"))
    done = subprocess.run(command, capture_output=True, text=True)
    if "bad value" in done.stderr or "unknown target CPU" in done.stderr:
        pytest.skip(f"the compiler is too old for {flags[-1]}")
    assert done.returncode == 0, done.stderr
    assert instruction in (tmp_path / "product.s").read_text()


def test_it_says_what_it_runs_on():
    assert cpu_kernel.instructions() in (*VARIANTS, "AVX512-BF16, AVX-512", "AVX-512", "NEON")
