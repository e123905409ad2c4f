"""The int8 recurrent kernel is its reference bit for bit, and the reference the float layer within derived bounds."""

import ctypes
import platform
import subprocess
import sys
import threading
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch

from perfkit import InvalidInputError
from perfkit.kernels import _native
from perfkit.kernels.rnn_int8 import reference, torch_op, weights
from perfkit.measure._hardware import cpu

if _native.find_compiler() is None:
    pytest.skip("no C++ compiler is installed", allow_module_level=True)

MODES = tuple(weights.GATES)
SIZES = [
    (10, 50, 3, 28),
    (1, 1, 1, 1),
    (100, 128, 64, 3),
    (33, 130, 5, 9),
    (7, 17, 2, 70),
    (4, 24, 37, 2),
    (5, 8, 1, 200),
]
"""Inputs, hidden units, batch rows, steps: ragged in each, and longer than one chunk of input parts."""


def make(mode, inputs, hidden):
    gates, bound = weights.GATES[mode], hidden**-0.5
    q_ih, scale_ih = weights.quantize(torch.empty(gates * hidden, inputs).uniform_(-bound, bound))
    q_hh, scale_hh = weights.quantize(torch.empty(gates * hidden, hidden).uniform_(-bound, bound))
    bias = torch.empty(gates * hidden).uniform_(-bound, bound)
    bias_hn = torch.empty(hidden).uniform_(-bound, bound) if mode == "GRU" else None
    return reference.Layer(mode, q_ih, scale_ih, q_hh, scale_hh, bias, bias_hn)


def tensors(layer):
    gates = weights.GATES[layer.mode]
    packed = (
        weights.pack(layer.q_ih, gates),
        layer.scale_ih,
        weights.pack(layer.q_hh, gates),
        layer.scale_hh,
        layer.bias,
    )
    return [*packed, *([layer.bias_hn] if layer.mode == "GRU" else [])]


def run(layer, x, batch_sizes, h, c, *, scale=0.0, more=(), bidirectional=False):
    """The kernel on one direction (or on those in `more` too)."""
    lstm, hidden = layer.mode == "LSTM", h.size(-1)
    parts = [part for each in (layer, *more) for part in tensors(each)]
    states = [state if state.dim() == 3 else state[None] for state in (h, c)]
    scale = torch.tensor(scale)
    return torch.ops.perfkit.rnn_int8(
        x, batch_sizes, states[0], states[1] if lstm else None, parts, layer.mode, hidden, bidirectional, False, scale
    )


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def assert_is_the_reference(mode, inputs, hidden, batch, steps, **options):
    layer = make(mode, inputs, hidden)
    # Initial states far outside of [-1, 1] too: nothing promises that they are in it.
    x, h, c = torch.randn(steps, batch, inputs), 2 * torch.randn(batch, hidden), torch.randn(batch, hidden)
    fixed = options.get("scale", 0.0)
    out, h_n, c_n = run(layer, x, None, h, c, **options)
    expected = reference.layer(x.flatten(0, 1), [batch] * steps, layer, h, c, x_fixed=fixed)
    assert torch.equal(out.flatten(0, 1), expected[0])
    assert torch.equal(h_n[0], expected[1])
    if mode == "LSTM":
        assert torch.equal(c_n[0], expected[2])
    assert out.isfinite().all()


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_the_kernel_is_the_reference(mode, sizes):
    assert_is_the_reference(mode, *sizes)


@pytest.mark.parametrize("mode", MODES)
def test_with_a_static_input_scale(mode):
    assert_is_the_reference(mode, 10, 50, 3, 28, scale=0.01)  # clips what is above 1.27


DPBUSD = """
#include <cstdint>
#include <cstring>
template <class V> V emulated(V sums, V bytes, V signed_bytes) {
    std::int32_t sum[sizeof(V) / 4];
    std::uint8_t a[sizeof(V)];
    std::int8_t b[sizeof(V)];
    std::memcpy(sum, &sums, sizeof(V)), std::memcpy(a, &bytes, sizeof(V)), std::memcpy(b, &signed_bytes, sizeof(V));
    for (unsigned i = 0; i < sizeof(V); ++i) sum[i / 4] += a[i] * b[i];
    std::memcpy(&sums, sum, sizeof(V));
    return sums;
}
#define _mm512_dpbusd_epi32 emulated
#define _mm256_dpbusd_avx_epi32 emulated
"""
VARIANTS = {
    "AVX512-VNNI": "#include <immintrin.h>\n#undef __AVX512VNNI__\n#define __AVX512VNNI__ 1\n" + DPBUSD,
    "AVX-VNNI": "#include <immintrin.h>\n#undef __AVX512VNNI__\n#undef __AVXVNNI__\n#define __AVXVNNI__ 1\n" + DPBUSD,
    "AVX2": "#undef __AVX512VNNI__\n#undef __AVXVNNI__\n",
    "plain C++": "#undef __AVX2__\n#undef __AVX512VNNI__\n",
}


@pytest.mark.skipif("avx2" not in cpu()[1], reason="a CPU without AVX2")
@pytest.mark.parametrize("name", VARIANTS)
def test_every_instruction_set_gives_the_same_bits(name, tmp_path, monkeypatch):
    """Each path of the kernel as it stands, VNNI's one instruction replaced by what its manual says that it does."""
    source = tmp_path / "variant" / "cpu_kernel.cpp"
    source.parent.mkdir()
    source.write_text(f'{VARIANTS[name]}\n#include "{torch_op.SOURCE}"\n')
    library = _native.load(source)
    library.perfkit_rnn_int8_instructions.restype = ctypes.c_char_p
    assert library.perfkit_rnn_int8_instructions().decode() == name
    monkeypatch.setattr(torch_op, "library", lambda: library)
    for mode in MODES:
        for sizes in [(10, 50, 3, 5), (33, 130, 7, 3), (1, 1, 1, 1)]:
            assert_is_the_reference(mode, *sizes)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86 instructions")
@pytest.mark.parametrize("flags", [("-mavx512f", "-mavx512vnni"), ("-mavx2", "-mavxvnni")], ids=" ".join)
def test_the_vnni_paths_compile_to_their_instruction(flags, tmp_path):
    command = (*_native.find_compiler(), "-std=c++17", "-O3", "-ffp-contract=off", "-Wno-psabi", *flags)
    command += (f"-I{_native.HEADERS}", "-S", str(torch_op.SOURCE), "-o", str(tmp_path / "kernel.s"))
    done = subprocess.run(command, capture_output=True, text=True)
    if "unrecognized" in done.stderr or "unknown argument" in done.stderr:
        pytest.skip(f"the compiler is too old for {flags[-1]}")
    assert done.returncode == 0, done.stderr
    assert "vpdpbusd" in (tmp_path / "kernel.s").read_text()


@pytest.mark.parametrize("mode", MODES)
def test_packed_rows_end_where_they_end(mode):
    lengths = [9, 7, 7, 4, 1]
    sizes = [sum(length > t for length in lengths) for t in range(9)]
    layer, h, c = make(mode, 6, 20), torch.randn(5, 20), torch.randn(5, 20)
    x = torch.randn(sum(sizes), 6)
    out, h_n, _ = run(layer, x, torch.tensor(sizes), h, c)
    expected = reference.layer(x, sizes, layer, h, c)
    assert torch.equal(out, expected[0])
    assert torch.equal(h_n[0], expected[1])


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("mode", MODES)
def test_both_directions_and_a_second_layer(mode, packed):
    batch, steps, hidden = 5, 9, 20
    sizes = [5, 5, 4, 4, 2, 1, 1, 1, 1] if packed else [batch] * steps
    x = torch.randn(sum(sizes), 6)
    layers = [make(mode, width, hidden) for width in (6, 6, 2 * hidden, 2 * hidden)]
    h, c = torch.randn(4, batch, hidden), torch.randn(4, batch, hidden)
    given = (x, torch.tensor(sizes)) if packed else (x.view(steps, batch, 6), None)
    out, h_n, c_n = run(layers[0], *given, h, c, more=layers[1:], bidirectional=True)
    floor = 0.0
    for above in (0, 2):
        both = [
            reference.layer(x, sizes, layers[i], h[i], c[i], x_floor=floor, reverse=i % 2 == 1)
            for i in (above, above + 1)
        ]
        for i, (_, h_i, c_i) in enumerate(both, start=above):
            assert torch.equal(h_n[i], h_i)
            assert mode != "LSTM" or torch.equal(c_n[i], c_i)
        x, floor = torch.cat([both[0][0], both[1][0]], 1), 0.0 if mode == "RNN_RELU" else 1.0
    assert torch.equal(out.view_as(x), x)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch", [3, 64, 150])
def test_threads_change_no_bit(mode, batch, threads):
    layer, x = make(mode, 20, 40), torch.randn(6, batch, 20)
    lengths = torch.linspace(6, 1, batch).long()
    sizes = torch.stack([(lengths > t).sum() for t in range(6)])
    found = []
    for count in (1, 2, 5):
        threads(count)
        states = torch.zeros(2, batch, 40)
        padded, packed = run(layer, x, None, *states), run(layer, x.flatten(0, 1)[: sizes.sum()], sizes, *states)
        found.append((padded[0], padded[1], packed[0], packed[1]))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_python_threads_may_call_it_at_once(threads):
    threads(2)
    layer, x, states = make("LSTM", 20, 40), torch.randn(20, 64, 20), torch.zeros(2, 64, 40)
    expected = run(layer, x, None, *states)[0]
    same = []
    callers = [
        threading.Thread(
            target=lambda: same.extend(torch.equal(run(layer, x, None, *states)[0], expected) for _ in range(5))
        )
        for _ in range(4)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert same == [True] * 20


FORKED = """
import os, warnings, torch
warnings.simplefilter("ignore")
from perfkit.quantization.torch_rnn_int8 import quantize_rnn
torch.set_num_threads(2)
model, x = torch.nn.LSTM(4, 8).eval(), torch.randn(5, 64, 4)
quantize_rnn(model)
with torch.no_grad():
    expected = model(x)[0]
    child = os.fork()
    same = torch.equal(model(x)[0], expected)
if child == 0:
    os._exit(0 if same and len(os.listdir("/proc/self/task")) == 2 else 1)
assert same and os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_a_forked_child_gets_threads_of_its_own():
    """A fork takes none along: with the parent's pool it would work alone, or wait for a lock that nobody has."""
    subprocess.run([sys.executable, "-c", FORKED], check=True, timeout=120)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode", MODES)
def test_what_is_not_finite_shows_in_its_row_alone(mode, bad):
    layer, x, states = make(mode, 6, 20), torch.randn(9, 4, 6), torch.zeros(2, 4, 20)
    clean = run(layer, x, None, *states)[0]
    x[3, 1, 2] = bad
    out = run(layer, x, None, *states)[0]
    assert out[3:, 1].isnan().all()
    assert torch.equal(out[:3], clean[:3])
    assert torch.equal(out[:, [0, 2, 3]], clean[:, [0, 2, 3]])


@pytest.mark.parametrize("mode", MODES)
def test_zeros_stay_zeros(mode):
    layer = make(mode, 6, 20)
    silent = reference.Layer(mode, layer.q_ih, layer.scale_ih, layer.q_hh, layer.scale_hh, layer.bias * 0)
    if mode == "GRU":
        silent = reference.Layer(**{**vars(silent), "bias_hn": layer.bias_hn * 0})
    out, _, _ = run(silent, torch.zeros(4, 2, 6), None, *torch.zeros(2, 2, 20))
    assert not out.any()


def test_packing_is_undone_by_unpacking():
    for mode, gates in weights.GATES.items():
        for inputs, hidden in [(1, 1), (10, 50), (3, 16), (33, 130), (4, 33)]:
            q = make(mode, inputs, hidden).q_ih
            packed = weights.pack(q, gates)
            assert packed.shape == (torch_op._packed_size(gates * hidden, inputs),)
            assert torch.equal(weights.unpack(packed, gates, hidden, inputs), q)


@pytest.mark.parametrize("hidden", [50, 128, 130])
def test_recurrent_weights_are_a_fourth(hidden):
    layer = make("LSTM", 100, hidden)
    kept = tensors(layer)
    small = sum(tensor.numel() * tensor.element_size() for tensor in kept)
    assert 4 * 4 * hidden * hidden / kept[2].numel() >= 3.5
    assert 4 * 4 * hidden * (100 + hidden + 2) / small >= 3.5  # both matrices and both biases


def test_weights_are_rounded_to_nearest():
    w = torch.randn(8, 30)
    w[3] = 0
    q, scale = weights.quantize(w)
    assert q.abs().amax(1).tolist() == [127] * 3 + [0] + [127] * 4
    # half a step, and the roundings of the division, of the scale and of this product
    assert ((q * scale[:, None] - w).abs() <= scale[:, None] * 0.5 * (1 + 127 * 2**-22)).all()


def test_exp2():
    y = torch.linspace(-31, 31, 200_001)
    exact = 2.0 ** y.double().clamp(-30, 30)
    assert ((reference.exp2(y).double() - exact).abs() / exact).max() < 3e-7
    assert reference.exp2(torch.zeros(1)) == 1
    assert reference.exp2(torch.tensor([float("nan")])).isnan()


def float_step(mode, a, u, h, c, bias_hn):
    """One step of torch's own equations, in float64, from the parts of the gates."""
    if mode == "LSTM":
        i, f, g, o = (x + y for x, y in zip(a.chunk(4, 1), u.chunk(4, 1), strict=True))
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh()
    if mode == "GRU":
        (ar, az, an), (ur, uz, un) = a.chunk(3, 1), u.chunk(3, 1)
        z = (az + uz).sigmoid()
        return (1 - z) * (an + (ar + ur).sigmoid() * (un + bias_hn)).tanh() + z * h
    return (a + u).tanh() if mode == "RNN_TANH" else (a + u).relu()


@pytest.mark.parametrize("mode", MODES)
def test_one_step_is_within_the_rounding_of_its_operands(mode):
    """|q s - x| <= s / 2 for each operand bounds each gate's error, and the cells' slopes bound the output's."""
    inputs, hidden, batch = 30, 40, 16
    gates, bound = weights.GATES[mode], hidden**-0.5
    w_ih, w_hh = (torch.empty(gates * hidden, k).uniform_(-bound, bound) for k in (inputs, hidden))
    (q_ih, s_ih), (q_hh, s_hh) = weights.quantize(w_ih), weights.quantize(w_hh)
    bias, bias_hn = torch.randn(gates * hidden) * bound, torch.randn(hidden) * bound if mode == "GRU" else None
    layer = reference.Layer(mode, q_ih, s_ih, q_hh, s_hh, bias, bias_hn)
    x, h, c = torch.randn(batch, inputs), torch.empty(batch, hidden).uniform_(-1, 1), torch.randn(batch, hidden)
    out = reference.layer(x, [batch], layer, h, c)[0]

    def exact_and_error(values, w, s_w, floor):
        values, w, s_w = values.double(), w.double(), s_w.double()
        s_v = values.abs().amax(1, keepdim=True).clamp_min(floor) / 127
        error = s_v / 2 * w.abs().sum(1) + values.abs().sum(1, keepdim=True) * s_w / 2 + w.size(1) * s_v * s_w / 4
        return values @ w.T, error

    h_floor = 0.0 if mode == "RNN_RELU" else 1.0
    (a, a_error), (u, u_error) = exact_and_error(x, w_ih, s_ih, 0.0), exact_and_error(h, w_hh, s_hh, h_floor)
    exact = float_step(mode, a + bias, u, h.double(), c.double(), bias_hn)
    error = a_error + u_error
    if mode == "LSTM":  # sigmoid's slope is at most 1/4, tanh's 1; gates are at most 1
        i, f, g, o = error.chunk(4, 1)
        error = f / 4 * c.abs() + i / 4 + g + o / 4
    elif mode == "GRU":
        r, z, n = error.chunk(3, 1)
        reset = (u.chunk(3, 1)[2] + bias_hn).abs() + u_error.chunk(3, 1)[2]
        error = z / 4 * (1 + h.abs()) + n + r / 4 * reset
    assert ((out - exact).abs() <= error + 1e-6).all()  # 1e-6: float32 in the gates
    assert (out - exact).abs().max() > error.max() / 1000, "a bound so loose that it proves nothing"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h0": torch.zeros(1, 3, 8)}, r"h0 has shape \[1, 3, 8\]: expected \[1, 2, 8\]"),
        ({"x": torch.zeros(3, 2, 5)}, "packed_ih of direction 0"),
        ({"x": torch.zeros(0, 2, 4)}, r"\[0, 2, 4\]: only its batch may be empty"),
        ({"x": torch.zeros(2, 0, 4), "batch_first": True}, "only its batch may be empty"),
        ({"x": torch.zeros(3, 2, 4, dtype=torch.float64)}, "expected torch.float32 on cpu"),
        ({"mode": "GURU"}, "'GURU': expected one of LSTM"),
        ({"x": torch.zeros(6, 4), "batch_sizes": torch.tensor([2, 3, 1])}, "never rising"),
        ({"x": torch.zeros(6, 4), "batch_sizes": torch.tensor([2, 1, 1])}, "sum to 4, and x has 6"),
    ],
)
def test_the_operator_checks_what_its_pointers_rely_on(change, message):
    layer = make("LSTM", 4, 8)
    given = {"x": torch.zeros(3, 2, 4), "batch_sizes": None, "h0": torch.zeros(1, 2, 8), "c0": None}
    given |= {"weights": tensors(layer), "mode": "LSTM", "hidden": 8, "bidirectional": False, "batch_first": False}
    with pytest.raises(InvalidInputError, match=message):
        torch.ops.perfkit.rnn_int8(**(given | change), input_scale=torch.tensor(0.0))


@pytest.mark.parametrize("mode", MODES)
def test_torch_accepts_the_operator(mode):
    """Schema, aliasing, fake shapes: what torch.compile and torch.export rely on."""
    layer = make(mode, 4, 8)
    c0 = torch.zeros(1, 2, 8) if mode == "LSTM" else None
    rest = tensors(layer), mode, 8, False, False, torch.tensor(0.0)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch_op.rnn_int8, (torch.randn(3, 2, 4), None, None, c0, *rest), test_utils=tests)
    packed = torch.randn(4, 4), torch.tensor([2, 1, 1]), torch.zeros(1, 2, 8), c0
    torch.library.opcheck(torch_op.rnn_int8, (*packed, *rest), test_utils=tests)


def test_it_has_no_gradient_and_says_so():
    x = torch.randn(3, 2, 4, requires_grad=True)
    out, _, _ = run(make("LSTM", 4, 8), x, None, *torch.zeros(2, 2, 8))
    with pytest.raises(RuntimeError, match=r"perfkit\.rnn_int8.* no autograd formula"):
        out.sum().backward()


def test_the_kernel_says_what_it_runs_on():
    assert torch_op.instructions() in ("AVX512-VNNI", "AVX-VNNI", "AVX2", "plain C++")
    assert Path(torch_op.SOURCE).exists()
