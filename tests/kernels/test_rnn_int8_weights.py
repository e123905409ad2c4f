"""Weights of int8 recurrent layers: their rounding and packing, and the reference against the float layer."""

from fractions import Fraction

import pytest

pytest.importorskip("torch")

import torch
from rnn_int8_calls import MODES, make, tensors

from perfkit.kernels.rnn_int8 import reference, weights
from perfkit.kernels.rnn_int8.problem import GATES, packed_size

pytestmark = pytest.mark.usefixtures("seeded")

EXP2 = 1.1e-4
"""The relative error of the kernel's powers of 2."""


def test_packing_is_undone_by_unpacking():
    for mode, gates in GATES.items():
        for inputs, hidden in [(1, 1), (10, 50), (3, 16), (33, 130), (4, 33)]:
            q = make(mode, inputs, hidden).q_ih
            packed = weights.pack(q, gates)
            assert packed.shape == (packed_size(gates * hidden, inputs),)
            assert torch.equal(weights.unpack(packed, gates, hidden, inputs), q)


@pytest.mark.parametrize("hidden", [50, 128, 130])
def test_recurrent_weights_are_a_fourth(hidden):
    layer = make("LSTM", 100, hidden)
    kept = tensors(layer)
    small = sum(tensor.numel() * tensor.element_size() for tensor in kept)
    assert 4 * 4 * hidden * hidden / kept[2].numel() >= 3.5
    assert 4 * 4 * hidden * (100 + hidden + 2) / small >= 3.5  # both matrices and both biases


def test_the_sums_of_channels_lie_behind_their_weights():
    q = make("GRU", 10, 18).q_ih
    packed = weights.pack(q, 3)
    assert packed.numel() == packed_size(54, 10)
    assert packed[54 * 12 : 54 * 16].view(torch.int32).tolist() == q.sum(1).tolist()


def test_fused_products_and_sums_round_once():
    a, b, c = torch.randn(3, 2000)
    c[::2] *= 2**-24  # the sum decides how the product is rounded
    c[::3] *= 2.0**-40
    exact = [Fraction(x) * Fraction(y) + Fraction(z) for x, y, z in zip(*(v.tolist() for v in (a, b, c)), strict=True)]
    found = reference.fused(a, b, c)
    for value, fused in zip(exact, found, strict=True):
        nearby = (fused, fused.nextafter(torch.tensor(torch.inf)), fused.nextafter(torch.tensor(-torch.inf)))
        assert min(nearby, key=lambda number: abs(Fraction(number.item()) - value)) is fused
    assert (found != a * b + c).any(), "numbers that prove nothing"


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
    assert ((reference.exp2(y).double() - exact).abs() / exact).max() < EXP2
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
    gates, bound = GATES[mode], hidden**-0.5
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
    # A relative error e of a power moves a sigmoid by up to e / 4, a tanh by e / 2: in an LSTM f c + i g, and then o
    # tanh(c), of which the c here is at most 4.
    gates_error = EXP2 * (c.abs() / 4 + 1 / 4 + 1 / 2 + 1 / 4 + 1 / 2) if mode == "LSTM" else EXP2 * 1.5
    assert ((out - exact).abs() <= error + gates_error + 1e-6).all()  # 1e-6: float32 in the gates
    assert (out - exact).abs().max() > error.max() / 1000, "a bound so loose that it proves nothing"
