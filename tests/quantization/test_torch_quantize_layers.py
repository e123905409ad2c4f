"""Quantized torch layers alone: the numbers they compute, and whatever they are given."""

import copy

import pytest

pytest.importorskip("torch")

import torch
import torch.nn.functional as F
from applied_recipes import applied
from torch import nn

import perfkit
from perfkit.quantization import torch_int4, torch_layers, torch_onednn
from perfkit.quantization.torch_layers import rounded_weight
from perfkit.quantization.torch_ranges import Affine

pytestmark = pytest.mark.usefixtures("hasty")
GRID = Affine.spanning(-4.0, 4.0, 255)
QUANTIZERS = ("int8", "int8_dynamic", "int8_weight_only", "int4_weight_only")


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_are_rounded_to_half_a_step_of_their_row(bits):
    weight = torch.randn(6, 4, 3, 3)
    weight[2] = 0
    values, scale = rounded_weight(weight, bits)
    assert values.dtype == torch.int8
    assert values.abs().max() <= 2 ** (bits - 1) - 1
    restored = values * scale.view(-1, 1, 1, 1)
    assert ((restored - weight).abs() <= scale.view(-1, 1, 1, 1) / 2 * (1 + 1e-6)).all()
    assert (values[2] == 0).all()


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(12, 5), torch.randn(3, 12)),
        (nn.Linear(12, 5, bias=False), torch.randn(2, 3, 12)),
        (nn.Conv1d(4, 6, 3, padding=1), torch.randn(2, 4, 9)),
        (nn.Conv2d(4, 6, 3, stride=2, groups=2, padding_mode="circular", padding=1), torch.randn(2, 4, 9, 9)),
        (nn.Conv3d(2, 3, 2), torch.randn(1, 2, 4, 4, 4)),
    ],
)
def test_a_static_layer_multiplies_rounded_inputs_with_rounded_weights(layer, x):
    values, scale = rounded_weight(layer.weight)
    wanted = copy.deepcopy(layer)
    wanted.weight.data = values * scale.view(-1, *[1] * (values.dim() - 1))
    torch_layers.static(layer, GRID)
    assert isinstance(layer, type(wanted))
    torch.testing.assert_close(layer(x), wanted(GRID.rounded(x)))
    torch.testing.assert_close(layer.weight, wanted.weight.data)


def test_a_dynamic_layer_reads_its_range_from_each_input():
    layer, x = nn.Linear(12, 5), torch.randn(3, 12)
    exact = layer(x), layer(1000 * x)
    torch_layers.dynamic(layer, 255)
    for got, wanted in zip((layer(x), layer(1000 * x)), exact, strict=True):
        assert (got - wanted).norm() / wanted.norm() < 0.02


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("options", [{}, {"stride": 1, "padding": 1}, {"ceil_mode": True}])
def test_a_pool_gives_the_numbers_of_rounding_after_it(options, flat, monkeypatch):
    pool, x = nn.MaxPool2d(2, **options), torch.randn(2, 3, 9, 9)
    wanted = [GRID.rounded(pool(x)), GRID.rounded(pool(x[0]))]
    torch_layers.pool(pool, GRID, flat)
    assert torch.equal(GRID.rounded(pool(x)), wanted[0]), "whether or not the layer after it rounds"
    monkeypatch.setattr(torch_onednn, "missing", lambda: "no oneDNN")
    assert torch.equal(pool(x), wanted[0])
    assert torch.equal(pool(x[0]), wanted[1])


@pytest.mark.parametrize("columns", [40, 33, 200])
def test_a_weight_only_layer_in_bfloat16_of_any_width(columns):
    """torch's own kernel reads past the end of rows that are no multiples of 16 wide."""
    layer, x = nn.Linear(columns, 10).eval(), torch.randn(3, columns)
    torch_layers.weight_only(layer)
    expected = layer(x)
    y = layer.bfloat16()(x.bfloat16()).float()
    assert (y - expected).norm() < 2**-6 * expected.norm()  # four roundings of 2^-9 each, and as much again


@pytest.mark.parametrize("columns", [48, 20])
def test_a_weight_only_layer_of_any_width_on_arm(columns, monkeypatch):
    """torch's own kernel for ARM reads past the end of such rows in all dtypes."""
    layer, x = nn.Linear(columns, 3).eval(), torch.randn(2, columns)
    torch_layers.weight_only(layer)
    expected = layer(x)
    called, product = [], torch._weight_int8pack_mm
    monkeypatch.setattr(torch_onednn, "X86", False)
    monkeypatch.setattr(torch, "_weight_int8pack_mm", lambda *given: called.append(given) or product(*given))
    torch.testing.assert_close(layer(x), expected)
    assert bool(called) == (columns % 16 == 0)


@pytest.mark.parametrize("layer", [nn.Linear(64, 5), nn.Linear(64, 16, bias=False), nn.Conv2d(4, 6, 3)])
def test_a_weight_only_layer_multiplies_rounded_weights(layer):
    x = torch.randn(3, 64) if isinstance(layer, nn.Linear) else torch.randn(2, 4, 9, 9)
    values, scale = rounded_weight(layer.weight)
    wanted = copy.deepcopy(layer)
    wanted.weight.data = values * scale.view(-1, *[1] * (values.dim() - 1))
    torch_layers.weight_only(layer)
    torch.testing.assert_close(layer(x), wanted(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("rows", "features"), [(1, 64), (10, 64), (16, 64), (33, 64), (16, 50), (16, 31)])
def test_four_bits_in_groups(rows, features):
    layer, x = nn.Linear(features, rows), torch.randn(2, 3, features)
    values, scale, middle = torch_int4.grouped(layer.weight, 32)
    groups = -(-features // 32)
    restored = ((values.view(rows, groups, 32) - 8) * scale[..., None] + middle[..., None]).flatten(1)[:, :features]
    half_a_step = scale.repeat_interleave(32, 1)[:, :features] / 2
    assert ((restored - layer.weight).abs() <= half_a_step * (1 + 1e-5)).all()
    wanted = F.linear(x, restored, layer.bias)
    torch_int4.linear(layer, 32)
    assert layer.weight_int4.nbytes == groups * 32 * (rows + -rows % 16) / 2
    torch.testing.assert_close(layer(x), wanted, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(layer.weight, restored, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "x",
    [torch.randn(4, 5, 64).transpose(0, 1)[0], torch.randn(64, 4).T],
    ids=["one token of each sequence, as a classifier takes it", "features not innermost"],
)
@pytest.mark.parametrize("recipe", QUANTIZERS)
def test_inputs_in_any_order_of_dimensions(recipe, x):
    torch.manual_seed(0)
    assert not x.is_contiguous()
    assert applied(nn.Sequential(nn.Linear(64, 8)), recipe, x).fidelity.ok


@pytest.mark.parametrize("recipe", QUANTIZERS)
def test_no_rows_at_all(recipe):
    """What an expert is given that no token was routed to."""
    layer = perfkit.apply(nn.Sequential(nn.Linear(64, 8)), recipe, example_inputs=(torch.randn(16, 64),)).model
    assert layer(torch.randn(2, 0, 64)).shape == (2, 0, 8)


class PaddedEncoder(nn.Module):
    """In inference torch packs the padded sequences between the layers."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), 2)

    def forward(self, x, padding):
        return self.encoder(x, src_key_padding_mask=padding)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("recipe", QUANTIZERS)
def test_an_encoder_of_padded_sequences(recipe):
    torch.manual_seed(0)
    padding = torch.arange(6) >= torch.tensor([6, 4, 2])[:, None]
    outcome = applied(PaddedEncoder(), recipe, torch.randn(3, 6, 32), padding)
    assert "encoder.layers.0.linear1" in outcome.effect.touched
    assert outcome.fidelity.ok


@pytest.mark.parametrize(("bits", "features"), [(8, 64), (4, 64), (4, 100), (4, 33)])
def test_embedding_rows(bits, features):
    layer, ids = nn.Embedding(50, features, padding_idx=3), torch.randint(0, 50, (4, 7))
    ids[0, 0] = 3
    exact = layer(ids)
    if bits == 4:
        torch_int4.embedding(layer, 32)
    else:
        torch_layers.embedding(layer)
    steps_of_range = {8: 127, 4: 15 / 2}[bits]
    assert (layer(ids) - exact).abs().max() <= exact.abs().max() / steps_of_range / 2 * 1.01
    assert (layer(ids)[0, 0] == 0).all() or bits == 4
    torch.testing.assert_close(layer.weight[ids], layer(ids))


def test_four_bits_that_would_take_more_bytes_are_not_made():
    model, x = nn.Sequential(nn.Embedding(50, 2), nn.Flatten(), nn.Linear(8, 16)), torch.randint(0, 50, (8, 4))
    effect = perfkit.optimize(model, "int4_weight_only", example_inputs=x).report.steps[0].effect
    assert effect.touched == ("2",)  # 16 rows of 16 bytes and 8 for scale and offset, instead of 16 rows of 32
    assert [(item.name, item.reason) for item in effect.skipped] == [
        ("0", "in groups of 32 its 400 bytes would be 450")
    ]


class ScaledEmbedding(nn.Embedding):
    """As in many language models."""

    def forward(self, ids, offset=0):
        return super().forward(ids + offset) * 4


class Standardized(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight / self.weight.std(), self.bias)


@pytest.mark.parametrize("recipe", ["int8", "int8_dynamic", "int8_weight_only"])
def test_a_forward_of_its_own_is_not_lost(recipe):
    torch.manual_seed(0)
    model = nn.Sequential(ScaledEmbedding(16, 32), Standardized(32, 32), nn.Linear(32, 4))
    found = applied(model, recipe, torch.arange(16))
    assert found.effect.touched == ("2",)
    assert {item.name: item.reason for item in found.effect.skipped} == {
        "0": "this ScaledEmbedding has a forward of its own, which would be lost",
        "1": "this Standardized has a forward of its own, which would be lost",
    }
    assert found.fidelity.ok
