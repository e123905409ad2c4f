"""Integer layers by one call: the numbers of each by itself, and that whatever changes or looks on is followed."""

import copy
import pickle

import pytest

pytest.importorskip("torch")

import torch
from fused_torch import Net, batch
from int8_calls import kernels_pay
from torch import nn

import perfkit
from perfkit.backends import torch_fused_sequence as sequences
from perfkit.kernels import _native
from perfkit.quantization import torch_onednn
from perfkit.quantization.torch_ranges import Affine

if _native.find_compiler() is None:
    pytest.skip("no C++ compiler is installed", allow_module_level=True)
pytestmark = pytest.mark.skipif(bool(torch_onednn.missing()), reason=torch_onednn.missing() or "there")


class Deep(nn.Module):
    """Convolutions of few channels and of many, one that is padded, and layers that take rows."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 20, 3, padding=1), nn.Conv2d(20, 6, 1)
        self.relu, self.pool = nn.ReLU(), nn.MaxPool2d(2)
        self.last = nn.Linear(6 * 5 * 5, 10)

    def forward(self, x):
        x = self.relu(self.first(x))
        x = self.pool(self.relu(self.second(x)))
        x = self.relu(self.third(x))
        return self.last(x.flatten(1))


class Normed(nn.Module):
    """As most models have it: a norm behind a convolution, dropout, a depthwise convolution, half of the channels."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.second, self.drop = nn.Conv2d(8, 8, 3), nn.Dropout(0.5)
        self.relu = nn.ReLU()
        self.apart = nn.Sequential(
            nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1), nn.Identity(), nn.ReLU()
        )

    def forward(self, x):
        x = self.first(x)
        x = self.norm(x)
        x = self.relu(x)
        x = self.drop(x)
        x = self.relu(self.second(x))
        return self.apart(x.chunk(2, dim=1)[1])


@pytest.fixture(autouse=True)
def paying():
    with kernels_pay():
        yield


def made_of(model, recipe, x):
    return perfkit.apply(model, recipe, example_inputs=x, calibration=[batch(16), 2 * batch(16)]).model


@pytest.fixture(params=[Net, Deep])
def pair(request):
    """A model on integers, the same with its layers by one call, and an input."""
    torch.manual_seed(0)
    model, x = request.param().eval(), batch()
    return made_of(model, "int8", x), made_of(model, "int8+fused_kernels", x), x


def assert_same(one, other, x):
    """In bits: rounding what a layer gives is the same wherever it is done."""
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(one(x), other(x))


def test_all_layers_are_one_call_with_their_own_numbers(pair, made):
    one, other, _ = pair
    made.clear()
    for rows in (3, 1, 40, 100):  # of others than it was tried with
        assert_same(other, one, batch(rows))
        assert [each for each in made if each > 1] == [len([m for m in one.modules() if hasattr(m, "input_grid")])]
        made.clear()


def test_what_does_nothing_and_what_no_kernel_takes_leave_the_rest_together(made, monkeypatch):
    """A folded norm, dropout in eval mode, a depthwise convolution; what is known of them is not asked again."""
    torch.manual_seed(0)
    model, x = Normed().eval(), batch()
    one, other = made_of(model, "int8", x), made_of(model, "int8+fused_kernels", x)
    assert_same(one, one, x := batch(3))
    made.clear()
    assert_same(other, one, x)
    assert made == [2, 1, 1]
    monkeypatch.setattr(sequences, "_Sequence", None)
    monkeypatch.setattr("perfkit.backends.torch_fused_int8.together", None)
    assert_same(other, one, x)
    monkeypatch.undo()
    for each in (one, other):
        each.train()
    with torch.no_grad(), torch.random.fork_rng():
        outputs = [torch.manual_seed(1) and each(x) for each in (one, other)]
    assert torch.equal(*outputs), "dropout in training"
    assert not torch.equal(outputs[0], one.eval()(x))


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads(pair, threads):
    one, other, _ = pair
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_same(other, one, batch(70))
    finally:
        torch.set_num_threads(before)


def test_what_changes_is_followed(made):
    torch.manual_seed(0)
    model, x = Net().eval(), batch()
    one, other = made_of(model, "int8", x), made_of(model, "int8+fused_kernels", x)
    third = made_of(Net().eval(), "int8", x)

    def same(change):
        for each in (one, other):
            change(each)
        assert_same(other, one, x)

    same(lambda each: None)
    same(lambda each: each.load_state_dict(third.state_dict()))
    assert_same(other, third, x)
    with torch.no_grad():
        same(lambda each: each.first.weight_int8.neg_())
        same(lambda each: each.conv.weight_scale.mul_(2))
        same(lambda each: each.second.bias.add_(1))
    same(lambda each: setattr(each.first, "input_grid", Affine.spanning(-1.0, 3.0, torch_onednn.top())))
    same(lambda each: setattr(each.first, "bias", None))
    same(lambda each: setattr(each.pool, "kernel_size", (2, 2)))
    same(lambda each: setattr(each.conv.weight_scale, "data", -each.conv.weight_scale.data))
    same(lambda each: setattr(each, "pool", nn.AvgPool2d(2)))
    with torch.no_grad():
        twin = copy.deepcopy(other)
        assert torch.equal(twin(x), other(x))
        twin.second.bias.add_(1)
        torch.testing.assert_close(twin(x), other(x) + 1)
    assert not pickle.loads(pickle.dumps(vars(other.conv)[sequences.KEPT]))


def test_images_with_what_is_no_number_and_of_other_strides(pair):
    one, other, x = pair
    x[0, 0, 2, 3], x[1, 0, 4, 4], x[1, 0, 0, 0] = torch.nan, torch.inf, -torch.inf
    assert_same(other, one, x)
    assert_same(other, one, batch(4).transpose(2, 3))
    assert_same(other, one, batch(4)[::2])
    with torch.inference_mode():
        assert torch.equal(other(x.clone()), one(x))


def test_whoever_looks_on_sees_each_layer(guarded, made):
    torch.manual_seed(0)
    model, x = Net().eval(), batch()
    one, other = made_of(model, "int8", x), made_of(model, "int8+fused_kernels", x)
    assert_same(other, one, x)
    seen = []
    handle = other.first.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    assert_same(other, one, x)
    handle.remove()
    assert float(seen[0].min()) < 0, "it is shown what the layer makes, before ReLU"
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert other(x).dtype == one(x).dtype == torch.bfloat16
    for each in (one, other):
        each(x).sum().backward()
    for new, old in zip(other.parameters(), one.parameters(), strict=True):
        assert (new.grad is None) == (old.grad is None)
        if new.grad is not None:
            torch.testing.assert_close(new.grad, old.grad)
    for each in (one, other):
        each.requires_grad_(False)
    exported = torch.export.export(other, (x,)).module()
    torch.testing.assert_close(exported(x), one(x), rtol=0, atol=0.05 * float(one(x).abs().max()))
    with torch.no_grad():
        mapped = torch.func.vmap(other)(torch.stack([x, 2 * x]))
    torch.testing.assert_close(mapped[0], one(x), rtol=0, atol=0.05 * float(one(x).abs().max()))
    assert_same(other, one, x)


def test_a_layer_that_is_left_alone_is_in_no_sequence(made):
    torch.manual_seed(0)
    model, x = Net().eval(), batch()
    result = perfkit.apply(model, "int8+fused_kernels(exclude='second')", example_inputs=x)
    made.clear()
    with torch.no_grad():
        result.model(x), result.model(x)
    assert max(made, default=0) < 2
    assert result.report.steps[-1].effect.touched == ("conv", "first")


def test_compiled_it_is_as_before():
    torch.manual_seed(0)
    model, x = Net().eval(), batch()
    result = made_of(model, "int8+fused_kernels+compile", x)
    with torch.no_grad():
        y, exact = result(x), model(x)
    assert float((y - exact).norm() / exact.norm()) < 0.05
