"""Recurrent calls that are made at once, as their like was made before: whatever changes in between must be seen."""

import copy
import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("torch")

import torch
from rnn_torch_calls import FUNCTIONS, inputs

from perfkit import InvalidInputError
from perfkit.backends.torch_fused_rnn import fuse
from perfkit.backends.torch_profiler import profiled
from perfkit.kernels import _native, trace
from perfkit.kernels.rnn import lstm, torch_call
from perfkit.kernels.rnn.cases import Case, tolerance

if _native.find_compiler() is None:
    pytest.skip("no C++ compiler is installed", allow_module_level=True)

CASE = Case("LSTM", 7, 3, 10, 16)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def checked(monkeypatch):
    """The calls that were looked at as if there had been none before."""
    calls, own = [], torch_call._checked
    monkeypatch.setattr(torch_call, "_checked", lambda *given: calls.append(given) or own(*given))
    monkeypatch.setattr(torch_call, "_direct", {})
    return calls


@pytest.fixture
def module():
    """A fused nn.LSTM that has been called."""
    module = torch.nn.LSTM(10, 16)
    fuse(module)
    with torch.no_grad():
        module(torch.randn(7, 3, 10))
    return module


@pytest.fixture
def x():
    return torch.randn(7, 3, 10)


def by_library(module, x, states=None):
    """What torch's own layer makes of the module's weights as they are now: y, hn, cn."""
    with torch.no_grad():
        return lstm(x, module.all_weights, *(states or ()), implementation="library")


def assert_close(actual, expected, dtype="float32"):
    """Equal but for the roundings of two different orders of summation."""
    for one, other in zip(actual, expected, strict=True):
        most = tolerance(dataclasses.replace(CASE, dtype=dtype))
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        assert (one - other).abs().max() <= most * other.abs().max()


def assert_right(module, x):
    """The next call without gradients gives what the weights of now make of x."""
    with torch.no_grad():
        y, (hn, cn) = module(x)
    assert_close((y, hn, cn), by_library(module, x), str(x.dtype).removeprefix("torch."))


@pytest.mark.parametrize("states", [True, False])
@pytest.mark.parametrize(
    "case",
    [
        CASE,
        Case("LSTM", 9, 1, 10, 50),
        Case("LSTM", 5, 2, 4, 9, layers=2, bidirectional=True, batch_first=True),
        Case("LSTM", 5, 2, 4, 9, layers=2, bias=False),
        Case("GRU", 6, 1, 3, 17, bidirectional=True, bias=False),
        Case("GRU", 6, 1, 3, 17, dtype="bfloat16", batch_first=True),
        Case("RNN_TANH", 5, 4, 3, 8, layers=3),
        Case("RNN_RELU", 5, 1, 3, 8, dtype="bfloat16"),
    ],
    ids=str,
)
def test_the_second_call_gives_the_same_bits(checked, case, states):
    given = inputs(case)
    layout = {"batch_first": case.batch_first, "bidirectional": case.bidirectional}
    held = given.states() if states else []
    with torch.no_grad():
        first, second = (FUNCTIONS[case.mode](given.x, given.weights, *held, **layout) for _ in range(2))
    assert len(checked) == 1
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()


def test_what_is_returned_is_new_at_each_call(module, x):
    with torch.no_grad():
        y, (hn, cn) = module(x)
        before = [each.clone() for each in (y, hn, cn)]
        module(2 * x)
    assert all(torch.equal(*pair) for pair in zip(before, (y, hn, cn), strict=True))


# ---- Weights ---------------------------------------------------------------------------------------------------------


def replaced(module):
    module.weight_hh_l0 = torch.nn.Parameter(torch.randn(64, 16))


def given_other_data(module):
    module.weight_hh_l0.data = torch.randn(64, 16)


def written_to_through_data(module):
    module.weight_hh_l0.data.mul_(2)


def written_to(module):
    with torch.no_grad():
        module.bias_ih_l0.add_(1)


def trained(module):
    y, _ = module(torch.randn(7, 3, 10))
    y.square().sum().backward()
    torch.optim.SGD(module.parameters(), lr=0.1).step()


def loaded(module):
    module.load_state_dict(torch.nn.LSTM(10, 16).state_dict())


def loaded_by_assignment(module):
    module.load_state_dict(torch.nn.LSTM(10, 16).state_dict(), assign=True)


def transposed_in_memory(module):
    module.weight_hh_l0.data = torch.randn(16, 64).T


def seen_through_another_stride(module):
    """The memory that was there, read in another order."""
    module.weight_ih_l0.data = module.weight_ih_l0.data.view(10, 64).T


def negated_by_a_bit(module):
    module.weight_hh_l0.data = torch._neg_view(torch.randn(64, 16))


def made_in_inference_mode(module):
    with torch.inference_mode():
        made = torch.nn.LSTM(10, 16)
    for name, parameter in made.named_parameters():
        setattr(module, name, parameter)


CHANGES = [
    replaced,
    given_other_data,
    written_to_through_data,
    written_to,
    trained,
    loaded,
    loaded_by_assignment,
    transposed_in_memory,
    seen_through_another_stride,
    negated_by_a_bit,
    made_in_inference_mode,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_weights_are_those_of_the_call(module, x, change):
    before = by_library(module, x)
    change(module)
    assert not torch.equal(by_library(module, x)[0], before[0])
    assert_right(module, x)
    assert_right(module, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float16])
def test_another_dtype_and_back(module, x, dtype):
    module.to(dtype)
    if dtype != torch.float16:  # torch's own LSTM in float16 is another one on a CPU
        assert_right(module, x.to(dtype))
    with torch.no_grad():
        assert module(x.to(dtype))[0].dtype == dtype
    assert_right(module.float(), x)


def test_a_weight_of_another_dtype_shape_or_device_is_refused_as_ever(module, x):
    weights, kept = [list(module.parameters())], module.weight_hh_l0.data
    for wrong in (kept.bfloat16(), kept[:, :15], kept[:60], kept.to("meta"), kept.to_sparse()):
        module.weight_hh_l0 = torch.nn.Parameter(wrong)
        with torch.no_grad(), pytest.raises(InvalidInputError, match="of layer 0 is torch"):
            lstm(x, [list(module.parameters())])
    with torch.no_grad():
        for groups in ([weights[0][:2], weights[0][2:]], [weights[0][:3]], []):
            with pytest.raises(InvalidInputError):
                lstm(x, groups)
        with pytest.raises(InvalidInputError, match="torch tensors"):
            lstm(x, [[*weights[0][:3], weights[0][3].numpy()]])


def test_a_copy_has_weights_of_its_own(module, x):
    twin = copy.deepcopy(module)
    written_to_through_data(twin)
    assert_right(module, x)
    assert_right(twin, x)


# ---- What is given ---------------------------------------------------------------------------------------------------


def test_sizes_in_turn(module):
    for _ in range(2):
        for steps, batch in ((7, 3), (1, 1), (28, 1), (7, 5), (3, 7)):
            assert_right(module, torch.randn(steps, batch, 10))


def test_memory_of_any_layout_in_turn(module, x):
    for given in (x, x.transpose(0, 1).contiguous().transpose(0, 1), x.repeat_interleave(2, -1)[..., ::2], x[::2], x):
        assert_right(module, given)
        assert_right(module, given)


def test_states_of_any_layout(module, x):
    dense, spread = torch.randn(1, 3, 16), torch.randn(1, 3, 32)[..., ::2]
    for states in ((dense, dense), (spread, dense), (dense, spread), (dense, dense)):
        with torch.no_grad():
            y, (hn, cn) = module(x, states)
        assert_close((y, hn, cn), by_library(module, x, states))


def test_wrong_options_are_refused_as_ever(module, x):
    weights = module.all_weights
    with torch.no_grad():
        for _ in range(2):
            with pytest.raises(InvalidInputError, match="dropout is 2"):
                lstm(x, weights, dropout=2)
            with pytest.raises(InvalidInputError, match="key is for JAX"):
                lstm(x, weights, key=1)
            with pytest.raises(InvalidInputError, match="groups of weights"):
                lstm(x, weights, bidirectional=True)
            with pytest.raises(InvalidInputError, match="no implementation 'cup'"):
                lstm(x, weights, implementation="cup")


def test_dropout_in_training_is_drawn_at_each_call():
    module = torch.nn.LSTM(4, 6, 3, dropout=0.5)
    fuse(module)
    x = torch.randn(5, 2, 4)
    with torch.no_grad():
        module.eval()
        assert torch.equal(module(x)[0], module(x)[0])
        module.train()
        assert not torch.equal(module(x)[0], module(x)[0])
        module.eval()
        assert torch.equal(module(x)[0], module(x)[0])


# ---- Who looks on ----------------------------------------------------------------------------------------------------


def test_gradients_when_they_are_wanted_again(module, x):
    module.requires_grad_(False)
    assert not module(x)[0].requires_grad
    assert module(x.clone().requires_grad_())[0].requires_grad
    module.bias_hh_l0.requires_grad_(True)
    y, _ = module(x)
    (gradient,) = torch.autograd.grad(y.square().sum(), [module.bias_hh_l0])
    y, *_ = lstm(x, module.all_weights, implementation="reference")
    (expected,) = torch.autograd.grad(y.square().sum(), [module.bias_hh_l0])
    assert (gradient - expected).abs().max() <= tolerance(CASE, gradient=True) * expected.abs().max()
    with torch.no_grad():
        assert not module(x)[0].requires_grad


def test_inference_mode_is_that_of_the_call(module, x):
    for _ in range(2):
        with torch.inference_mode():
            y, (hn, cn) = module(x)
        assert all(each.is_inference() for each in (y, hn, cn))
        with torch.no_grad():
            outside, _ = module(x)
            assert not outside.is_inference()
            assert not module(y @ torch.randn(16, 10))[0].is_inference()  # given a tensor of inference_mode


def test_who_collects_who_computes_is_told(module, x):
    with torch.no_grad(), trace() as calls:
        module(x)
        module(x)
    assert [choice.implementation for choice in calls] == ["cpu", "cpu"]


def test_autocast_is_followed(module, x):
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                assert module(x)[0].dtype == dtype
            assert module(x)[0].dtype == torch.float32


@pytest.mark.parametrize(
    "low", [(), ("x",), ("states",), ("x", "states"), ("weights",), ("x", "states", "weights")], ids=str
)
def test_under_autocast_the_second_call_gives_the_same_bits(checked, low):
    def dtype(name):
        return torch.bfloat16 if name in low else torch.float32

    x, h0, c0 = torch.randn(7, 3, 11).to(dtype("x")), *torch.randn(2, 2, 3, 16).to(dtype("states"))
    weights = [
        tuple(each.detach() for each in group) for group in torch.nn.LSTM(11, 16, 2).to(dtype("weights")).all_weights
    ]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for states in ((h0, c0), ()):
            first, second = (lstm(x, weights, *states) for _ in range(2))
            for one, other in zip(first, second, strict=True):
                assert one.dtype == torch.bfloat16
                assert torch.equal(one, other)
    if "weights" not in low or len(low) == 3:  # weights in 16 bits alone are not what the kernel rounds for
        assert len(checked) == 2


def test_under_autocast_an_x_that_the_kernel_does_not_round_is_cast_at_each_call(module, x):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        first, second = (lstm(x.half(), module.all_weights)[0] for _ in range(2))
    assert first.isfinite().all()
    assert torch.equal(first, second)


def test_under_autocast_weights_are_those_of_the_call(module, x):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = module(x)[0]
        written_to_through_data(module)
        found = module(x)[0]
        assert not torch.equal(found, before)
        assert torch.equal(
            found, lstm(x.bfloat16(), [[w.bfloat16() for w in group] for group in module.all_weights])[0]
        )


def test_modes_and_transformations_see_an_operation(module, x):
    with torch.no_grad():
        expected = torch.stack([module(each)[0] for each in (x, 2 * x)])
        assert_close([torch.vmap(lambda each: module(each)[0])(torch.stack([x, 2 * x]))], [expected])
        with profiled(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            module(x)
        assert "perfkit::rnn" in {event.key for event in profile.key_averages()}
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert type(module(mode.from_tensor(x))[0]).__name__ == "FakeTensor"


def test_nothing_about_it_is_of_the_default_device(module, x):
    with torch.no_grad(), torch.device("meta"):
        y, (hn, cn) = module(x)
    assert_close((y, hn, cn), by_library(module, x))


def test_compiled_after_a_call(module, x):
    def run(x):
        return lstm(x, weights)

    weights = [tuple(parameter.detach() for parameter in module.parameters())]
    expected = run(x)
    torch._dynamo.reset()
    assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(x), expected)


def test_threads_at_once(module):
    given = [torch.randn(5 + i % 4, 1 + i % 3, 10) for i in range(12)]
    with torch.no_grad():
        expected = [module(x)[0] for x in given]

    def run(i):
        with torch.no_grad():
            return all(torch.equal(module(given[i])[0], expected[i]) for _ in range(50))

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(run, range(12)))
