"""Convolutions and linear layers by one call: what it computes, and that whatever changes or looks on is followed."""

import copy
import pickle

import pytest

pytest.importorskip("torch")

import torch
import torch.nn.functional as F
from fused_torch import Net, batch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import perfkit
from perfkit.backends import torch_fused_sequence as sequences
from perfkit.backends.torch_profiler import profiled
from perfkit.kernels import _native

if _native.find_compiler() is None:
    pytest.skip("no C++ compiler is installed", allow_module_level=True)


class Reshaped(Net):
    def forward(self, x):
        x = F.max_pool2d(torch.relu(self.conv(x)), 2)
        x = x.reshape(x.shape[0], -1)
        return self.second(F.relu(self.first(x)))


class Flat(Net):
    def forward(self, x):
        x = self.pool(self.relu(self.conv(x))).flatten(1)
        return self.second(self.first(x).relu())


class FlatFunction(Net):
    def forward(self, x):
        x = torch.flatten(self.pool(self.relu(self.conv(x))), 1)
        return self.second(self.relu(self.first(x)))


def in_line():
    net = Net()
    return nn.Sequential(net.conv, net.relu, net.pool, nn.Flatten(), net.first, nn.ReLU(), net.second)


def optimized(model, x):
    return perfkit.apply(model, "fused_kernels", example_inputs=x).model


def assert_same(new, old):
    torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [Net, Reshaped, Flat, FlatFunction, in_line])
def test_all_layers_are_one_call(kind, made):
    torch.manual_seed(0)
    model, x = kind().eval(), batch()
    result, x = optimized(model, x), batch(3)  # of another size than it was tried with
    made.clear()
    with torch.no_grad():
        for _ in range(3):
            assert_same(result(x), model(x))
    # `Flat` calls a method on what the pool makes in the same statement: there is no group that goes on
    assert made == [3] or kind is Flat


def test_what_changes_is_followed(guarded, made):
    torch.manual_seed(0)
    model, x = Net().eval(), batch()
    result = optimized(model, x)
    other = torch.randn(8, 1, 3, 3)

    def same():
        with torch.no_grad():
            for _ in range(2):
                assert_same(result(x), model(x))

    same()
    for each in (result, model):
        each.first.weight.data.mul_(0.5)
    same()
    for each in (result, model):
        each.conv.weight = nn.Parameter(other.clone())
        each.second.bias = None
    same()
    for each in (result, model):
        each.conv.weight.data = each.conv.weight.data.flip(3)
    same()
    for each in (result, model):
        each.pool.kernel_size = (2, 2)
    same()
    for each in (result, model):
        each.pool = nn.AvgPool2d(2)
    same()
    for each in (result, model):
        each.pool = nn.MaxPool2d(2)
    same()
    x = x.flip(2)[:, :, :, ::1]
    same()
    for each in (result, model):
        each.double()
    x = x.double()
    same()


def test_what_is_taken_out_is_missed_as_the_module_misses_it():
    torch.manual_seed(0)
    model, x = Net().eval(), batch()
    made = optimized(model, x)
    for name in dict(model.named_children()):
        told = []
        for each in (copy.deepcopy(model), copy.deepcopy(made)):
            delattr(each, name)
            with pytest.raises(AttributeError) as raised, torch.no_grad():
                each(x)
            told.append(str(raised.value))
        assert told[0] == told[1]
    for each in (model, made):
        del each.relu, each.second
        each.relu, each.second = torch.tanh, torch.sigmoid
    with torch.no_grad():
        assert_same(made(x), model(x))


def test_whoever_looks_on_sees_each_layer(guarded, made):
    torch.manual_seed(0)
    model, x = Net().eval(), batch()
    result = optimized(model, x)
    with torch.no_grad():
        result(x)
    seen = []
    hook = result.first.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.no_grad():
        assert_same(result(x), model(x))
    hook.remove()
    assert float(seen[0].min()) < 0, "it is shown what the layer makes, before ReLU"
    result(x).sum().backward()
    model(x).sum().backward()
    for new, old in zip(result.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(new.grad, old.grad, rtol=1e-4, atol=1e-4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert result(x).dtype == model(x).dtype
    with torch.no_grad(), profiled() as profile:
        result(x)
    assert any("conv2d" in event.key for event in profile.key_averages())


def test_copies_know_nothing_yet(made):
    torch.manual_seed(0)
    model, x = Net().eval(), batch()
    result = optimized(model, x)
    with torch.no_grad():
        expected = result(x)
        twin = copy.deepcopy(result)
        twin.second.bias.add_(1)
        assert_same(twin(x), expected + 1)
        assert_same(result(x), expected)
    kept = vars(result.conv)[sequences.KEPT]
    assert kept
    assert not pickle.loads(pickle.dumps(kept))


def test_a_layer_that_is_left_alone_is_in_no_sequence(made):
    model, x = Net().eval(), batch()
    result = perfkit.apply(model, "fused_kernels(exclude='second')", example_inputs=x).model
    made.clear()
    with torch.no_grad():
        for _ in range(2):
            assert_same(result(x), model(x))
    assert not made


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_any_batch_on_any_number_of_threads(threads, dtype, error, made):
    torch.manual_seed(0)
    model = Net().eval().to(dtype)
    result = optimized(model, batch().to(dtype))
    double = copy.deepcopy(model).double()
    before = torch.get_num_threads()
    made.clear()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            for rows in (1, 15, 16, 49, 100):  # threads take rows of their own from 16 for each on
                x = batch(rows).to(dtype)
                y = result(x)
                torch.testing.assert_close(y.double(), double(x.double()), rtol=error, atol=error)
                assert torch.equal(result(x), y)
    finally:
        torch.set_num_threads(before)
    assert made == [3] * 5


def test_autocast_rounds_what_weights_are_at_the_call(guarded, made):
    torch.manual_seed(0)
    model, x = Net().eval(), batch()
    result = optimized(model, x)
    made.clear()

    def same(dtype):
        with torch.autocast("cpu", dtype):
            for _ in range(2):
                new, old = result(x), model(x)
                assert new.dtype == old.dtype
                torch.testing.assert_close(new, old, rtol=3e-2, atol=3e-2)

    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            same(torch.bfloat16)
    assert made == [3, 3]
    with torch.no_grad():
        for each in (result, model):
            each.first.weight.data.mul_(0.5)
        same(torch.bfloat16)
        same(torch.float16)
        assert_same(result(x), model(x))
        x = x.bfloat16()
        same(torch.bfloat16)
    assert made == [3, 3]


def test_parameters_of_torch_func_lie_nowhere(guarded, made):
    torch.manual_seed(0)
    model, x = Net().eval(), batch()
    result = optimized(model, x)
    halves = {name: torch.stack([each.detach(), each.detach() / 2]) for name, each in model.named_parameters()}
    with torch.no_grad():
        new, old = (
            torch.func.vmap(lambda given, of=of: torch.func.functional_call(of, given, (x,)))(halves)
            for of in (result, model)
        )
        assert_same(new, old)
        assert_same(result(x), model(x))


class Operations(TorchDispatchMode):
    """Notes the operations that are dispatched."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def test_what_is_known_is_not_used_where_operations_are_watched(guarded, made):
    torch.manual_seed(0)
    model, x = Net().eval(), batch()
    result, direction = optimized(model, x), torch.randn_like(x)
    with torch.no_grad():
        for _ in range(2):
            result(x)
        with Operations() as operations:
            assert_same(result(x), model(x))
        assert any("conv2d" in name for name in operations.seen)
        many = torch.stack([x, 2 * x])
        assert_same(torch.func.vmap(result)(many), torch.func.vmap(model)(many))
        assert_same(result(torch._neg_view(x)), model(-x))
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(result(x), FakeTensor)
    for of in (result, model):
        of.requires_grad_(False)
    with torch.no_grad():
        for _ in range(2):
            result(x)
    made.clear()
    with pytest.raises(NotImplementedError):  # the kernels have no derivative in forward mode, and say so
        torch.func.jvp(result, (x,), (direction,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError):
        result(forward_ad.make_dual(x, direction))
    assert not made


def test_inputs_of_other_kinds_by_turns_are_learned_once_each(guarded, made):
    torch.manual_seed(0)
    model, x = Net().eval(), batch()
    result = optimized(model, batch(4))
    with torch.inference_mode():
        inside = x.clone()
    odd = x.as_strided(x.shape, (144, 200, 12, 1))
    kinds = [x, nn.Parameter(x), nn.Parameter(x, requires_grad=False), inside, odd, batch(3)]
    assert odd.is_contiguous()
    assert odd.stride() != x.stride()
    made.clear()
    for _ in range(3):
        for each in kinds:
            for mode in (torch.no_grad, torch.inference_mode):
                with mode():
                    assert_same(result(each), model(each))
    assert made == [3] * 2 * len(kinds)
