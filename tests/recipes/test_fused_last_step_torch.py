"""Recurrent layers of which the last step alone is read, with the linear layer behind them, by one call."""

import itertools

import pytest

pytest.importorskip("torch")

import torch
from torch import nn

import perfkit
from perfkit.backends import torch_fused_sequence as sequences
from perfkit.backends.torch_profiler import profiled
from perfkit.kernels import _native

if _native.find_compiler() is None:
    pytest.skip("no C++ compiler is installed", allow_module_level=True)

INPUTS, HIDDEN = 7, 21
KINDS = (nn.LSTM, nn.GRU, nn.RNN)


class Net(nn.Module):
    """A recurrent layer, the output of its last step, and a linear layer."""

    def __init__(self, kind=nn.LSTM, **options):
        super().__init__()
        self.rnn = kind(INPUTS, HIDDEN, **options)
        self.fc = nn.Linear(HIDDEN * (2 if options.get("bidirectional") else 1), 3)

    def forward(self, x):
        y, _ = self.rnn(x)
        return self.fc(y[-1])


class BatchFirst(Net):
    def __init__(self, kind=nn.LSTM, **options):
        super().__init__(kind, batch_first=True, **options)

    def forward(self, x):
        y, _ = self.rnn(x.transpose(0, 1).contiguous())
        y = y[:, -1, :]
        return self.fc(y)


class BatchFirstInLine(BatchFirst):
    def forward(self, x):
        x = x.transpose(0, 1).contiguous()
        return self.fc(self.rnn(x)[0][:, -1])


class State(Net):
    def forward(self, x):
        _, (h, _) = self.rnn(x)
        return self.fc(h[-1])


class OneState(Net):
    def forward(self, x):
        found = self.rnn(x)
        return self.fc(found[1][-1])


class Both(Net):
    """Reads more than the last step."""

    def forward(self, x):
        y, (_, c) = self.rnn(x)
        last = self.fc(y[-1])
        return last + c.sum()


class First(Net):
    def forward(self, x):
        y, _ = self.rnn(x)
        return self.fc(y[0])


class BatchFirstTakenForTimeFirst(Net):
    """What it reads is the last row's outputs of all steps."""

    def __init__(self):
        super().__init__(batch_first=True)

    def forward(self, x):
        y, _ = self.rnn(x)
        return self.fc(y[-1])


def inputs(batch=2, steps=9, dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(steps, batch, INPUTS, dtype=dtype)


def optimized(model, x):
    return perfkit.apply(model, "fused_kernels", example_inputs=x).model


def expected(model, x):
    """In float64."""
    before = next(model.parameters()).dtype
    with torch.no_grad():
        y = model.double()(x.double())
    model.to(before)
    return y


def assert_close(found, model, x):
    # of sums of products of numbers below 1, rounded some times a step
    error = 1e-5 if x.dtype == torch.float32 else 3e-2
    torch.testing.assert_close(found.double(), expected(model, x), rtol=error, atol=error)


@pytest.mark.parametrize(
    ("net", "kind"),
    [
        *itertools.product((Net, BatchFirst, BatchFirstInLine), KINDS),
        (State, nn.LSTM),
        (OneState, nn.GRU),
        (OneState, nn.RNN),
    ],
)
def test_both_layers_are_one_call(net, kind, made):
    torch.manual_seed(0)
    model = net(kind).eval()
    result = optimized(model, inputs())
    made.clear()
    with torch.no_grad():
        for batch, _ in itertools.product((1, 3, 17), range(2)):
            assert_close(result(inputs(batch)), model, inputs(batch))
    assert made == [2, 2, 2]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{"num_layers": 3}, {"bias": False}, {"num_layers": 2, "dropout": 0.5}])
def test_stacks_on_any_number_of_threads(threads, dtype, options, made):
    torch.manual_seed(0)
    model = Net(**options).eval().to(dtype)
    result = optimized(model, inputs(dtype=dtype))
    made.clear()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            for batch, steps in ((1, 1), (1, 40), (70, 40)):
                x = inputs(batch, steps, dtype)
                assert_close(result(x), model, x)
                assert torch.equal(result(x), result(x))
    finally:
        torch.set_num_threads(before)
    assert made == [2, 2, 2]


@pytest.mark.parametrize(
    ("net", "options"), [(Both, ""), (First, ""), (BatchFirstTakenForTimeFirst, ""), (Net, "(exclude='rnn')")]
)
def test_whatever_else_is_read_or_left_alone_stays_as_written(net, options, made):
    torch.manual_seed(0)
    model, x = net().eval(), inputs()
    result = perfkit.apply(model, f"fused_kernels{options}", example_inputs=x).model
    with torch.no_grad():
        for _ in range(2):
            assert_close(result(x), model, x)
    assert not made


def test_two_directions_end_at_different_steps(made):
    model, x = Net(bidirectional=True).eval(), inputs()
    result = optimized(model, x)
    with torch.no_grad():
        for _ in range(2):
            assert_close(result(x), model, x)
    assert not made


def test_what_changes_is_followed(made):
    torch.manual_seed(0)
    model, x = Net(num_layers=2).eval(), inputs()
    result = optimized(model, x)

    def same(x=x):
        with torch.no_grad():
            for _ in range(2):
                assert_close(result(x), model, x)

    same()
    for each in (result, model):
        each.rnn.weight_hh_l1.data.mul_(0.5)
    same()
    for each in (result, model):
        each.rnn.weight_hh_l0 = nn.Parameter(each.rnn.weight_hh_l0.flip(0))
    same()
    for each in (result, model):
        each.rnn.weight_hh_l0.data = each.rnn.weight_hh_l0.data.flip(1)
    same()
    for each in (result, model):
        each.fc = nn.Linear(HIDDEN, 3).requires_grad_(False)
        nn.init.constant_(each.fc.weight, 0.1), nn.init.zeros_(each.fc.bias)
    same()
    same(inputs().transpose(0, 1))
    same(inputs()[:, 0])
    for each in (result, model):
        each.rnn.batch_first = True
    same()
    for each in (result, model):
        each.double()
    same(x.double())


def test_weights_that_lie_in_another_way_are_read_so(guarded, made):
    torch.manual_seed(0)
    model, x = Net(nn.RNN).eval(), inputs()
    result = optimized(model, x)

    def same():
        with torch.no_grad():
            for _ in range(2):
                assert_close(result(x), model, x)

    same()
    assert made == [2]
    model.rnn.weight_hh_l0.data = model.rnn.weight_hh_l0.data.t()
    result.rnn.weight_hh_l0.data = result.rnn.weight_hh_l0.data.t()  # of the same size, at the same place
    same()
    model.fc.weight.data = -model.fc.weight.data
    result.fc.weight.data = torch._neg_view(result.fc.weight.data)
    same()
    for each in (result, model):
        each.fc.weight.data, each.fc.bias.data = each.fc.weight.data[:2], each.fc.bias.data[:2]
    same()
    for each in (result, model):
        each.bfloat16()
    x = x.bfloat16()
    same()


def test_whoever_looks_on_sees_each_layer(made):
    torch.manual_seed(0)
    model, x = Net().eval(), inputs()
    result = optimized(model, x)
    with torch.no_grad():
        result(x)
    seen = []
    hook = result.rnn.register_forward_hook(lambda _module, _inputs, output: seen.append(output[0].shape))
    with torch.no_grad():
        assert_close(result(x), model, x)
    hook.remove()
    assert seen == [(9, 2, HIDDEN)]
    result(x).sum().backward()
    model(x).sum().backward()
    for new, old in zip(result.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(new.grad, old.grad, rtol=1e-4, atol=1e-4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert result(x).dtype == model(x).dtype
    with torch.no_grad(), profiled() as profile:
        result(x)
    assert any("rnn" in event.key for event in profile.key_averages())


def test_nothing_about_it_is_of_the_default_device(made):
    model, x = Net().eval(), inputs()
    result = optimized(model, x)
    with torch.no_grad():
        before = result(x)
        with torch.device("meta"):
            assert torch.equal(result(x), before)
    assert vars(result.rnn)[sequences.KEPT]


def test_it_compiles_whole():
    torch.manual_seed(0)
    model, x = Net().eval(), inputs()
    result = optimized(model, x)
    result.compile(backend="eager", fullgraph=True)
    with torch.no_grad():
        assert_close(result(x), model, x)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_is_one_call_too(kind, made):
    torch.manual_seed(0)
    model, x = Net(kind).eval(), inputs()
    result = perfkit.apply(model, "bf16+fused_kernels", example_inputs=x).model
    made.clear()
    with torch.no_grad():
        for batch in (1, 3):
            x = inputs(batch)
            assert result(x).dtype == torch.float32
            assert_close(result(x).bfloat16(), model, x.bfloat16())
        for each in (result, model):
            each.rnn.weight_hh_l0.data.mul_(0.5)
        assert_close(result(x).bfloat16(), model, x.bfloat16())
    assert made == [2, 2]
