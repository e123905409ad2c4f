"""The reference is torch's layer in float64, in every option, with every gradient; and its derivatives are right."""

import pytest

pytest.importorskip("torch")

import torch
from rnn_torch_calls import FUNCTIONS, call, inputs, results

from perfkit.kernels.rnn import lstm
from perfkit.kernels.rnn.cases import CASES, ROUNDOFF, Case, error, numbers, tolerance
from perfkit.kernels.rnn.problem import GATES

EXACT = [case for case in CASES if case.dtype == "float32"]


def layer(case, given):
    """What torch's module makes of the same numbers: y, hn, and of an LSTM cn."""
    kind = {"LSTM": torch.nn.LSTM, "GRU": torch.nn.GRU}.get(case.mode, torch.nn.RNN)
    more = {"nonlinearity": case.mode[4:].lower()} if kind is torch.nn.RNN else {}
    layout = {"batch_first": case.batch_first, "bidirectional": case.bidirectional, "bias": case.bias}
    module = kind(case.inputs, case.hidden, case.layers, **layout, **more, dtype=torch.float64)
    parameters = {}
    for group, direction in zip(module.all_weights, given.weights, strict=True):
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        parameters |= {names[id(old)]: new for old, new in zip(group, direction, strict=True)}
    states = given.states()
    states = (tuple(states) if case.mode == "LSTM" else states[0]) if states else None
    x = given.x
    if case.ragged == "packed":
        x = torch.nn.utils.rnn.PackedSequence(x, given.rows)
    elif case.ragged == "lengths":
        x = torch.nn.utils.rnn.pack_padded_sequence(x, given.rows, case.batch_first, enforce_sorted=False)
    y, state = torch.func.functional_call(module, parameters, (x, states))
    if case.ragged == "lengths":
        y, _ = torch.nn.utils.rnn.pad_packed_sequence(y, case.batch_first, total_length=case.steps)
    y = y.data if case.ragged == "packed" else y
    return [y, *state] if case.mode == "LSTM" else [y, state]


@pytest.mark.parametrize("case", EXACT, ids=str)
def test_it_is_the_layer_of_torch(case):
    given = inputs(case, torch.float64)
    actual = results(case, given, call(case, given, implementation="reference"))
    expected = results(case, given, layer(case, given))
    # what is said of float32 holds of float64, with its roundings
    smaller = ROUNDOFF["float64"] / ROUNDOFF["float32"]
    for name, value in expected.items():
        gradient = name not in ("y", "hn", "cn")
        found = error(case, actual[name], value, gradient=gradient)
        most = tolerance(case, gradient=gradient) * (smaller**0.5 if gradient and case.mode == "RNN_RELU" else smaller)
        assert found <= most, name


@pytest.mark.parametrize("mode", GATES)
def test_first_and_second_derivatives(mode):
    case = Case(mode, 2, 2, 2, 3, layers=2, bidirectional=True)
    given = inputs(case, torch.float64)

    def run(x, *weights):
        groups = [weights[i : i + 4] for i in range(0, len(weights), 4)]
        return FUNCTIONS[mode](x, groups, bidirectional=True, implementation="reference")[0]

    tensors = given.x, *(weight for direction in given.weights for weight in direction)
    assert torch.autograd.gradcheck(run, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, tensors, fast_mode=True)


def test_forward_mode():
    given = inputs(Case("LSTM", 3, 2, 2, 3, initial=False), torch.float64)
    weights = [tuple(weight.detach() for weight in direction) for direction in given.weights]
    x, direction = given.x.detach(), torch.randn_like(given.x)

    def run(x):
        return lstm(x, weights, implementation="reference")[0]

    _, tangent = torch.func.jvp(run, (x,), (direction,))
    step = 1e-6  # central differences: off by its square, and by roundings over it
    expected = (run(x + step * direction) - run(x - step * direction)) / (2 * step)
    assert (tangent - expected).abs().max() < 1e-8


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_float32_rounded_once(dtype):
    case = Case("LSTM", 7, 3, 10, 50, dtype=dtype)
    outputs = call(case, inputs(case), implementation="reference")
    wide = call(case, inputs(case, torch.float32), implementation="reference")
    for narrow, exact in zip(outputs, wide, strict=True):
        assert torch.equal(narrow, exact.to(narrow.dtype))


def test_the_tolerance_is_tight_enough_to_see_a_wrong_gate():
    case = Case("LSTM", 40, 3, 10, 16)  # the longest sequence, the widest tolerance
    given = inputs(case, torch.float64)
    right = call(case, given, implementation="reference")[0].detach()
    for gate in range(4):
        with torch.no_grad():
            given.weights[0][2][gate * 16] += 1e-3  # one bias of one unit, a thousandth off
        wrong = call(case, given, implementation="reference")[0].detach()
        assert error(case, wrong, right) > tolerance(case)


def test_numbers_repeat_and_padding_is_poisoned():
    case = Case("GRU", 7, 3, 2, 4, ragged="lengths")
    first, second = numbers(case), numbers(case)
    assert (first.weights[0][0] == second.weights[0][0]).all()
    assert [int(count) for count in (first.x == first.x).all(2).sum(0)] == first.rows.tolist()
    assert max(first.rows) == 7
