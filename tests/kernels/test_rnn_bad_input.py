"""What cannot be computed is refused with what was given, what was expected and what to do; never a wrong number."""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from perfkit import InvalidInputError, UnsupportedError
from perfkit.kernels.rnn import Problem, gru, lstm, rnn

CPU = "cpu"
META = "meta"


def weights(gates=4, inputs=3, hidden=5, layers=1, directions=1, dtype=torch.float32, device=CPU, bias=True):
    found = []
    for i in range(layers * directions):
        columns = inputs if i < directions else hidden * directions
        shapes = [(gates * hidden, columns), (gates * hidden, hidden)] + [(gates * hidden,)] * (2 if bias else 0)
        found.append(tuple(torch.zeros(shape, dtype=dtype, device=device) for shape in shapes))
    return found


def changed(index, tensor, **options):
    """Weights of one LSTM layer with one of them replaced."""
    (group,) = weights(**options)
    return [tuple(tensor if i == index else each for i, each in enumerate(group))]


X = torch.zeros(4, 2, 3)
STATE = torch.zeros(1, 2, 5)
GOOD = weights()

BAD = {
    "x of two dimensions": (lambda: lstm(X[0], GOOD), r"x has shape \[2, 3\]: expected \(time, batch, features\)"),
    "x of four, batch first": (lambda: lstm(X[None], GOOD, batch_first=True), r"expected \(batch, time, features\)"),
    "x of another width": (lambda: lstm(torch.zeros(4, 2, 7), GOOD), r"w_ih of layer 0 is .*\[20, 3\].*\[20, 7\]"),
    "x of integers": (lambda: lstm(X.int(), GOOD), "x is torch.int32.*expected a dense tensor of float32"),
    "x that is complex": (lambda: lstm(X.cfloat(), GOOD), "x is torch.complex64"),
    "x that is sparse": (lambda: lstm(X.to_sparse(), GOOD), "torch.sparse_coo: expected a dense tensor"),
    "no steps": (lambda: lstm(X[:0], GOOD), "a recurrent layer over 0 steps"),
    "no rows": (lambda: lstm(X[:, :0], GOOD), "a recurrent layer over 0 batch"),
    "no features": (lambda: lstm(X[..., :0], weights(inputs=0)), "a recurrent layer over 0 inputs"),
    "x of numpy": (lambda: lstm(np.zeros((4, 2, 3)), GOOD), "x is a ndarray: expected a torch tensor"),
    "no weights": (lambda: lstm(X, []), "weights are 0 groups of no tensors"),
    "three weights": (lambda: lstm(X, [GOOD[0][:3]]), "weights are 1 groups of 3 tensors"),
    "groups that differ": (lambda: lstm(X, [GOOD[0], GOOD[0][:2]]), "weights are 2 groups of 2 or 4 tensors"),
    "a projection": (lambda: lstm(X, [(*GOOD[0], STATE)]), "groups of 5 tensors.* no projections"),
    "one direction of two": (lambda: lstm(X, GOOD, bidirectional=True), "1 groups of weights.*forward and reverse"),
    "a weight that is None": (lambda: lstm(X, [(*GOOD[0][:3], None)]), "a NoneType among the weights"),
    "a GRU's weights": (lambda: lstm(X, weights(3)), r"w_ih of layer 0 is .*\[15, 3\].*\[20, 3\].*for LSTM"),
    "an LSTM's weights": (lambda: gru(X, GOOD), r"w_ih of layer 0 is .*\[20, 3\].*\[15, 3\].*for GRU"),
    "a flat w_hh": (lambda: lstm(X, changed(1, torch.zeros(100))), "over 0 hidden"),
    "a wrong w_hh": (lambda: lstm(X, changed(1, torch.zeros(19, 5))), r"w_hh of layer 0 is .*\[19, 5\].*\[20, 5\]"),
    "a wrong bias": (lambda: lstm(X, changed(3, torch.zeros(5))), r"b_hh of layer 0 is .*\[5\].*\[20\]"),
    "a second layer that does not fit": (
        lambda: lstm(X, [*GOOD, *GOOD]),
        r"w_ih of layer 1 is .*\[20, 3\].*\[20, 5\]",
    ),
    "a reverse layer that does not fit": (
        lambda: lstm(X, [*GOOD, *weights(inputs=4)], bidirectional=True),
        "w_ih of layer 0, reverse is",
    ),
    "weights of another dtype": (lambda: lstm(X.bfloat16(), GOOD), "w_ih .* torch.float32 .*expected torch.bfloat16"),
    "one weight of another dtype": (lambda: lstm(X, changed(2, torch.zeros(20).double())), "b_ih .* torch.float64"),
    "weights on another device": (lambda: lstm(X, weights(device=META)), "w_ih .* on meta: expected .* on cpu"),
    "a state on another device": (lambda: lstm(X, GOOD, STATE.to(META)), "h0 is .* on meta"),
    "h0 of two dimensions": (lambda: lstm(X, GOOD, STATE[0], STATE), r"h0 is .*\[2, 5\].*\[1, 2, 5\]"),
    "h0 of another batch": (lambda: gru(X, weights(3), STATE[:, :1]), r"h0 is .*\[1, 1, 5\].*\[1, 2, 5\]"),
    "c0 of another size": (lambda: lstm(X, GOOD, STATE, STATE[..., 1:]), r"c0 is .*\[1, 2, 4\].*\[1, 2, 5\]"),
    "h0 of another dtype": (lambda: lstm(X, GOOD, STATE.double()), "h0 is torch.float64"),
    "too few states": (lambda: lstm(X, GOOD * 2, STATE), r"w_ih of layer 1|h0 is"),
    "a length of zero": (lambda: lstm(X, GOOD, lengths=[4, 0]), "lengths from 0 to 4: expected 1 to 4.*leave out"),
    "a negative length": (lambda: lstm(X, GOOD, lengths=[4, -1]), "lengths from -1 to 4"),
    "a length beyond": (lambda: lstm(X, GOOD, lengths=torch.tensor([5, 1])), "lengths from 1 to 5: expected 1 to 4"),
    "too many lengths": (lambda: lstm(X, GOOD, lengths=[4, 4, 4]), "3 lengths for a batch of 2"),
    "lengths in a table": (lambda: lstm(X, GOOD, lengths=[[4, 4]]), r"lengths are torch.int64 \[1, 2\]"),
    "fractional lengths": (lambda: lstm(X, GOOD, lengths=[4.0, 2.5]), "lengths are torch.float32: expected integers"),
    "a mask for lengths": (lambda: lstm(X, GOOD, lengths=torch.ones(2).bool()), "lengths are torch.bool"),
    "lengths of packed rows": (
        lambda: lstm(pack_padded_sequence(X, torch.tensor([4, 2])), GOOD, lengths=[4, 2]),
        "knows its lengths",
    ),
    "a state of packed rows that is flat": (
        lambda: gru(pack_padded_sequence(X, [2, 4], enforce_sorted=False), weights(3), STATE[0, 0]),
        r"h0 is .*\[5\].*\[1, 2, 5\]",
    ),
    "states in a tuple": (lambda: lstm(X, GOOD, (STATE, STATE)), "a tuple among the weights and states"),
    "dropout above one": (lambda: lstm(X, GOOD, dropout=1.5, training=True), "dropout is 1.5: expected a probability"),
    "dropout below zero": (lambda: lstm(X, GOOD, dropout=-0.1), "dropout is -0.1"),
    "a key": (lambda: lstm(X, GOOD, key=0), "key is for JAX"),
    "an unknown nonlinearity": (lambda: rnn(X, weights(1), nonlinearity="rel"), "did you mean 'relu'"),
    "an unknown implementation": (lambda: lstm(X, GOOD, implementation="tritn"), "did you mean 'triton'"),
    "an implementation of JAX": (
        lambda: lstm(X, GOOD, implementation="pallas"),
        "no implementation 'pallas' for torch",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what):
    call, message = BAD[what]
    with pytest.raises(InvalidInputError, match=f"(?s){message}"):
        call()


@pytest.mark.parametrize("what", [what for what in BAD if what not in ("x that is sparse", "x of numpy")])
def test_bad_input_is_as_bad_under_a_transformation(what):
    """What is checked in a step of its own there is checked all the same."""
    call, _ = BAD[what]
    with pytest.raises(InvalidInputError):
        torch.vmap(lambda _: call())(torch.zeros(2))


SIZES = {
    "rising": ([1, 2], 3, "begin with the batch of 2"),
    "rising later": ([2, 1, 2], 5, "never to rise"),
    "ending with none": ([2, 2, 0], 4, "to end with 1 or more"),
    "below zero": ([2, -1], 1, "to end with 1 or more"),
    "of more rows than there are": ([2, 2], 3, "sum to x's 3 rows"),
    "of fewer rows than there are": ([2, 1], 4, "sum to x's 4 rows"),
    "of another batch": ([3, 1], 4, "begin with the batch of 2"),
}


@pytest.mark.parametrize("what", SIZES)
def test_batch_sizes(what):
    """Only a PackedSequence that was made by hand has such; a pointer would lead out of its data."""
    sizes, rows, message = SIZES[what]
    packed = PackedSequence(torch.zeros(rows, 3), torch.tensor(sizes))
    with pytest.raises(InvalidInputError, match=message):
        lstm(packed, GOOD, STATE, STATE)
    arguments = (packed.data, packed.batch_sizes, STATE, STATE, GOOD[0], "LSTM", True, False, False, False, "")
    with pytest.raises(InvalidInputError, match=message):
        torch.ops.perfkit.rnn(*arguments)


def test_after_a_good_call_a_bad_one_is_still_seen():
    """What a kind of call is found to be is remembered; numbers are no part of the kind."""
    lstm(X, GOOD, lengths=[4, 2])
    with pytest.raises(InvalidInputError, match="lengths from 2 to 5"):
        lstm(X, GOOD, lengths=[5, 2])
    lstm(X, GOOD)
    with pytest.raises(InvalidInputError, match="w_ih of layer 0"):
        lstm(X, weights(inputs=4))


def test_an_unknown_mode_of_the_operator():
    with pytest.raises(InvalidInputError, match="mode is 'lstm': expected one of LSTM"):
        torch.ops.perfkit.rnn(X, None, STATE, STATE, GOOD[0], "lstm", True, False, False, False, "")


def test_c0_without_cells():
    with pytest.raises(InvalidInputError, match="c0 was given to GRU"):
        torch.ops.perfkit.rnn(X, None, STATE, STATE, weights(3)[0], "GRU", True, False, False, False, "")


def test_a_device_without_the_kernel():
    with pytest.raises(UnsupportedError, match=r"'triton'.*it runs on cuda, and this call is on cpu"):
        lstm(X, GOOD, implementation="triton")
    with pytest.raises(UnsupportedError, match=r"'cpu'.*it runs on cpu, and this call is on meta"):
        lstm(X.to(META), weights(device=META), implementation="cpu")


def test_a_dtype_without_the_kernel():
    with pytest.raises(UnsupportedError, match="computes in float32, not in float64"):
        lstm(X.double(), weights(dtype=torch.float64), implementation="cpu")


@pytest.mark.parametrize(
    "changes",
    [{"mode": "Lstm"}, {"ragged": "length"}, {"steps": 0}, {"hidden": 0}, {"layers": 0}, {"directions": 3}],
    ids=str,
)
def test_a_problem_that_is_none(changes):
    good = {"framework": "torch", "device": "cpu", "dtype": "float32", "mode": "LSTM", "steps": 1, "batch": 1,
            "inputs": 1, "hidden": 1}  # fmt: skip
    Problem(**good)
    with pytest.raises(InvalidInputError):
        Problem(**good | changes)


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_importing_it_loads_no_framework(framework):
    if importlib.util.find_spec(framework) is None:
        pytest.skip(f"{framework} is not installed")
    code = "import sys, perfkit.kernels.rnn as found; found.OP; print(sys.argv[1] in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, framework], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
