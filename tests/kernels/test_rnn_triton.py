"""The recurrent Triton kernels in the interpreter against the float64 reference; their launches and tile sizes.

What cannot be seen without a GPU: programs that run at the same time and wait for each other. Here they run one after
the other, so several parts of hidden units go step by step, and only a wavefront of whole layers waits, for what is
there already.
"""

import dataclasses
import itertools

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

import torch
import triton
import triton.language as tl
from triton_interpreter import interpreted

from perfkit import InvalidInputError
from perfkit.kernels._op import Choice
from perfkit.kernels.rnn import reference, torch_stack, triton_configuration, triton_kernel
from perfkit.kernels.rnn.cases import Case, error, numbers, tolerance
from perfkit.kernels.rnn.problem import GATES, Problem
from perfkit.kernels.rnn.triton_cells import sigmoid, tanh
from perfkit.kernels.rnn.triton_configuration import Device

ALONE_16 = {"block_h": 16, "block_k": 16, "resident": 1, "back_h": 16, "back_k": 16, "back_resident": 1}
ALONE_32 = {"block_h": 32, "block_k": 32, "resident": 1, "back_h": 32, "back_k": 32, "back_resident": 1}
RESIDENT = {"block_h": 16, "block_k": 32, "resident": 1, "back_h": 16, "back_k": 32, "back_resident": 1}
WHOLE = {"block_h": 64, "block_k": 16, "resident": 0, "back_h": 64, "back_k": 32, "back_resident": 0}
IN_TURN = {"wavefront": 0}

CASES = [
    # what is taken without a configuration: float32, W read again in each step, a launch for each
    (Case("LSTM", 1, 1, 1, 1, initial=False), {}),
    (Case("LSTM", 7, 3, 10, 50), {}),
    (Case("GRU", 2, 17, 3, 50, bidirectional=True, batch_first=True, ragged="lengths"), {}),
    (Case("RNN_TANH", 2, 3, 10, 65, ragged="packed"), {}),
    # W resident, several parts
    (Case("LSTM", 2, 3, 3, 65, layers=2, bidirectional=True, ragged="packed"), RESIDENT),
    (Case("GRU", 3, 3, 10, 50, bias=False), RESIDENT),
    (Case("RNN_RELU", 3, 3, 10, 50, layers=2, bidirectional=True, batch_first=True), RESIDENT | {"block_b": 8}),
    # one program has all hidden units
    (Case("LSTM", 7, 17, 4, 16, bidirectional=True, batch_first=True, ragged="lengths"), ALONE_16),
    (Case("LSTM", 7, 3, 4, 20, layers=2, ragged="packed", initial=False), ALONE_32 | IN_TURN),
    (Case("GRU", 7, 3, 4, 16, bidirectional=True, ragged="packed"), ALONE_16),
    (Case("RNN_TANH", 7, 3, 4, 20, ragged="lengths", bias=False), ALONE_32),
    (Case("GRU", 2, 3, 4, 50), WHOLE),
    # all layers at once
    (Case("LSTM", 7, 3, 5, 16, layers=3, ragged="lengths", batch_first=True), ALONE_16),
    (Case("LSTM", 2, 17, 5, 20, layers=3), RESIDENT | {"wavefront": 1}),
    (Case("GRU", 7, 3, 5, 16, layers=2, ragged="packed"), ALONE_16),
    (Case("GRU", 2, 3, 5, 20, layers=3, ragged="lengths", bias=False), {"wavefront": 1}),
    (Case("RNN_RELU", 2, 3, 5, 16, layers=3), ALONE_16),
    # half precision
    (Case("LSTM", 7, 3, 10, 16, layers=2, dtype="bfloat16"), ALONE_16),
    (Case("LSTM", 2, 3, 10, 20, bidirectional=True, dtype="float16", ragged="lengths"), RESIDENT),
    (Case("GRU", 7, 3, 10, 16, dtype="bfloat16", ragged="packed"), {}),
    (Case("RNN_TANH", 7, 3, 10, 16, dtype="float16"), {}),
]


def tensors(case):
    """The operator's arguments, in the case's dtype, and the gradients of its outputs."""
    given, dtype = numbers(case), getattr(torch, case.dtype)

    def tensor(array):
        return None if array is None else torch.from_numpy(array).to(dtype)

    stack = (case.layers * (2 if case.bidirectional else 1), case.batch, case.hidden)
    h0 = tensor(given.h0) if case.initial else torch.zeros(stack, dtype=dtype)
    c0 = tensor(given.c0) if case.initial else torch.zeros(stack, dtype=dtype)
    rows = None if given.rows is None else torch.from_numpy(given.rows)
    weights = [tuple(tensor(weight) for weight in direction) for direction in given.weights]
    seeds = [tensor(seed) for seed in (given.d_y, given.d_hn, given.d_cn)]
    return (tensor(given.x), rows, h0, c0 if case.mode == "LSTM" else None, weights, case.batch_first), seeds


def by_triton(case, configuration, arguments, seeds):
    """Outputs and gradients, as `torch_stack` asks the kernel for them."""
    problem = case.problem("torch", "cuda", needs_grad=True)
    choice = Choice("rnn", "triton", "asked for", configuration=tuple(configuration.items()))
    saved = torch_stack.empty_saved(problem, arguments[0])
    for each in saved:
        each.fill_(torch.nan)
    outputs = torch_stack.forward(problem, choice, *arguments, saved)
    gradients = torch_stack.backward(problem, choice, *arguments, outputs[0], saved, *seeds)
    return [given for given in outputs if given is not None], gradients, saved


def by_reference(case, arguments, seeds):
    problem = case.problem("torch")
    x, rows, h0, c0, weights, batch_first = arguments

    def leaf(tensor):
        return None if tensor is None else tensor.double().requires_grad_()

    x, h0, c0 = leaf(x), leaf(h0), leaf(c0)
    weights = [tuple(leaf(weight) for weight in direction) for direction in weights]
    outputs = reference.forward(problem, x, rows, h0, c0, weights, batch_first)
    outputs = [given for given in outputs if given is not None]
    inputs = [x, h0, *([] if c0 is None else [c0]), *itertools.chain(*weights)]
    seeds = [seed.double() for seed in seeds if seed is not None]
    return [given.detach() for given in outputs], torch.autograd.grad(outputs, inputs, seeds)


def assert_close(case, actual, expected, *, gradient):
    allowed = tolerance(case, gradient=gradient)
    for i, (mine, true) in enumerate(zip(actual, expected, strict=True)):
        found = error(case, mine.double(), true, gradient=gradient)
        assert found <= allowed, f"{'gradient' if gradient else 'output'} {i} is {found:.2g} off: {allowed:.2g} allowed"


@pytest.mark.parametrize(("case", "configuration"), CASES, ids=str)
@interpreted
def test_outputs_and_every_gradient(case, configuration):
    arguments, seeds = tensors(case)
    outputs, gradients, _ = by_triton(case, configuration, arguments, seeds)
    expected, of_expected = by_reference(case, arguments, seeds)
    assert_close(case, outputs, expected, gradient=False)
    assert_close(case, gradients, of_expected, gradient=True)


@pytest.mark.parametrize("configuration", [RESIDENT, ALONE_32, IN_TURN], ids=str)
@interpreted
def test_without_a_backward_pass_outputs_are_the_same(configuration):
    case = Case("LSTM", 3, 5, 4, 20, layers=2, ragged="lengths")
    arguments, seeds = tensors(case)
    outputs, _, _ = by_triton(case, configuration, arguments, seeds)
    alone = triton_kernel.forward(case.problem("torch", "cuda"), *arguments, None, None, None, configuration)
    for mine, same in zip(alone, outputs, strict=True):
        torch.testing.assert_close(mine, same, rtol=0, atol=0)


@interpreted
def test_gates_of_the_same_dtype_hold_the_products_of_inputs_first():
    case = Case("GRU", 3, 3, 4, 16, dtype="bfloat16")
    arguments, seeds = tensors(case)
    outputs, _, saved = by_triton(case, ALONE_16, arguments, seeds)
    problem = case.problem("torch", "cuda", needs_grad=True)
    gates = saved.gates.bfloat16().fill_(torch.nan)
    y, _, _ = triton_kernel.forward(problem, *arguments, gates, saved.cells, saved.inner, ALONE_16)
    torch.testing.assert_close(y, outputs[0], rtol=0, atol=0)
    torch.testing.assert_close(gates, saved.gates.bfloat16(), rtol=0, atol=0)


@interpreted
def test_the_backward_pass_can_be_asked_for_again():
    case = Case("LSTM", 3, 3, 4, 20, layers=2)
    arguments, seeds = tensors(case)
    outputs, gradients, saved = by_triton(case, {}, arguments, seeds)
    problem, choice = case.problem("torch", "cuda", needs_grad=True), Choice("rnn", "triton", "asked for")
    again = torch_stack.backward(problem, choice, *arguments, outputs[0], saved, *seeds)
    without = torch_stack.backward(problem, choice, *arguments, None, None, *seeds)
    for first, second, recomputed in zip(gradients, again, without, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)
        torch.testing.assert_close(first, recomputed, rtol=0, atol=0)


@pytest.mark.parametrize("batch_first", [False, True])
@interpreted
def test_tensors_that_are_not_contiguous(batch_first):
    case = Case("GRU", 3, 5, 4, 20, bidirectional=True, batch_first=batch_first)
    arguments, (d_y, d_hn, _) = tensors(case)
    plain = by_triton(case, RESIDENT, arguments, (d_y[:1, :1, :1].expand(d_y.shape).contiguous(), d_hn, None))

    def strided(tensor):
        return torch.stack([tensor, torch.full_like(tensor, torch.nan)], -1)[..., 0]

    x, rows, h0, c0, weights, _ = arguments
    weights = [tuple(strided(weight) for weight in direction) for direction in weights]
    arguments = strided(x), rows, h0.transpose(0, 2).contiguous().transpose(0, 2), c0, weights, batch_first
    other = by_triton(case, RESIDENT, arguments, (d_y[:1, :1, :1].expand(d_y.shape), strided(d_hn), None))
    for mine, same in zip((*plain[0], *plain[1]), (*other[0], *other[1]), strict=True):
        torch.testing.assert_close(mine, same)  # the library may sum in another order


@interpreted
def test_a_wavefront_that_waits_is_one_that_is_launched_step_by_step():
    case = Case("LSTM", 4, 5, 4, 16, layers=3, ragged="lengths")
    arguments, seeds = tensors(case)
    waiting = by_triton(case, ALONE_16 | {"block_b": 4}, arguments, seeds)
    stepping = by_triton(case, ALONE_16 | {"block_b": 4, "persistent": 0}, arguments, seeds)
    for mine, same in zip((*waiting[0], *waiting[1]), (*stepping[0], *stepping[1]), strict=True):
        torch.testing.assert_close(mine, same, rtol=0, atol=0)


@interpreted
def test_what_is_not_a_number_stays_so_and_in_its_row():
    case = Case("RNN_RELU", 2, 3, 4, 16)
    arguments, _ = tensors(case)
    arguments[0][0, 1] = torch.nan
    y, hn, _ = triton_kernel.forward(case.problem("torch", "cuda"), *arguments, None, None, None)
    assert y[:, 1].isnan().all()
    assert hn[:, 1].isnan().all()
    assert y[:, [0, 2]].isfinite().all()


@interpreted
def test_the_stress_test_of_waiting_runs():
    """In the interpreter nothing waits but a wavefront: see that it can fail on a GPU in `python -m bench.gpu`."""
    from perfkit.kernels.rnn.triton_stress import barrier_stress

    found = barrier_stress("cpu", steps=2, repeats=1, processors=3)
    assert [stress.kind for stress in found] == ["LSTM", "GRU", "LSTM wavefront"]
    assert all(stress.equal and stress.programs == 3 for stress in found)


@triton.jit
def activations(x, of_tanh, of_sigmoid, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(of_tanh + i, tanh(tl.load(x + i)))
    tl.store(of_sigmoid + i, sigmoid(tl.load(x + i)))


@interpreted
def test_activations_are_right_relative_to_their_size():
    size = 4096
    near = torch.logspace(-30, 1.2, size // 2)
    x = torch.cat([near, -near])
    found = torch.empty(2, size)
    activations[(1,)](x, found[0], found[1], SIZE=size)
    # e^-2x: 2 roundings; 4 more in what is made of it, doubled where 1 - e^-2x is as small as a half
    torch.testing.assert_close(found[0].double(), x.double().tanh(), rtol=8 * 2**-24, atol=0)
    # e^-x of x down to -16 also has |x| times the rounding of its argument
    torch.testing.assert_close(found[1].double(), x.double().sigmoid(), rtol=24 * 2**-24, atol=0)


DEVICES = [Device(), Device(108, 166912), Device(58, 101376), Device(304, 65536, exact_float32=True)]
PROBLEMS = [
    Problem("torch", "cuda", dtype, mode, 64, batch, 10, hidden, layers, directions, needs_grad=True)
    for dtype in ("float32", "bfloat16")
    for mode in GATES
    for batch in (1, 300)
    for hidden in (1, 50, 128, 129, 512, 1000, 4096)
    for layers, directions in ((1, 1), (6, 1), (2, 2))
]


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_programs_that_wait_for_each_other_fit_on_the_device(device):
    for problem in PROBLEMS:
        chosen = triton_configuration.configure(problem, device)
        parts = -(-problem.hidden // chosen.block_h)
        jobs = problem.layers if chosen.wavefront else problem.directions
        matrices = 2 if chosen.wavefront else 1
        assert triton_configuration.shared_bytes(problem, chosen.forward, matrices, False) <= device.shared_bytes
        assert triton_configuration.shared_bytes(problem, chosen.backward, 1, True) <= device.shared_bytes
        # else it goes step by step
        fit = parts * jobs <= device.processors or parts == 1
        assert fit or problem.hidden * jobs > 64 * device.processors, (problem, chosen)
        assert fit or not chosen.wavefront


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_what_is_read_ahead_fits_on_the_device(device):
    seen = set()
    for problem in PROBLEMS:
        chosen = triton_configuration.configure(problem, device)
        for tiles in (chosen.forward, chosen.backward):
            if not tiles.resident:
                rows = tiles.block_h * (4 if GATES[problem.mode] > 1 else 1)
                size = triton_configuration.FLOAT_BYTES[problem.dtype]
                ahead = tiles.ahead(problem)
                assert ahead * (rows + tiles.block_b) * tiles.block_k * size <= device.shared_bytes
                seen.add(ahead)
    assert seen == {1, 3}


def test_programs_have_more_rows_where_so_fewer_come_after_the_others():
    """64 programs have the rows of 1024 units: on 132 processors two tiles of rows go at once, and 64 rows are four."""
    problem = Problem("torch", "cuda", "bfloat16", "LSTM", 64, 64, 1024, 1024, needs_grad=True)
    chosen = triton_configuration.configure(problem, Device())
    assert (chosen.block_b, chosen.back_b) == (32, 32)
    assert triton_configuration.configure(dataclasses.replace(problem, batch=32), Device()).block_b == 16
    assert triton_configuration.configure(dataclasses.replace(problem, hidden=512), Device()).block_b == 16


def test_every_tile_takes_every_step_once_and_no_more_than_fit_wait():
    from perfkit.kernels.rnn.triton_launch import spans

    for parts, jobs, tiles, waits, persistent in itertools.product((1, 5, 40), (1, 2), (1, 7), (0, 1), (0, 1)):
        done = []
        for span in spans(parts, jobs, tiles, 6, bool(waits), bool(persistent), Device(processors=60)):
            assert not span.counted or parts * jobs * span.tiles <= 60
            assert span.counted or not waits or span.last - span.first == 1
            done += itertools.product(
                range(span.first_tile, span.first_tile + span.tiles), range(span.first, span.last)
            )
        assert sorted(done) == [*itertools.product(range(tiles), range(6))]
        for tile in range(tiles):
            assert [step for which, step in done if which == tile] == [*range(6)]


def test_the_step_before_in_packed_rows():
    from perfkit.kernels.rnn.triton_launch import before

    # rows of 3, 2 and 1 steps: 0 1 2 | 3 4 | 5
    earlier, later = before(torch.tensor([3, 2, 1]))
    assert earlier.tolist() == [0, 1, 2, 0, 1, 3]
    assert later.tolist() == [3, 4, 2, 5, 4, 5]


def test_candidates_begin_with_what_is_taken_and_are_configurations():
    device = Device()
    problem = Problem("torch", "cuda", "bfloat16", "LSTM", 512, 10, 128, 256, layers=6, needs_grad=True)
    found = list(triton_configuration.candidates(problem, device))
    first = triton_configuration.configure(problem, device)
    assert found[0] == first.pairs
    assert first.wavefront
    assert len(set(found)) == len(found) > 5
    for pairs in found:
        assert triton_configuration.configure(problem, device, given=dict(pairs)).pairs == pairs


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"block_q": 16}, "no tile size 'block_q'"),
        ({"block_h": 48}, "block_h is 48: expected a power of two"),
        ({"wavefront": 1}, "not of 1 layers of 1"),
    ],
)
def test_configurations_that_are_none(given, told):
    problem = Problem("torch", "cuda", "bfloat16", "LSTM", 5, 1, 1, 256)
    with pytest.raises(InvalidInputError, match=told):
        triton_configuration.configure(problem, Device(), given=given)


def test_what_is_refused():
    assert "float64" in triton_kernel.refusal(Problem("torch", "cpu", "float64", "LSTM", 1, 1, 1, 1))
    assert triton_kernel.refusal(Problem("torch", "cpu", "bfloat16", "LSTM", 1, 1, 1, 1)) is None


def test_compilations_describe_every_argument_and_target():
    found = list(triton_kernel.compilations())
    assert len({compilation.name for compilation in found}) == len(found)
    assert {target for each in found for target in each.targets} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    for each in found:
        assert set(each.signature).isdisjoint(each.constants)
        assert {*each.signature, *each.constants} == set(each.kernel.arg_names), each.name
        assert set(each.divisible) <= set(each.signature)
