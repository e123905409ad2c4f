"""The recurrent CPU kernel on every instruction path; what the processor lacks is replaced by what its manual says."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch
from rnn_cpu_calls import MODES, Case, assert_is_torch

from perfkit.kernels import _native
from perfkit.kernels.rnn import cpu_kernel
from perfkit.measure._hardware import cpu

if _native.find_compiler() is None:
    pytest.skip("no C++ compiler is installed", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("threads")

BF16 = """
#include <immintrin.h>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#undef __AVX512BF16__
#define __AVX512BF16__ 1
inline float widened_alone(std::uint16_t half) {
    const std::uint32_t word = std::uint32_t(half) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}
inline __m512 emulated_dpbf16(__m512 sums, __m512bh a, __m512bh b) {
    float sum[16];
    std::uint16_t x[32], y[32];
    std::memcpy(sum, &sums, 64), std::memcpy(x, &a, 64), std::memcpy(y, &b, 64);
    for (int i = 31; i >= 0; --i) sum[i / 2] += widened_alone(x[i]) * widened_alone(y[i]);
    std::memcpy(&sums, sum, 64);
    return sums;
}
inline __m256bh emulated_cvtneps(__m512 x) {
    std::uint32_t word[16];
    std::uint16_t half[16];
    std::memcpy(word, &x, 64);
    for (int i = 0; i < 16; ++i)
        half[i] = (word[i] & 0x7fffffff) > 0x7f800000 ? (word[i] >> 16) | 0x40
                                                      : (word[i] + 0x7fff + ((word[i] >> 16) & 1)) >> 16;
    __m256bh result;
    std::memcpy(&result, half, 32);
    return result;
}
#define _mm512_dpbf16_ps emulated_dpbf16
#define _mm512_cvtneps_pbh emulated_cvtneps
"""
TILES = """
#undef __AMX_TILE__
#undef __AMX_BF16__
#define __AMX_TILE__ 1
#define __AMX_BF16__ 1
#define PERFKIT_TILES_EMULATED
struct Tiles {
    std::uint8_t shape[64] = {1};  // others' shape: tiles without rows
    std::uint8_t of[8][16][64];
};
inline thread_local Tiles tiles_of_thread;
inline Tiles& shaped_tiles() {
    if (tiles_of_thread.shape[48] != 16) std::abort();  // real ones would be an illegal instruction
    return tiles_of_thread;
}
inline void emulated_loadconfig(const void* config) {
    const auto* bytes = static_cast<const std::uint8_t*>(config);
    const bool others = bytes[48] == 0;
    for (int tile = 0; tile < 8 && !others; ++tile)
        if (bytes[0] != 1 || bytes[1] != 0 || bytes[16 + 2 * tile] != 64 || bytes[48 + tile] != 16) std::abort();
    std::memcpy(tiles_of_thread.shape, config, 64);
}
inline void emulated_storeconfig(void* to) {
    if (tiles_of_thread.shape[48] != 0) std::abort();  // what others had shaped was not put back
    std::memcpy(to, tiles_of_thread.shape, 64);
}
inline void emulated_loadd(int tile, const void* base, long stride) {
    for (int row = 0; row < 16; ++row)
        std::memcpy(shaped_tiles().of[tile][row], static_cast<const char*>(base) + row * stride, 64);
}
inline void emulated_stored(int tile, void* base, long stride) {
    for (int row = 0; row < 16; ++row)
        std::memcpy(static_cast<char*>(base) + row * stride, shaped_tiles().of[tile][row], 64);
}
inline void emulated_dpbf16ps(int c, int a, int b) {
    static const bool wrong = std::getenv("PERFKIT_TEST_WRONG_TILES") != nullptr;
    Tiles& tiles = shaped_tiles();
    for (int m = 0; m < 16; ++m) {
        float sum[16];
        std::uint16_t x[32], y[32];
        std::memcpy(sum, tiles.of[c][m], 64), std::memcpy(x, tiles.of[a][m], 64);
        for (int k = 0; k < 16; ++k) {
            std::memcpy(y, tiles.of[b][k], 64);
            for (int n = 0; n < 16; ++n)
                for (int i = 0; i < 2; ++i) sum[n] += widened_alone(x[2 * k + i]) * widened_alone(y[2 * n + i]);
        }
        if (wrong) sum[3] += 1;
        std::memcpy(tiles.of[c][m], sum, 64);
    }
}
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated_loadconfig
#define _tile_storeconfig emulated_storeconfig
#define _tile_release() (void)std::memset(tiles_of_thread.shape, 0, 64)
#define _tile_zero(tile) (void)std::memset(shaped_tiles().of[tile], 0, 1024)
#define _tile_loadd emulated_loadd
#define _tile_stored emulated_stored
#define _tile_dpbf16ps emulated_dpbf16ps
"""
VARIANTS = {
    "AMX-BF16, AVX512-BF16, AVX-512": (BF16 + TILES, (), "avx512f"),
    "AVX2": ("", ("-mno-avx512f",), "avx2"),
    "plain C++": ("", ("-march=x86-64",), ""),
}
"""What is written before the kernel, the compiler's flags, and what the processor must have all the same."""
X86 = platform.machine() in ("x86_64", "AMD64")
PRODUCT = """
#include "rnn/cpu_core.hpp"
using perfkit::Low;
template void perfkit::product<4, Low>(const Low*, i64, const Low*, i64, i64, bool, const float*, i64, float*, i64);
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
    """The kernel for other instructions, by a fast compilation."""
    before, flags, _ = VARIANTS[name]
    source = folder / "variant" / "cpu_kernel.cpp"
    source.parent.mkdir(exist_ok=True)
    source.write_text(f'{before}\n#include "{cpu_kernel.SOURCE}"\n')
    return _native.load(source, (*cpu_kernel.FLAGS, "-O1", *flags))


def needs_processor_of(name):
    feature = VARIANTS[name][2]
    if not X86 or (feature and feature not in cpu()[1]):
        pytest.skip(f"a CPU without {feature or 'x86 instructions'}")


@pytest.mark.parametrize("name", VARIANTS)
def test_every_instruction_path(name, tmp_path, monkeypatch):
    """Each path of the kernel as it stands, what the processor may lack replaced by what the manual says."""
    needs_processor_of(name)
    library = variant(name, tmp_path)
    monkeypatch.setattr(cpu_kernel, "library", lambda: library)
    assert cpu_kernel.instructions() == name
    for mode in MODES:
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
    name = next(iter(VARIANTS))
    needs_processor_of(name)
    path = variant(name, tmp_path)._name
    found = [
        subprocess.check_output([sys.executable, "-c", WRONG, path], text=True, env=os.environ | more)
        for more in ({}, {"PERFKIT_TEST_WRONG_TILES": "1"})
    ]
    assert [line.strip() for line in found] == [name, "AVX512-BF16, AVX-512"]


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
