"""A quantized nn.LSTM, nn.GRU or nn.RNN has the interface it had, nearly its numbers, and no float weights."""

import copy
import io
import pickle
import subprocess
import sys

import pytest

pytest.importorskip("torch")

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

from perfkit import InvalidInputError, UnsupportedError
from perfkit.backends.torch_surgery import around_forward
from perfkit.kernels import _native
from perfkit.kernels.rnn_int8 import torch_op
from perfkit.quantization.torch_rnn_int8 import is_quantized, quantize_rnn, refusal

if _native.find_compiler() is None:
    pytest.skip("no C++ compiler is installed", allow_module_level=True)

CELLS = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "tanh": nn.RNN,
    "relu": lambda *args, **options: nn.RNN(*args, nonlinearity="relu", **options),
}
OPTIONS = [
    {},
    {"num_layers": 2},
    {"bidirectional": True},
    {"batch_first": True},
    {"bias": False},
    {"num_layers": 3, "bidirectional": True, "batch_first": True, "dropout": 0.5},
]
CLOSE = 3e-2
"""Relative error, in the 2-norm, over whole sequences. Rounding to 1/127 of the largest number m errs by m / 440 (root
mean square), relative to the numbers' own: 0.4 % for uniform weights, 0.6 % for normal inputs, 1.1 % for hidden states
of 0.2 against their static scale. Independent of each other, that is 1.3 % of a gate; what a step passes to the next
shrinks at this initialization, so that it about doubles at the most."""


def pair(cell="lstm", inputs=10, hidden=50, **options):
    torch.manual_seed(0)
    model = CELLS[cell](inputs, hidden, **options).eval()
    small = copy.deepcopy(model)
    quantize_rnn(small)
    return model, small


def leaves(outputs):
    out, states = outputs
    return [getattr(out, "data", out), *(states if isinstance(states, tuple) else (states,))]


def assert_close(expected, found, tolerance=CLOSE):
    for a, b in zip(leaves(expected), leaves(found), strict=True):
        assert a.shape == b.shape
        assert b.dtype == torch.float32
        assert (a - b).norm() <= tolerance * a.norm()


def assert_equal(expected, found):
    assert all(torch.equal(a, b) for a, b in zip(leaves(expected), leaves(found), strict=True))


def states(model, batch, unbatched=False):
    shape = (model.num_layers * (1 + model.bidirectional), batch, model.hidden_size)
    h, c = torch.empty(shape).uniform_(-1, 1), torch.randn(shape)
    h, c = (h[:, 0], c[:, 0]) if unbatched else (h, c)
    return (h, c) if isinstance(model, nn.LSTM) else h


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_every_option(cell, options):
    model, small = pair(cell, **options)
    x = torch.randn(12, 3, 10)
    assert_close(model(x), small(x))
    hx = states(model, 12 if model.batch_first else 3)
    assert_close(model(x, hx), small(x, hx))
    hx = states(model, 1, unbatched=True)
    assert_close(model(x[:, 0], hx), small(x[:, 0], hx))
    assert_close(model(x[:, 0]), small(x[:, 0]))


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (100, 128, 64, 6), (20, 130, 3, 1), (4, 50, 1, 100)], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_every_size(cell, sizes):
    inputs, hidden, batch, steps = sizes
    model, small = pair(cell, inputs, hidden)
    x = torch.randn(steps, batch, inputs)
    assert_close(model(x), small(x))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_an_empty_batch_gives_an_empty_result(cell, options):
    model, small = pair(cell, **options)
    x = torch.randn(0, 12, 10) if model.batch_first else torch.randn(12, 0, 10)
    assert_close(model(x), small(x))
    assert_close(model(x, states(model, 0)), small(x, states(model, 0)))


@pytest.mark.parametrize("cell", CELLS)
def test_input_need_not_be_contiguous_nor_float32(cell):
    _, small = pair(cell)
    x = torch.randn(10, 3, 12).transpose(0, 2)
    assert_equal(small(x.contiguous()), small(x))
    every_other = torch.randn(12, 6, 20)[:, ::2, ::2]
    assert_equal(small(every_other.contiguous()), small(every_other))
    low = x.bfloat16()
    assert_equal(small(low.float()), small(low))


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_packed_sequences(cell, options):
    model, small = pair(cell, **options)
    sequences = [torch.randn(length, 10) for length in (3, 12, 7, 7, 1)]
    packed = pack_sequence(sequences, enforce_sorted=False)
    hx = states(model, 5)
    assert_close(model(packed), small(packed))
    assert_close(model(packed, hx), small(packed, hx))
    out, lengths = pad_packed_sequence(small(packed)[0])
    assert lengths.tolist() == [3, 12, 7, 7, 1]
    for i, sequence in enumerate(sequences):  # no bit of another row, nor of padding, is in it
        assert torch.equal(out[: len(sequence), i], small(sequence)[0])


def test_sorted_packed_sequences_agree_with_padded_ones():
    _, small = pair("gru", batch_first=True)
    x, lengths = torch.randn(3, 8, 10), torch.tensor([8, 8, 5])
    packed = pack_padded_sequence(x, lengths, batch_first=True)
    out, _ = pad_packed_sequence(small(packed)[0], batch_first=True)
    assert torch.equal(out[:2], small(x)[0][:2])
    assert torch.equal(out[2, :5], small(x)[0][2, :5])


def test_initial_states_outside_of_the_unit_interval_are_not_clipped():
    for cell in CELLS:
        model, small = pair(cell, num_layers=2)
        x, hx = torch.randn(4, 3, 10), states(model, 3)
        hx = (hx[0] * 5, hx[1]) if cell == "lstm" else hx * 5
        assert_close(model(x, hx), small(x, hx))


@pytest.fixture
def checked(monkeypatch):
    """The calls that were looked at as if there had been none before."""
    calls, own = [], torch_op._check
    monkeypatch.setattr(torch_op, "_check", lambda *given: calls.append(given) or own(*given))
    monkeypatch.setattr(torch_op, "_direct", {})
    return calls


@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_the_second_call_is_made_at_once(checked, cell, options, states):
    _, small = pair(cell, inputs=5, hidden=18, **options)
    x = torch.randn(3, 3, 5)
    directions = small.num_layers * (2 if small.bidirectional else 1)
    given = torch.randn(2, directions, 3, 18).unbind() if states else None
    hx = given if cell == "lstm" or given is None else given[0]
    with torch.no_grad():
        first, second, third = (small(each, hx) for each in (x, x, x.transpose(0, 1).contiguous().transpose(0, 1)))
    assert len(checked) == 2, "x lies in two ways"
    for other in (second, third):
        assert all(map(torch.equal, leaves(first), leaves(other)))


def test_what_changed_since_the_last_call_is_seen(checked):
    (_, small), (_, other), x = pair(), pair(), torch.randn(6, 2, 10)
    with torch.no_grad():
        before = small(x)
        other.scale_hh_l0.mul_(2)
        small.load_state_dict(other.state_dict())
        assert not torch.equal(small(x)[0], before[0])
        assert all(map(torch.equal, leaves(small(x)), leaves(other(x))))
        small.input_scale.fill_(1e-3)
        assert not torch.equal(small(x)[0], other(x)[0])
        assert len(checked) == 1
    with torch.enable_grad(), pytest.raises(RuntimeError, match="no autograd formula"):
        small(x.clone().requires_grad_())[0].sum().backward()
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        small(x)
    assert "perfkit::rnn_int8" in {event.key for event in profile.key_averages()}
    with torch.no_grad():
        kept = small.packed_hh_l0
        for wrong in (kept[:-1], kept.view(torch.uint8), kept.repeat_interleave(2)[::2]):
            small.packed_hh_l0 = wrong
            with pytest.raises(InvalidInputError, match="packed_hh of direction 0"):
                small(x)


def test_a_static_input_scale_clips():
    torch.manual_seed(0)
    model = nn.LSTM(10, 50).eval()
    small = copy.deepcopy(model)
    quantize_rnn(small, input_scale=1 / 127)
    x = torch.empty(12, 3, 10).uniform_(-1, 1)
    assert_close(model(x), small(x))
    assert_close(model((9 * x).clamp(-1, 1)), small(9 * x))
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InvalidInputError, match="expected a positive number"):
            quantize_rnn(model, input_scale=wrong)
    assert not is_quantized(model)


@pytest.mark.parametrize("cell", CELLS)
def test_it_is_still_what_it_was_with_a_fourth_of_the_weights(cell):
    model, small = pair(cell, 100, 128, num_layers=2)
    assert type(small) is not type(model)
    assert isinstance(small, type(model))
    assert repr(small) == repr(model)
    assert is_quantized(small)
    assert not list(small.parameters())

    def size(module):
        return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())

    assert size(model) / size(small) >= 3.5
    assert {tensor.dtype for tensor in small.buffers()} == {torch.int8, torch.float32}
    float_matrices = [
        name for name, tensor in small.named_buffers() if tensor.dtype == torch.float32 and tensor.dim() > 1
    ]
    assert float_matrices == []


@pytest.mark.parametrize("cell", CELLS)
def test_copies_and_state_dicts(cell):
    _, small = pair(cell, num_layers=2, bidirectional=True)
    x = torch.randn(5, 3, 10)
    expected = small(x)
    duplicate = copy.deepcopy(small)
    assert_equal(expected, duplicate(x))
    assert_equal(expected, pickle.loads(pickle.dumps(small))(x))
    for buffer in duplicate.buffers():
        buffer.zero_()
    assert not duplicate(x)[0].any()
    assert_equal(expected, small(x))

    file = io.BytesIO()
    torch.save(small.state_dict(), file)
    file.seek(0)
    torch.manual_seed(1)
    other = CELLS[cell](10, 50, num_layers=2, bidirectional=True).eval()
    quantize_rnn(other)
    assert not torch.equal(other(x)[0], expected[0])
    other.load_state_dict(torch.load(file))
    assert_equal(expected, other(x))


def test_a_copy_keeps_what_was_put_around_it():
    _, small = pair()
    around_forward(small, lambda forward: lambda module, x: (forward(module, x)[0] + 1, None))
    x = torch.randn(5, 3, 10)
    assert torch.equal(copy.deepcopy(small)(x)[0], small(x)[0])


def test_scales_stay_in_float32():
    _, small = pair()
    x = torch.randn(5, 3, 10)
    expected = small(x)
    for cast in (nn.Module.half, nn.Module.bfloat16, nn.Module.double):
        assert_equal(expected, cast(small)(x))
    assert small.to("meta").scale_ih_l0.device.type == "meta"


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_torch_compile(packed):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.before, self.rnn, self.after = nn.Linear(10, 10), nn.GRU(10, 50, 2, batch_first=True), nn.Linear(50, 2)

        def forward(self, x):
            x = torch.relu(self.before(x))
            if packed:
                x = pack_padded_sequence(x, torch.tensor([4, 9, 1]), batch_first=True, enforce_sorted=False)
            return self.after(self.rnn(x)[1][-1])

    torch.manual_seed(0)
    model = Model().eval()
    quantize_rnn(model.rnn)
    x = torch.randn(3, 9, 10)
    expected, found = model(x), torch.compile(model)(x)
    # Inductor may round the linears otherwise: one step of int8 in some inputs is what can come of it
    assert (expected - found).norm() <= 1e-2 * expected.norm()


def test_torch_export_keeps_the_operator():
    _, small = pair("lstm", num_layers=2)
    x = torch.randn(5, 3, 10)
    program = torch.export.export(small, (x,))
    assert "perfkit.rnn_int8" in str(program.graph)
    assert_equal(small(x), program.module()(x))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.LSTM(4, 8, proj_size=2), "proj_size=2"),
        (lambda: nn.LSTM(4, 8).train(), r"training mode.*\.eval\(\)"),
        (lambda: nn.GRU(4, 8).double(), r"weights are float64: expected float32"),
        (lambda: nn.RNN(4, 8).bfloat16(), "weights are bfloat16"),
        (lambda: nn.LSTM(4, 8, device="meta"), r"it is on meta.*\.cpu\(\)"),
        (lambda: nn.Linear(4, 8), "Linear is no nn.LSTM"),
        (lambda: nn.LSTMCell(4, 8), "LSTMCell is no nn.LSTM"),
        (lambda: pair()[1], "int8 already"),
    ],
)
def test_refusals(make, reason):
    module = make()
    if "training" not in reason:
        module.eval()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(UnsupportedError, match=reason):
        quantize_rnn(module)
    assert refusal(module)
    assert list(before) == list(module.state_dict())


def test_more_refusals():
    class Own(nn.LSTM):
        def forward(self, x):
            return super().forward(x)[0]

    assert "a forward of its own" in refusal(Own(4, 8).eval())
    normed = torch.nn.utils.parametrizations.weight_norm(nn.LSTM(4, 8), "weight_hh_l0").eval()
    assert "weight_hh_l0 is computed" in refusal(normed)
    broken = nn.LSTM(4, 8).eval()
    broken.bias_hh_l0[0] = float("nan")
    assert "finite" in refusal(broken)
    assert refusal(nn.LSTM(4, 8).eval()) is None


def test_wrong_calls_are_refused_as_torch_does():
    model, small = pair()
    for args in [
        (torch.randn(5, 3, 9),),
        (torch.randn(5),),
        (torch.randn(5, 3, 10), (torch.zeros(1, 2, 50), torch.zeros(1, 3, 50))),
        (torch.randn(5, 3, 10), (torch.zeros(3, 50), torch.zeros(3, 50))),
        (torch.ones(5, 3, 10, dtype=torch.int64),),
    ]:
        for module in (model, small):
            with pytest.raises((RuntimeError, ValueError)):
                module(*args)
    with pytest.raises(UnsupportedError, match=r"cannot be trained: call \.eval"):
        small.train()(torch.randn(5, 3, 10))


WITHOUT = """
import torch, perfkit
from perfkit.quantization.torch_rnn_int8 import quantize_rnn
model = torch.nn.LSTM(4, 8).eval()
try:
    quantize_rnn(model)
except perfkit.UnsupportedError as error:
    print(error)
print(model(torch.ones(2, 3, 4))[0].shape)
"""


def test_without_a_compiler_nothing_is_changed(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setenv("PERFKIT_CACHE", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True)
    assert "needs a C++ compiler" in done.stdout
    assert "torch.Size([2, 3, 8])" in done.stdout
