"""Integer layers in compiled programs: the numbers of each by itself, in few calls, for any batch."""

import pytest

pytest.importorskip("torch")

import torch
import torch.nn.functional as F
from int8_calls import kernels_pay
from torch import nn

import perfkit
from perfkit.backends.torch_compile_log import watching
from perfkit.kernels import _native
from perfkit.kernels.sequence import torch_auto
from perfkit.quantization import torch_onednn

if _native.find_compiler() is None:
    pytest.skip("no C++ compiler is installed", allow_module_level=True)
pytestmark = pytest.mark.skipif(bool(torch_onednn.missing()), reason=torch_onednn.missing() or "there")


class Images(nn.Module):
    """Convolutions that follow each other, and the layers that take their rows."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 20, 3, padding=1)
        self.pool, self.hidden, self.last = nn.MaxPool2d(2), nn.Linear(20 * 5 * 5, 16), nn.Linear(16, 10)

    def forward(self, x):
        x = self.pool(torch.relu(self.second(F.relu(self.first(x)))))
        return self.last(F.relu(self.hidden(x.view(x.size(0), -1))))


class Residual(nn.Module):
    """Sums and other operations between the layers, results that are read twice, a pool that overlaps, groups."""

    def __init__(self):
        super().__init__()
        self.stem, self.apart = nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.Conv2d(12, 12, 3, padding=1, groups=4)
        self.one, self.two = nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(12, 12, (1, 3), padding="same")
        self.query, self.key, self.out = nn.Linear(12, 6), nn.Linear(12, 6), nn.Linear(6, 4)

    def forward(self, x):
        x = F.max_pool2d(torch.relu(self.stem(x)), 3, 2, 1)
        x = F.relu(x + self.two(F.gelu(self.one(x)))) + self.apart(x)
        x = x.flatten(2).transpose(1, 2)
        return self.out(F.silu(self.query(x)) * torch.tanh(self.key(x))), x


INPUTS = {Images: lambda rows: torch.randn(rows, 1, 12, 12), Residual: lambda rows: torch.randn(rows, 3, 11, 9)}


@pytest.fixture(autouse=True)
def paying():
    with kernels_pay():
        yield


def made_of(model, recipe, x):
    return perfkit.apply(model, recipe, example_inputs=x, calibration=[2 * x, *[x] * 7]).model


def outputs(found):
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize(("kind", "recipe", "calls"), [
    (Images, "int8+fused_kernels+compile(fullgraph=True)", 1),
    (Images, "int8+compile(fullgraph=True, freezing=False)", 1),
    (Residual, "int8+compile(fullgraph=True)", 6),
])  # fmt: skip
@torch.no_grad()
def test_compiled_layers_give_the_numbers_of_each_by_itself(kind, recipe, calls):
    torch.manual_seed(0)
    model, x = kind().eval(), INPUTS[kind](4)
    apart = made_of(model, "int8", x)
    torch.compiler.reset()
    with watching() as log:
        result = made_of(model, recipe, x)
        result(x)
    layers = sum(isinstance(each, (nn.Conv2d, nn.Linear)) for each in model.modules()) - (kind is Residual)
    assert (log().integer_layers, log().integer_calls, log().breaks) == (layers, calls, ())
    for rows in (4, 1, 7, 9):
        other = INPUTS[kind](rows)
        for one, two in zip(outputs(result(other)), outputs(apart(other)), strict=True):
            # what is between them may be computed otherwise, and be rounded to the other side of a half
            assert (one - two).abs().max() <= (1e-5 if kind is Images else 0.1) * two.abs().max()
            assert one.stride() == two.stride()
    if kind is Images:
        return
    result.load_state_dict({name: -each if name == "out.bias" else each for name, each in apart.state_dict().items()})
    assert not torch.allclose(result(x)[0], apart(x)[0])
    result.load_state_dict(apart.state_dict())
    torch.testing.assert_close(result(x)[0], apart(x)[0], rtol=0.1, atol=0.1)


def sequential():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


@torch.no_grad()
def test_many_rows_of_layers_by_themselves_are_the_compilers(monkeypatch):
    monkeypatch.setattr(torch_auto, "MOST_ROWS", 8)
    model, x = sequential(), torch.randn(32, 8)
    apart = made_of(model, "int8", x)
    torch.compiler.reset()
    with watching() as log:
        result = made_of(model, "int8+compile(dynamic=False)", x)
        y = result(x)
    assert (log().integer_kernels, log().integer_layers, log().integer_calls) == (1, 2, 1)
    torch.testing.assert_close(y, apart(x), rtol=1e-2, atol=1e-2)
    with watching() as log:
        torch.testing.assert_close(result(x[:8]), apart(x[:8]), rtol=1e-2, atol=1e-2)
    assert (log().integer_kernels, log().integer_layers, log().integer_calls) == (0, 3, 2)


def test_whoever_looks_on_is_given_operations_that_torch_knows():
    model, x = sequential()[:3], torch.randn(5, 8)
    made = made_of(model, "int8", x)
    with torch.no_grad():
        y = made(x)
        mapped = torch.compile(torch.func.vmap(made), backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(mapped, y, rtol=1e-2, atol=1e-2)
    torch.compile(made, backend="aot_eager", fullgraph=True)(x).sum().backward()
    assert (made[2].bias.grad == len(x)).all()
    exported = torch.export.export(made, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    assert "perfkit" not in str(exported.graph)
    torch.testing.assert_close(exported.module()(x[:3]), y[:3], rtol=1e-2, atol=1e-2)


@torch.no_grad()
def test_under_autocast_they_give_what_it_asks_for():
    model, x = sequential()[:3], torch.randn(5, 8)
    made = made_of(model, "int8", x)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    from torch._dynamo.backends.common import aot_autograd

    with torch.autocast("cpu", torch.bfloat16):
        expected = made(x)
        y = torch.compile(made, backend=aot_autograd(fw_compiler=backend), fullgraph=True)(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    assert "int8_layers" in str(graphs[0].graph)


@torch.no_grad()
def test_a_convolution_of_any_size_that_is_no_kernels_is_one_in_floats(monkeypatch):
    """Inductor takes wrong strides for integer convolutions of symbolic sizes."""
    monkeypatch.setattr(torch_auto, "_takes", lambda *_: False)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, (1, 3), padding="same")).eval()
    x = torch.randn(2, 3, 6, 6)
    with watching() as log:
        apart, result = made_of(model, "int8", x), made_of(model, "int8+compile(dynamic=True)", x)
        for rows in (2, 5):
            other = torch.randn(rows, 3, 6, 6)
            torch.testing.assert_close(result(other), apart(other), rtol=1e-2, atol=1e-2)
    assert log().graphs
    assert not log().integer_kernels


def test_with_tiles_for_bytes_the_compiler_is_given_its_pattern(monkeypatch):
    from perfkit.quantization import torch_native

    monkeypatch.setattr(torch_native, "has", lambda name: name == "amx_int8")
    made = made_of(sequential(), "int8", torch.randn(5, 8))
    with torch.no_grad():
        graphs = []
        torch.compile(made, backend=lambda graph, _: graphs.append(graph) or graph)(torch.randn(5, 8))
    assert "int8_auto" not in str(graphs[0].graph)
    assert "quantize_per_tensor" in str(graphs[0].graph)


def test_recurrent_layers_on_integers_compile_whole():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.last = nn.GRU(6, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.last(self.rnn(x)[0][-1])

    torch.manual_seed(0)
    model, x = Model().eval(), torch.randn(5, 3, 6)
    result = perfkit.apply(model, "int8+compile(fullgraph=True)", example_inputs=x, calibration=[2 * x, *[x] * 7])
    assert not result.report.steps[-1].effect.skipped
    with torch.no_grad():
        torch.testing.assert_close(result.model(x), made_of(model, "int8", x)(x), rtol=1e-4, atol=1e-4)
