"""Recurrent layers in torch: every implementation on every case, and which of them computes."""

import dataclasses

import pytest

pytest.importorskip("torch")

import torch
from rnn_torch_calls import SOME, STACK, Layers, assert_close, call, errors, inputs, results
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from perfkit.kernels import _autotune, _native, trace
from perfkit.kernels.rnn import OP, Problem, gru, lstm, rnn
from perfkit.kernels.rnn.cases import CASES, Case, tolerance
from perfkit.kernels.rnn.problem import cudnn_is_fast

if _native.find_compiler() is None:
    pytest.skip("no C++ compiler is installed", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture
def x():
    return torch.randn(7, 3, 10)


# ---- Numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("implementation", ["cpu", "library", "reference"])
def test_forward_and_every_gradient(implementation, case):
    given = inputs(case)
    assert errors(case, results(case, given, call(case, given, implementation=implementation))) == {}


@pytest.mark.parametrize("case", SOME, ids=str)
def test_without_a_gradient_the_numbers_are_the_same(case):
    given = inputs(case)
    with torch.no_grad():
        plain = call(case, given, implementation="cpu")
    for one, other in zip(plain, call(case, given, implementation="cpu"), strict=True):
        assert not one.requires_grad
        # without a gradient the kernel brings fractions to one denominator
        assert (one - other).abs().max() <= tolerance(case) * other.abs().max()


@pytest.mark.parametrize("case", SOME, ids=str)
def test_recomputing_gives_the_same_gradients(case):
    given = inputs(case)
    outputs = call(case, given, implementation="cpu", recompute=True)
    saved = outputs[0].grad_fn.saved_tensors if case.ragged != "packed" else ()
    sizes = {tensor.shape for tensor in saved if tensor is not None}
    assert outputs[0].shape not in sizes  # neither y nor gates: what went in
    actual = results(case, given, outputs)
    expected = results(case, given, call(case, given, implementation="cpu"))
    for name, value in expected.items():
        assert (abs(actual[name] - value) <= tolerance(case) * abs(value).max()).all(), name


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_threads(threads, count):
    threads(count)
    for case in (STACK, Case("GRU", 5, 4, 3, 17, ragged="lengths"), Case("LSTM", 7, 1, 10, 50)):
        given = inputs(case)
        assert errors(case, results(case, given, call(case, given, implementation="cpu"))) == {}


@pytest.mark.parametrize("implementation", ["cpu", "library"])
def test_memory_of_any_layout(implementation):
    def strided(tensor):
        """The same numbers, every second one in memory, dimensions the other way around."""
        room = torch.zeros(*reversed(tensor.shape), 2).select(-1, 1).permute(*reversed(range(tensor.dim())))
        room.copy_(tensor.detach())
        assert room.numel() == 1 or not room.is_contiguous()
        return room.requires_grad_()

    for case in (STACK, dataclasses.replace(STACK, batch_first=True, ragged="lengths")):
        given = inputs(case)
        for name in ("x", "h0", "c0"):
            setattr(given, name, strided(getattr(given, name)))
        given.weights = [tuple(map(strided, direction)) for direction in given.weights]
        for name in ("d_y", "d_hn", "d_cn"):
            setattr(given, name, strided(getattr(given, name)).detach())
        assert errors(case, results(case, given, call(case, given, implementation=implementation))) == {}


def test_gradients_without_memory_of_their_own(x):
    """The gradient of a sum is one number, seen through strides of zero."""
    model = Layers(implementation="cpu")
    actual = torch.autograd.grad(model(x)[0].sum(), list(model.parameters()))
    model.options = {"implementation": "reference"}
    assert_close(actual, torch.autograd.grad(model(x)[0].sum(), list(model.parameters())))


def test_a_second_backward_pass_finds_what_was_saved(x):
    model = Layers(implementation="cpu")
    loss = model(x)[0].square().sum()
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(loss, list(model.parameters())), strict=True):
        assert torch.equal(one, other)


def test_outputs_that_are_not_used(x):
    model, reference = Layers(implementation="cpu"), Layers(implementation="reference")
    for pick in (0, 1, 2):
        found = [torch.autograd.grad(each(x)[pick].square().sum(), list(each.parameters()), allow_unused=True)
                 for each in (model, reference)]  # fmt: skip
        there = [(one, other) for one, other in zip(*found, strict=True) if other is not None]
        assert_close(*zip(*there, strict=True))


@pytest.mark.parametrize("given_states", [False, True])
@pytest.mark.parametrize("function", [lstm, gru])
def test_packed_in_any_order_is_padded_with_lengths(function, given_states):
    module = (torch.nn.LSTM if function is lstm else torch.nn.GRU)(4, 6, 2)
    x, lengths, count = torch.randn(5, 4, 4), torch.tensor([2, 5, 1, 3]), 2 if function is lstm else 1
    states = [torch.randn(2, 4, 6) for _ in range(count)] if given_states else []
    packed, *of_packed = function(pack_padded_sequence(x, lengths, enforce_sorted=False), module.all_weights, *states)
    y, *of_padded = function(x, module.all_weights, *states, lengths=lengths)
    assert_close([pad_packed_sequence(packed)[0], *of_packed], [y, *of_padded])
    expected, _ = module(pack_padded_sequence(x, lengths, enforce_sorted=False),
                         (tuple(states) if count == 2 else states[0]) if states else None)  # fmt: skip
    assert_close([packed.data], [expected.data])
    assert torch.equal(packed.batch_sizes, expected.batch_sizes)


def test_lengths_of_any_kind():
    x, module = torch.randn(5, 3, 4), torch.nn.GRU(4, 6)
    expected = gru(x, module.all_weights, lengths=torch.tensor([5, 1, 2]))[0]
    for lengths in ([5, 1, 2], (5, 1, 2), torch.tensor([5, 1, 2], dtype=torch.int32)):
        assert torch.equal(gru(x, module.all_weights, lengths=lengths)[0], expected)


def test_dropout_between_layers():
    module = torch.nn.LSTM(4, 6, 3)
    x, weights = torch.randn(5, 2, 4), module.all_weights
    torch.manual_seed(3)
    y, hn, cn = lstm(x, weights, dropout=0.5, training=True)
    torch.manual_seed(3)
    out, states = x, []
    for i in range(3):
        out = torch.nn.functional.dropout(out, 0.5) if i else out
        out, *state = lstm(out, weights[i : i + 1])
        states.append(state)
    assert torch.equal(y, out)
    assert torch.equal(hn, torch.cat([h for h, _ in states]))
    assert torch.equal(cn, torch.cat([c for _, c in states]))
    assert not torch.allclose(y, lstm(x, weights)[0])
    assert torch.equal(lstm(x, weights, dropout=0.5)[0], lstm(x, weights)[0])


# ---- Who computes ----------------------------------------------------------------------------------------------------


def test_the_kernel_is_first_on_a_cpu(x):
    with trace() as calls, torch.no_grad():
        Layers()(x)
        Layers()(x)  # what was found before is told again
    assert [choice.implementation for choice in calls] == ["cpu", "cpu"]
    assert dict(calls[0].refused)["triton"] == "it runs on cuda, and this call is on cpu"


def test_float64_is_the_librarys():
    with trace() as calls:
        rnn(torch.randn(3, 2, 4, dtype=torch.float64), torch.nn.RNN(4, 5, dtype=torch.float64).all_weights)
    assert calls[0].implementation == "library"
    assert "float64" in dict(calls[0].refused)["cpu"]


def test_without_a_compiler_the_library_runs_and_the_trace_says_so(monkeypatch):
    monkeypatch.setattr(_native, "find_compiler", lambda: None)
    module = torch.nn.GRU(3, 11)  # a problem that nobody has asked for
    with trace() as calls:
        gru(torch.randn(13, 2, 3), module.all_weights)
    assert calls[0].implementation == "library"
    assert "no C++ compiler" in dict(calls[0].refused)["cpu"]


def test_what_is_measured_is_believed_at_once(monkeypatch, tmp_path, x):
    monkeypatch.setenv("PERFKIT_CACHE", str(tmp_path))
    model = Layers()
    problem = Problem("torch", "cpu", "float32", "LSTM", 7, 3, 10, 16, 2, 2)
    with trace() as calls, torch.no_grad():
        model(x)
        _autotune.record("rnn", problem, {("library", ()): 1.0, ("cpu", ()): 2.0})
        model(x)
    assert [choice.implementation for choice in calls] == ["cpu", "library"]


def test_where_cudnn_is_fast():
    def problem(hidden, dtype="float16", **changes):
        return Problem("torch", "cuda", dtype, "LSTM", 10, 16, 256, hidden, **changes)

    assert cudnn_is_fast(problem(192, "bfloat16", layers=3, directions=2))
    assert not cudnn_is_fast(problem(192, "bfloat16", needs_grad=True))
    assert cudnn_is_fast(problem(128, "bfloat16", needs_grad=True))
    assert not cudnn_is_fast(problem(128, ragged="packed"))
    assert cudnn_is_fast(problem(1024))
    for outside in (problem(1152), problem(500), problem(512, "bfloat16"), problem(512, layers=2)):
        assert not cudnn_is_fast(outside)
    assert not cudnn_is_fast(dataclasses.replace(problem(512), batch=12))
    assert not cudnn_is_fast(dataclasses.replace(problem(512), inputs=100))


def test_the_public_order():
    names = [known.name for known in OP.implementations if known.framework == "torch"]
    assert names == ["triton", "cpu", "library", "reference"]
