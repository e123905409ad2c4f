"""The recurrent CPU kernel against torch's layers in float64: every cell, dtype, instruction path and division of work.

What a result may differ by: four times what torch's own layer in the same dtype differs from float64 on these numbers,
which covers how errors grow through steps and layers, and a few roundings of the largest number beside it.
"""

import math
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("torch")

import torch
from torch import nn

from perfkit.kernels import _native
from perfkit.kernels.rnn import cpu_kernel, cpu_source
from perfkit.kernels.rnn.problem import SAVED, Problem
from perfkit.measure._hardware import cpu

if _native.find_compiler() is None:
    pytest.skip("no C++ compiler is installed", allow_module_level=True)

MODES = cpu_kernel.MODES
ROUNDINGS = {torch.float32: 16, torch.bfloat16: 4, torch.float16: 4}
"""Of the largest number. float32: the kernel's exponential is exact to 3e-7, and three of them are in a cell."""


class Case(NamedTuple):
    steps: int
    batch: int
    inputs: int
    hidden: int
    layers: int = 1
    directions: int = 1
    ragged: str = "no"
    threads: int = 2
    batch_first: bool = False
    bias: bool = True


CASES = [
    Case(1, 1, 1, 1, threads=1),
    Case(5, 3, 7, 17, 2, 2, "lengths", batch_first=True),
    Case(9, 33, 10, 50, 2, 1, "packed", bias=False),
    Case(7, 5, 4, 24, 3, 2, "packed", threads=3),
    Case(6, 37, 33, 40, 2, 1, "lengths", threads=3),
    Case(30, 1, 13, 34, 3, 1, threads=3),  # the layers side by side
    Case(4, 70, 3, 65, 1, 2, threads=1),  # more rows than one slice takes
]
SHARED = [Case(5, 1, 13, 330, threads=2), Case(4, 2, 5, 330, threads=3), Case(3, 1, 7, 330, 2, 2, "no", 5)]
"""Few rows of many units: several threads share the units of one line."""


class Layer(NamedTuple):
    """A case with numbers: what torch's layer is given, and what the kernel is."""

    module: nn.Module
    problem: Problem
    x: torch.Tensor
    h0: torch.Tensor
    c0: torch.Tensor
    lengths: torch.Tensor | None
    seeds: tuple[torch.Tensor, ...]


def make(mode: str, case: Case, dtype: torch.dtype) -> Layer:
    torch.manual_seed(0)
    kind = {"LSTM": nn.LSTM, "GRU": nn.GRU}.get(mode, nn.RNN)
    options = {"nonlinearity": mode[4:].lower()} if kind is nn.RNN else {}
    steps, batch, inputs, hidden, layers, directions, ragged, *_ = case
    module = kind(
        inputs, hidden, layers, bidirectional=directions == 2, bias=case.bias, batch_first=case.batch_first, **options
    )
    module = module.to(dtype)
    x = torch.randn(batch, steps, inputs) if case.batch_first else torch.randn(steps, batch, inputs)
    lengths = None
    if ragged != "no":
        lengths = torch.randint(1, steps + 1, (batch,))
        lengths[batch // 2] = steps
        lengths = lengths.sort(descending=True).values if ragged == "packed" else lengths
    states = torch.randn(2, layers * directions, batch, hidden).to(dtype)
    problem = Problem(
        "torch", "cpu", str(dtype)[6:], mode, steps, batch, inputs, hidden, layers, directions, ragged, True
    )
    width = hidden * directions
    seeds = torch.randn(*x.shape[:-1], width), torch.randn_like(states[0]), torch.randn_like(states[0])
    return Layer(module, problem, x.to(dtype), *states, lengths, tuple(seed.to(dtype) for seed in seeds))


def by_torch(layer: Layer, dtype: torch.dtype) -> list[torch.Tensor]:
    """Outputs, final states, and the gradients of x, the initial states and each weight."""
    module, problem = layer.module, layer.problem
    weights = [weight.detach().to(dtype).requires_grad_() for weight in module.parameters()]
    named = dict(zip(dict(module.named_parameters()), weights, strict=True))
    x, h0, c0 = (tensor.detach().to(dtype).requires_grad_() for tensor in (layer.x, layer.h0, layer.c0))
    lstm, first = problem.mode == "LSTM", module.batch_first
    given = x
    if layer.lengths is not None:
        given = nn.utils.rnn.pack_padded_sequence(x, layer.lengths, first, enforce_sorted=problem.ragged == "packed")
    y, states = torch.func.functional_call(module, named, (given, (h0, c0) if lstm else h0))
    seeds = layer.seeds
    if layer.lengths is not None:
        y, _ = nn.utils.rnn.pad_packed_sequence(y, first, total_length=problem.steps)
    outputs = [y, *(states if lstm else (states,))]
    found = torch.autograd.grad(
        outputs, [x, h0, *([c0] if lstm else []), *weights], [*map(dtype_of(dtype), seeds)][: len(outputs)]
    )
    return [*(output.detach() for output in outputs), *found]


def dtype_of(dtype):
    return lambda tensor: tensor.to(dtype)


def by_kernel(layer: Layer) -> list[torch.Tensor]:
    """The same."""
    problem, module = layer.problem, layer.module
    lstm = problem.mode == "LSTM"
    weights = [tuple(weight.detach() for weight in direction) for direction in module.all_weights]
    x, rows, d_y = layer.x, layer.lengths, layer.seeds[0]
    if problem.ragged == "packed":
        packed = nn.utils.rnn.pack_padded_sequence(x, rows, module.batch_first)
        x, rows = packed.data, packed.batch_sizes
        d_y = nn.utils.rnn.pack_padded_sequence(d_y, layer.lengths, module.batch_first).data
    if problem.ragged == "lengths":
        d_y = d_y.masked_fill(padding(layer), float("nan"))  # nobody asks for it
    call = (problem, x, rows, layer.h0, layer.c0 if lstm else None, weights, module.batch_first)
    saved = empty_saved(problem, x)
    plain = cpu_kernel.forward(*call, None, None, None)
    y, hn, cn = cpu_kernel.forward(*call, *saved)
    for one, other in zip(plain, (y, hn, cn), strict=True):  # what is saved changes roundings alone
        eps = 64 * torch.finfo(x.dtype).eps
        assert one is other is None or torch.allclose(one, other, rtol=eps, atol=eps, equal_nan=True)
    d_x, d_h0, d_c0, of_weights = cpu_kernel.backward(
        *call, y, *saved, d_y, layer.seeds[1], layer.seeds[2] if lstm else None
    )
    flat = [gradient for direction in of_weights for gradient in direction[: len(weights[0])]]
    if problem.ragged == "packed":
        y, d_x = (padded(layer, data) for data in (y, d_x))
    return [y, hn, *([cn] if lstm else []), d_x, d_h0, *([d_c0] if lstm else []), *flat]


def empty_saved(problem, x):
    """Room for what the backward pass needs; what is not filled would show."""
    rows = x.size(0) if problem.ragged == "packed" else problem.steps * problem.batch
    stack, hidden = problem.layers * problem.directions, problem.hidden
    shapes = (
        (stack, rows, SAVED[problem.mode], hidden),
        (stack, rows, hidden),
        (problem.layers - 1, rows, hidden * problem.directions),
    )
    return [
        torch.full(shape, float("nan"), dtype=dtype)
        for shape, dtype in zip(shapes, (x.dtype, torch.float32, x.dtype), strict=True)
    ]


def padding(layer: Layer):
    there = torch.arange(layer.problem.steps)[:, None] < layer.lengths
    return ~(there.T if layer.module.batch_first else there)[..., None]


def padded(layer: Layer, data):
    packed = nn.utils.rnn.pack_padded_sequence(layer.x, layer.lengths, layer.module.batch_first)
    whole = nn.utils.rnn.PackedSequence(data, packed.batch_sizes)
    return nn.utils.rnn.pad_packed_sequence(whole, layer.module.batch_first, total_length=layer.problem.steps)[0]


def assert_is_torch(mode: str, case: Case, dtype: torch.dtype = torch.float32):
    torch.set_num_threads(case.threads)
    layer = make(mode, case, dtype)
    exact, yardstick, found = by_torch(layer, torch.float64), by_torch(layer, dtype), by_kernel(layer)
    for number, (result, expected, torchs) in enumerate(zip(found, exact, yardstick, strict=True)):
        allowed = 4 * (torchs.double() - expected).abs().max()
        allowed += ROUNDINGS[dtype] * torch.finfo(dtype).eps * expected.abs().max()
        assert (result.double() - expected).abs().max() <= allowed, f"result {number}"
    if layer.problem.ragged == "lengths":
        assert not found[0].masked_select(padding(layer)).any()


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", CASES + SHARED, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_torchs_layer(mode, case, dtype):
    assert_is_torch(mode, case, dtype)


@pytest.mark.parametrize("mode", MODES)
def test_float16_is_computed_in_float32(mode):
    assert_is_torch(mode, CASES[1], torch.float16)


# ---- Instruction paths -----------------------------------------------------------------------------------------------

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


# ---- Threads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("case", [*SHARED, CASES[5], Case(6, 70, 9, 40, 2, 2, "lengths")], ids=str)
def test_a_call_repeats_itself_bit_for_bit(case, threads):
    """Also with more threads than the machine has: some are late, and others do their part."""
    layer = make("LSTM", case, torch.float32)
    torch.set_num_threads(threads)
    first = by_kernel(layer)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, by_kernel(layer), strict=True))


def test_python_threads_may_call_it_at_once():
    layers = [make("LSTM", case, torch.float32) for case in (SHARED[0], CASES[2], CASES[5])]
    torch.set_num_threads(2)
    expected = [by_kernel(layer) for layer in layers]
    same = []

    def call(i):
        torch.set_num_threads(2)
        for _ in range(5):
            same.append(all(torch.equal(a, b) for a, b in zip(expected[i], by_kernel(layers[i]), strict=True)))

    callers = [threading.Thread(target=call, args=(i % 3,)) for i in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert same == [True] * 30


FORKED = """
import os, warnings, torch
warnings.simplefilter("ignore")
from perfkit.kernels.rnn import cpu_kernel, cpu_source
from perfkit.kernels.rnn.problem import Problem
torch.set_num_threads(2)
module, x, h = torch.nn.LSTM(64, 64), torch.randn(20, 64, 64), torch.zeros(1, 64, 64)
weights = [tuple(weight.detach() for weight in module.all_weights[0])]
problem = Problem("torch", "cpu", "float32", "LSTM", 20, 64, 64, 64)
run = lambda: cpu_kernel.forward(problem, x, None, h, h, weights, False, None, None, None)[0]
expected = run()
child = os.fork()
found = run()
threads = len(os.listdir("/proc/self/task"))
same = (found.numpy() == expected.numpy()).all()  # torch.equal would wait for threads of OpenMP, which a fork leaves
if child == 0:
    os._exit(0 if same and threads == 2 else 1)
assert same and os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_a_forked_child_gets_threads_of_its_own():
    subprocess.run([sys.executable, "-c", FORKED], check=True, timeout=120)


# ---- Numbers and memory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e-40], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_what_is_not_a_normal_number_does_what_it_does_in_torch(mode, bad):
    layer = make(mode, Case(6, 4, 3, 20), torch.float32)
    layer.x[2, 1, 2] = bad
    if mode != "GRU" or math.isfinite(bad):  # what a gate closes is infinity times 0 in torch, times 2^-30 here
        layer.h0[0, 3, 5] = bad
    expected, found = by_torch(layer, torch.float32)[:2], by_kernel(layer)[:2]
    for result, torchs in zip(found, expected, strict=True):
        assert torch.equal(result.isnan(), torchs.isnan())
        assert torch.equal(result.isinf(), torchs.isinf())
        there = torchs.isfinite()
        # both are exact to a few roundings, a few steps long
        assert (result[there] - torchs[there]).abs().max() <= 2**-18 * torchs[there].abs().max()


@pytest.mark.parametrize(
    ("dtype", "error"),
    [(torch.float32, 2**-22), (torch.bfloat16, 2**-9 + 2**-11)],
    ids=["float32", "bfloat16 and its rounding"],
)
def test_tanh_is_as_exact_as_it_says(dtype, error):
    """An error of e^-2x by a factor of 1 + d changes tanh(x) by at most d / 2, of the quotient by (1 - tanh(x)) d."""
    x = torch.linspace(-20, 20, 40_001).to(dtype)
    problem = Problem("torch", "cpu", str(dtype)[6:], "RNN_TANH", 1, len(x), 1, 1)
    h0, weights = torch.zeros(1, len(x), 1, dtype=dtype), torch.ones(1, 1, dtype=dtype)
    y, _, _ = cpu_kernel.forward(
        problem, x[None, :, None], None, h0, None, [(weights, weights)], False, None, None, None
    )
    assert (y.flatten().double() - x.double().tanh()).abs().max() <= error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch_first", [False, True])
def test_tensors_with_strides(dtype, batch_first):
    layer = make("LSTM", Case(5, 6, 7, 20, 2, batch_first=batch_first), dtype)
    expected = by_kernel(layer)
    gappy = torch.stack([layer.x, torch.full_like(layer.x, float("nan"))], -2).flatten(-3, -2)[:, ::2]
    for x in (gappy, layer.x.mT.contiguous().mT):
        assert not x.is_contiguous()
        assert all(map(torch.equal, by_kernel(layer._replace(x=x)), expected))
    one_row = layer.h0[:, :1].expand(-1, 6, -1)
    states = layer._replace(h0=one_row, c0=one_row)
    assert all(map(torch.equal, by_kernel(states), by_kernel(states._replace(h0=one_row.clone()))))


def test_it_says_what_it_runs_on():
    assert cpu_kernel.instructions() in (*VARIANTS, "AVX512-BF16, AVX-512", "AVX-512", "NEON")


def test_only_dtypes_that_it_computes_in():
    problem = Problem("torch", "cpu", "float64", "LSTM", 1, 1, 1, 1)
    assert cpu_source.refusal(problem) == "it computes in float32, not in float64"
