"""Linear layers on CPU: the kernel against float64, and that torch computes whenever anybody looks on."""

import pytest

pytest.importorskip("torch")

import torch
import torch.nn.functional as F
from instruction_paths import EMULATED, in_place, need
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from perfkit.kernels import _native, trace
from perfkit.kernels.linear import Problem, cpu_kernel, cpu_shape
from perfkit.kernels.linear.torch_call import linear
from perfkit.measure._hardware import cpu

if _native.find_compiler() is None:
    pytest.skip("no C++ compiler is installed", allow_module_level=True)

SIZES = [(1, 1, 1), (1, 5408, 128), (2, 33, 9), (3, 129, 7), (5, 130, 17), (6, 64, 4), (13, 2900, 10), (70, 257, 131)]
SIZES += [(16, 64, 16), (17, 33, 10), (16, 31, 100), (33, 3000, 47), (47, 2048, 300), (301, 128, 10)]
"""Rows, inputs, outputs: of few rows and many, whole vectors and parts of one, K in one piece and in several; whole
tiles and parts of one, and more rows than outputs and fewer."""
DTYPES = [torch.float32, torch.bfloat16]


def tensors(rows, inputs, outputs, dtype):
    torch.manual_seed(0)
    return tuple(torch.randn(size).to(dtype) for size in ((rows, inputs), (outputs, inputs), (outputs,)))


def run(x, weight, bias, activation=None):
    problem = Problem("cpu", str(x.dtype)[6:], x.size(0), x.size(1), weight.size(0), activation)
    return cpu_kernel.caller(problem, (x.size(0),))(x, weight, bias)


def assert_right(y, x, weight, bias, activation):
    """Against the sums in float64: each of K products and roundings of float32 may be off by half a place of it."""
    wide = [None if each is None else each.double() for each in (x, weight, bias)]
    exact = F.linear(*wide)
    largest = F.linear(wide[0].abs(), wide[1].abs(), None if bias is None else wide[2].abs())
    exact = exact.relu() if activation else exact
    steps = (x.size(-1) + 1) * torch.finfo(torch.float32).eps
    rounding = 0 if y.dtype == torch.float32 else torch.finfo(y.dtype).eps
    assert y.dtype == x.dtype
    assert bool(((y.double() - exact).abs() <= steps * largest + rounding * exact.abs()).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_the_kernel(sizes, dtype):
    x, weight, bias = tensors(*sizes, dtype)
    for activation in (None, "relu"):
        for given in (bias, None):
            assert_right(run(x, weight, given, activation), x, weight, given, activation)


NO_AVX512 = "#undef __AVX512F__\n"


@pytest.mark.parametrize(
    "before",
    [NO_AVX512, NO_AVX512 + "#define PERFKIT_LANES 4", EMULATED],
    ids=["without AVX-512", "in ARM's vectors", "with AMX"],
)
def test_other_instructions(before, tmp_path):
    need("avx512f")
    with in_place(cpu_kernel, tmp_path, before):
        assert cpu_kernel.library().perfkit_linear_has_across(True) == (before == EMULATED)
        for sizes in SIZES:
            for dtype in DTYPES:
                x, weight, bias = tensors(*sizes, dtype)
                assert_right(run(x, weight, bias, "relu"), x, weight, bias, "relu")


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_that_are_none(dtype):
    x, weight, bias = tensors(9, 200, 20, dtype)
    x[1, 3], x[2, 199], bias[5] = float("nan"), float("inf"), float("-inf")
    for activation in (None, "relu"):
        wanted = F.linear(x.double(), weight.double(), bias.double())
        wanted = wanted.relu() if activation else wanted
        found = run(x, weight, bias, activation).double()
        assert torch.equal(found.isnan(), wanted.isnan())
        assert torch.equal(found.isinf(), wanted.isinf())


def test_threads():
    threads, (x, weight, bias) = torch.get_num_threads(), tensors(33, 5408, 128, torch.float32)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for rows in (1, 33):
                assert_right(run(x[:rows], weight, bias), x[:rows], weight, bias, None)
    finally:
        torch.set_num_threads(threads)


@pytest.fixture
def taken(monkeypatch):
    """The kernel takes whatever it can, on any CPU."""
    from perfkit.kernels.linear import torch_call

    monkeypatch.setattr(cpu_shape, "slower", lambda _problem: None)
    from perfkit.kernels._op import _choose

    torch_call._known.clear()
    _choose.cache_clear()
    yield
    torch_call._known.clear()
    _choose.cache_clear()


def kernels_of(*arguments):
    with trace() as choices:
        y = linear(*arguments)
    return y, [choice.implementation for choice in choices]


def test_as_torch_has_it(taken):
    x, weight, bias = tensors(6, 130, 17, torch.float32)
    for given in (x, x[0], x.view(2, 3, 130), x.t().contiguous().t(), x[::2]):
        for _ in range(2):
            y, kernels = kernels_of(given, weight, bias, "relu")
            assert kernels == ["cpu"]
            assert y.shape == F.linear(given, weight, bias).shape
            assert_right(y, given, weight, bias, "relu")
    weight.mul_(2)
    assert_right(linear(x, weight, bias), x, weight, bias, None)


def test_what_the_kernel_does_not_take(taken):
    x, weight, bias = tensors(6, 130, 17, torch.float32)
    for given in ((x.double(), weight.double(), bias.double()), (x[:0], weight, bias), (x, weight.t().contiguous().t(),
                  bias)):  # fmt: skip
        y, kernels = kernels_of(*given)
        assert "cpu" not in kernels
        torch.testing.assert_close(y, F.linear(*given), rtol=0, atol=0)
    for wrong in ((x[:, 1:], weight, bias), (x, weight, bias[1:]), (x.bfloat16(), weight, bias)):
        with pytest.raises(RuntimeError) as theirs:
            F.linear(*wrong)
        for _ in range(2):
            with pytest.raises(RuntimeError) as ours:
                linear(*wrong)
            assert str(ours.value) == str(theirs.value)


class Watching(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


def test_whoever_looks_on_sees_torch(taken):
    x, weight, bias = tensors(6, 130, 17, torch.float32)
    linear(x, weight, bias, "relu")
    expected = F.relu(F.linear(x, weight, bias))

    parameter = weight.clone().requires_grad_()
    y, kernels = kernels_of(x, parameter, bias, "relu")
    y.sum().backward()
    assert not kernels
    torch.testing.assert_close(parameter.grad, (expected > 0).float().t() @ x)
    with torch.no_grad():
        assert kernels_of(x, parameter, bias, "relu")[1] == ["cpu"]

    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
    with Watching() as mode:
        linear(x, weight, bias, "relu")
    assert torch.ops.aten.relu.default in mode.seen

    torch.testing.assert_close(torch.vmap(linear, (0, None, None))(x, weight, bias), F.linear(x, weight, bias))
    tangent = torch.func.jvp(lambda x: linear(x, weight, bias), (x,), (torch.ones_like(x),))[1]
    torch.testing.assert_close(tangent, torch.ones_like(x) @ weight.t())
    gradient = torch.func.grad(lambda x: linear(x, weight, bias).sum())(x)
    torch.testing.assert_close(gradient, weight.sum(0).expand_as(x))


def test_export_and_fake_tensors(taken):
    from torch._subclasses import FakeTensorMode

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.of = nn.Linear(130, 17)

        def forward(self, x):
            return linear(x, self.of.weight, self.of.bias, "relu")

    model, x = Net().eval(), torch.randn(6, 130)
    with torch.no_grad():
        expected = model(x)
        exported = torch.export.export(model, (x,))
        assert "linear" in str(exported.graph)
        torch.testing.assert_close(exported.module()(x), expected)
    with FakeTensorMode():
        assert linear(torch.empty(6, 130), torch.empty(17, 130)).shape == (6, 17)


def test_where_it_is_expected_to_be_slower():
    small = Problem("cpu", "float32", 1, 128, 10)
    assert "too little work" in cpu_shape.slower(small)
    if "avx512f" in cpu()[1]:
        assert cpu_shape.slower(Problem("cpu", "float32", 1, 5408, 128)) is None
