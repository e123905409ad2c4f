"""The int8 recurrent kernel is its reference bit for bit, and an operator that torch accepts."""

import pytest

pytest.importorskip("torch")

import torch
from rnn_int8_calls import MODES, assert_is_the_reference, make, run, tensors

from perfkit import InvalidInputError
from perfkit.kernels import _native
from perfkit.kernels.rnn_int8 import reference, torch_op

if _native.find_compiler() is None:
    pytest.skip("no C++ compiler is installed", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("seeded")

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


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_the_kernel_is_the_reference(mode, sizes):
    assert_is_the_reference(mode, *sizes)


@pytest.mark.parametrize("mode", MODES)
def test_every_number_of_rows_and_last_units(mode):
    """Blocks of rows, few rows whose input parts are computed for several steps, panels that are not full."""
    for batch, hidden in [*((rows, 21) for rows in range(1, 10)), (16, 16), (17, 80), (33, 70)]:
        assert_is_the_reference(mode, 5, hidden, batch, 3)


@pytest.mark.parametrize("batch", [2, 9])
@pytest.mark.parametrize("mode", MODES)
def test_states_within_their_bound(mode, batch):
    """All of one scale, which the kernel makes use of; one of them outside of it, in the last row alone; and NaN."""
    layer = make(mode, 6, 20)
    for last in (1.0, -3.0, float("nan")):
        x, h, c = torch.randn(5, batch, 6), torch.empty(batch, 20).uniform_(-1, 1), torch.randn(batch, 20)
        h[-1, 3] = last
        out, h_n, _ = run(layer, x, None, h, c)
        expected = reference.layer(x.flatten(0, 1), [batch] * 5, layer, h, c)
        assert torch.equal(out.flatten(0, 1).nan_to_num(7.0), expected[0].nan_to_num(7.0))
        assert torch.equal(h_n[0].nan_to_num(7.0), expected[1].nan_to_num(7.0))
        assert h_n[0, -1].isnan().all() == (last != last)


@pytest.mark.parametrize("mode", MODES)
def test_with_a_static_input_scale(mode):
    assert_is_the_reference(mode, 10, 50, 3, 28, scale=0.01)  # clips what is above 1.27


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
def test_vmap_is_more_rows_where_the_weights_are_the_same(mode, monkeypatch):
    built, calls = torch_op.library, []
    monkeypatch.setattr(torch_op, "library", lambda: calls.append(1) or built())
    layer, x, h, c = make(mode, 6, 20), torch.randn(5, 3, 4, 6), torch.randn(3, 4, 20), torch.randn(4, 20)
    found = torch.func.vmap(lambda x, h: run(layer, x, None, h, c), (1, 0))(x, h)
    assert calls == [1]
    packed = torch.func.vmap(lambda x, h: run(layer, x, torch.tensor([4] * 5), h, c))(
        x.transpose(0, 1).reshape(3, 20, 6), h
    )
    expected = [torch.stack(each) for each in zip(*(run(layer, x[:, i], None, h[i], c) for i in range(3)), strict=True)]
    for one, two, other in zip(found, packed, expected, strict=True):
        if mode == "LSTM" or other.numel():
            assert torch.equal(one, other)
            assert torch.equal(two.view_as(other), other)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode", MODES)
def test_what_is_not_finite_shows_in_its_row_alone(mode, bad):
    for batch in (4, 9):
        layer, x = make(mode, 6, 20), torch.randn(9, batch, 6)
        second, states = make(mode, 20, 20), torch.zeros(2, 2, batch, 20)
        clean = run(layer, x, None, *states, more=[second])[0]
        x[3, 1, 2] = bad
        out = run(layer, x, None, *states, more=[second])[0]
        assert out[3:, 1].isnan().all()
        assert torch.equal(out[:3], clean[:3])
        others = [row for row in range(batch) if row != 1]
        assert torch.equal(out[:, others], clean[:, others])


def test_a_cell_that_is_nan_makes_its_whole_row_so():
    """The kernel sees it in the hidden state alone, in one unit of many."""
    for batch in (2, 9):
        layer, x, h, c = make("LSTM", 6, 20), torch.randn(3, batch, 6), torch.zeros(batch, 20), torch.zeros(batch, 20)
        c[1, 5] = float("nan")
        out = run(layer, x, None, h, c)[0]
        assert out[0, 1].isnan().sum() == 1
        assert out[1:, 1].isnan().all()
        assert not out[:, [0]].isnan().any()


@pytest.mark.parametrize("mode", MODES)
def test_zeros_stay_zeros(mode):
    layer = make(mode, 6, 20)
    silent = reference.Layer(mode, layer.q_ih, layer.scale_ih, layer.q_hh, layer.scale_hh, layer.bias * 0)
    if mode == "GRU":
        silent = reference.Layer(**{**vars(silent), "bias_hn": layer.bias_hn * 0})
    out, _, _ = run(silent, torch.zeros(4, 2, 6), None, *torch.zeros(2, 2, 20))
    assert not out.any()


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
        ({"x": torch.zeros(3, 4), "batch_sizes": torch.tensor([2, 1, 0])}, "must be int64, positive"),
        ({"x": torch.zeros(3, 4), "batch_sizes": torch.tensor([2, 1], dtype=torch.int32)}, "must be int64, positive"),
        ({"x": torch.zeros(3, 4), "batch_sizes": torch.tensor([2, 1]), "h0": None}, "come with h0"),
        ({"c0": torch.zeros(1, 2, 8, dtype=torch.float64)}, "c0 is torch.float64 on cpu"),
        ({"c0": torch.zeros(1, 2, 4)}, r"c0 has shape \[1, 2, 4\]"),
        ({"weights": tensors(make("LSTM", 4, 8))[:-1]}, "there are 4 weights: expected 5 for each of 1 directions"),
        ({"bidirectional": True}, "there are 5 weights: expected 5 for each of 2 directions"),
        ({"weights": [each.repeat(2)[::2] for each in tensors(make("LSTM", 4, 8))]}, "expected contiguous"),
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
