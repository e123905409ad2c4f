"""Integer layers that call oneDNN's kernels themselves: their pattern's numbers, and that where someone looks on."""

import copy

import pytest

pytest.importorskip("torch")

import torch
from int8_layers import GRID, LAYERS, ROUNDINGS, Own, in_floats
from torch import nn

from perfkit.quantization import torch_layers, torch_native, torch_onednn

pytestmark = pytest.mark.skipif(bool(torch_onednn.missing()), reason=torch_onednn.missing() or "there")


@pytest.fixture
def counted(monkeypatch):
    """The outputs that oneDNN's kernels gave; perfkit's own take nothing."""
    monkeypatch.setattr(torch_native, "product", lambda *_: None)
    monkeypatch.setattr(torch_onednn, "at_once", lambda *_: None)
    found = []
    for name in ("_linear", "_conv"):
        kernel = getattr(torch_onednn, name)
        monkeypatch.setattr(torch_onednn, name, lambda *given, kernel=kernel: found.append(kernel(*given)) or found[-1])
    return found


@pytest.mark.parametrize(
    ("name", "rounding"), [*((name, "static") for name in LAYERS), *((name, "dynamic") for name in list(LAYERS)[:6])]
)
@torch.no_grad()
def test_the_kernels_give_the_numbers_of_the_pattern(name, rounding, counted, monkeypatch):
    make, inputs = LAYERS[name]
    layer, x = make(), inputs()
    ROUNDINGS[rounding](layer)
    y, wanted = layer(x), in_floats(layer, x, monkeypatch)
    assert len(counted) == 1
    # The sums are exact integers here, and float32 sums of at most 72 numbers there.
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
    assert y.stride() == wanted.stride()


@torch.no_grad()
def test_weights_that_are_loaded_or_copied_are_packed_anew(counted, monkeypatch):
    layer, other, x = nn.Linear(16, 8), nn.Linear(16, 8), torch.randn(4, 16)
    for each in (layer, other):
        torch_layers.static(each, GRID)
    before = layer(x)
    twin = copy.deepcopy(layer)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))
    assert torch.equal(twin(x), before)
    assert len(counted) == 4


@torch.no_grad()
def test_autocast_gives_its_precision(counted):
    layer, x = nn.Linear(16, 8), torch.randn(4, 16)
    torch_layers.static(layer, GRID)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert counted
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=2**-7, atol=2**-7)


def mapped(layer, x):
    with torch.no_grad():
        torch.testing.assert_close(
            torch.func.vmap(layer)(x), layer(x.clone().as_subclass(Own)).as_subclass(torch.Tensor)
        )


def exported(layer, x):
    names = [str(node.target) for node in torch.export.export(layer, (x,)).graph.nodes]
    assert any("quantize_per_tensor" in name for name in names)
    assert not any("onednn" in name for name in names)


def nothing(layer, x):
    with torch.no_grad():
        assert layer(x[:0]).shape == (0, 8)


@pytest.mark.parametrize("looks", [mapped, exported, nothing])
def test_where_someone_looks_on_it_is_the_pattern(looks, counted):
    layer = nn.Linear(16, 8).requires_grad_(False)
    torch_layers.static(layer, GRID)
    looks(layer, torch.randn(4, 16))
    assert not counted


@pytest.mark.parametrize("name", ["rows", "images"])
def test_the_bias_has_its_gradient(name, counted):
    make, inputs = LAYERS[name]
    layer, x = make(), inputs()
    torch_layers.static(layer, GRID)
    with torch.no_grad():
        wanted = layer(x)
    y = layer(x)
    torch.testing.assert_close(y, wanted)
    y.sum().backward()
    assert len(counted) == 2
    assert (layer.bias.grad == y.numel() / len(layer.bias)).all()


@torch.no_grad()
def test_what_is_not_finite_has_no_range(counted):
    layer, x = nn.Linear(16, 8), torch.full((4, 16), torch.inf)
    torch_layers.dynamic(layer, torch_onednn.top())
    layer(x)
    assert not counted


def test_sums_that_overflow_are_found(monkeypatch):
    linear = torch_onednn._linear
    monkeypatch.setattr(torch_onednn, "_linear", lambda *given: linear(*given).clamp(max=32767.0 * 128))
    torch_onednn.missing.cache_clear()
    try:
        assert "overflow" in torch_onednn.missing()
    finally:
        torch_onednn.missing.cache_clear()
