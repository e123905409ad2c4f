"""Integer layers by perfkit's own kernels: their pattern's numbers, and whatever changes is followed."""

import copy

import pytest

pytest.importorskip("torch")

import torch
from int8_calls import kernels_pay
from int8_layers import GRID, LAYERS, ROUNDINGS, Own, in_floats
from torch import nn

from perfkit.backends.torch_fused_sequence import KEPT
from perfkit.kernels import _native
from perfkit.quantization import torch_layers, torch_native, torch_onednn
from perfkit.quantization.torch_ranges import Affine

if _native.find_compiler() is None:
    pytest.skip("no C++ compiler is installed", allow_module_level=True)
pytestmark = pytest.mark.skipif(bool(torch_onednn.missing()), reason=torch_onednn.missing() or "there")


@pytest.fixture(autouse=True)
def own(monkeypatch):
    """What the kernels gave."""
    found = []
    product = torch_native.product

    def counted(*given):
        found.append(product(*given))
        return found[-1]

    monkeypatch.setattr(torch_native, "product", counted)
    with kernels_pay():
        yield found


@pytest.mark.parametrize(
    ("name", "rounding"), [*((name, "static") for name in LAYERS), *((name, "dynamic") for name in list(LAYERS)[:6])]
)
@torch.no_grad()
def test_the_kernels_give_the_numbers_of_the_pattern(name, rounding, own, monkeypatch):
    make, inputs = LAYERS[name]
    layer, x = make(), inputs()
    ROUNDINGS[rounding](layer)
    wanted = in_floats(layer, x, monkeypatch)
    for at_once in (True, False):
        if not at_once:
            monkeypatch.setattr(torch_onednn, "at_once", lambda *_: None)
        for _ in range(2):
            y = layer(x)
            torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
            assert y.stride() == wanted.stride()
    assert all(y is None for y in own) == (name == "groups"), "the kernel takes one group alone"


@torch.no_grad()
def test_within_ulps_of_onednn(monkeypatch):
    """Sums are the same integers; the kernels differ in how they round two products and a sum, each by half an ulp."""
    for layer, x in ((nn.Linear(300, 40), torch.randn(20, 300)), (nn.Conv2d(3, 8, 3), torch.randn(2, 3, 9, 9))):
        torch_layers.static(layer, GRID)
        y = layer(x)
        bias = layer.bias.abs() if x.dim() == 2 else layer.bias.abs()[:, None, None]
        with monkeypatch.context() as patched:
            patched.setattr(torch_native, "product", lambda *_: None)
            patched.setattr(torch_onednn, "at_once", lambda *_: None)
            other = layer(x)
        assert ((y - other).abs() <= 4 * 2**-24 * (y.abs() + 2 * bias)).all()


@torch.no_grad()
def test_what_changes_is_followed(monkeypatch):
    for layer, other, x in (
        (nn.Linear(16, 8), nn.Linear(16, 8), torch.randn(4, 16)),
        (nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), torch.randn(2, 3, 9, 9)),
    ):
        for each in (layer, other):
            torch_layers.static(each, GRID)

        def same(layer=layer, x=x):
            for _ in range(3):
                torch.testing.assert_close(layer(x), in_floats(layer, x, monkeypatch), rtol=1e-5, atol=1e-5)

        same()
        before, twin = layer(x), copy.deepcopy(layer)
        layer.load_state_dict(other.state_dict())
        same()
        assert torch.equal(twin(x), before)
        layer.weight_scale.mul_(0.5)
        same()
        layer.weight_int8.neg_()
        same()
        layer.bias.add_(1)
        same()
        layer.input_grid = Affine.spanning(-1.0, 1.0, torch_onednn.top())
        same()
        layer.bias = None
        same()
        layer.weight_scale.neg_()  # no scale that keeps the order of numbers: the kernels leave it to others
        same()


@torch.no_grad()
def test_a_call_like_the_last_one_is_made_at_once(own):
    layer, x = nn.Linear(16, 8), torch.randn(4, 16)
    torch_layers.static(layer, GRID)
    y = layer(x)
    assert vars(layer)[KEPT].last is not None
    own.clear()
    assert torch.equal(layer(x), y)
    assert not own
    handle = layer.register_forward_pre_hook(lambda _, given: (2 * given[0],))
    doubled = layer(x)
    handle.remove()
    torch.testing.assert_close(doubled, layer(2 * x))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert torch.equal(layer(x), y)


def test_whoever_looks_on_is_shown_the_pattern(own):
    layer, x = nn.Linear(16, 8).requires_grad_(False), torch.randn(4, 16)
    torch_layers.static(layer, GRID)
    with torch.no_grad():
        y = layer(x)
    own.clear()
    exported = torch.export.export(layer, (x,))
    assert any("quantize_per_tensor" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(x), y, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(layer)(x), y, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer(x.as_subclass(Own)).as_subclass(torch.Tensor), y, rtol=1e-5, atol=1e-5)
        assert layer(x[:0]).shape == (0, 8)
        with pytest.raises(RuntimeError):
            layer(torch.randn(4, 15))
    assert not own or all(y is None for y in own)


@pytest.mark.parametrize("name", ["rows", "images"])
def test_the_bias_has_its_gradient(name):
    make, inputs = LAYERS[name]
    layer, x = make(), inputs()
    torch_layers.static(layer, GRID)
    with torch.no_grad():
        wanted = layer(x)
    y = layer(x)
    assert torch.equal(y, wanted)
    y.sum().backward()
    assert (layer.bias.grad == y.numel() / len(layer.bias)).all()


@torch.no_grad()
def test_a_range_is_read_as_torch_reads_it(own, monkeypatch):
    """In bits: with the grid that the pattern chooses, known beforehand, the numbers are the same."""
    layer, top = nn.Linear(33, 9), torch_onednn.top()
    torch_layers.dynamic(layer, top)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for shift in (0.0, 5.0, -5.0):  # zero within the range, and not
            for x in (torch.randn(7, 33) + shift, torch.randn(9000, 33) + shift, torch.full((2, 33), shift)):
                grid = torch_onednn._read(x, top)
                scale, zero = torch.ops.quantized_decomposed.choose_qparams.tensor(
                    x, 0, top, torch_layers.EPSILON, torch.uint8
                )
                assert (grid.scale, grid.zero) == (float(scale), int(zero))
                expected = torch_native.product(layer, layer.bias, x, grid, torch.float32)
                own.clear()
                assert torch.equal(layer(x), expected)
                assert own[0] is not None
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 3e38])
@pytest.mark.parametrize("place", [0, 17, 32])
def test_what_has_no_range_is_left_to_the_pattern(value, place, own, monkeypatch):
    layer, x = nn.Linear(33, 9), torch.randn(4, 33)
    torch_layers.dynamic(layer, torch_onednn.top())
    x[2, place], x[3, place] = value, -3e38 if value == 3e38 else 0.0
    y = layer(x)
    assert own == [None]
    assert torch.equal(y.isnan(), in_floats(layer, x, monkeypatch).isnan())
