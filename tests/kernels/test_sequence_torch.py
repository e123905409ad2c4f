"""`torch.ops.perfkit.int8_layers`: the numbers of the references, in a row; and what it was told of is followed."""

import gc

import pytest

pytest.importorskip("torch")

import torch
from int8_calls import grid, weights

from perfkit import InvalidInputError
from perfkit.kernels import _native
from perfkit.kernels._int8 import Grid
from perfkit.kernels.conv2d_int8.torch_op import conv2d_int8
from perfkit.kernels.linear_int8_static.reference import rounded
from perfkit.kernels.linear_int8_static.torch_op import linear_int8_static
from perfkit.kernels.sequence import torch_op
from perfkit.kernels.sequence.torch_op import Layer, written

if _native.find_compiler() is None:
    pytest.skip("no C++ compiler is installed", allow_module_level=True)

TOP = 127  # without VNNI, too
GRID, OTHER = grid(TOP), Grid(0.05, 3, TOP)
CONV = (1, 1), (1, 0, 1, 0), (1, 1)
run = torch.ops.perfkit.int8_layers


def both(last=False):
    """Images through two convolutions and two linear layers, the input rounded beforehand or not."""
    tensors = [*weights(6, 3, 3, 3), *weights(8, 6, 3, 3, bias=False), *weights(12, 8 * 3 * 3), *weights(5, 12)]
    layers = [
        Layer(GRID, "relu", conv=CONV, pool=2),
        Layer(OTHER, conv=((1, 1), (1, 1, 1, 1), (1, 1))),
        Layer(GRID, "relu", rows=True),
        Layer(OTHER),
    ]
    x = torch.randn(4, 3, 7, 7)
    return x.contiguous(memory_format=torch.channels_last) if last else x, tensors, layers


def one_by_one(x, tensors, layers):
    for at, layer in enumerate(layers):
        own, asked = tensors[3 * at : 3 * at + 3], {"grid": Grid(*layer.grid), "activation": layer.activation}
        if layer.conv:
            (stride, (top, bottom, left, right), dilation) = layer.conv
            padding = (top, bottom), (left, right)
            x = conv2d_int8(
                x, *own, stride=stride, padding=padding, dilation=dilation, pool=layer.pool, **asked
            ).contiguous()
        else:
            x = linear_int8_static(x.flatten(1) if layer.rows else x, *own, **asked)
    return x


@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_layers_in_a_row_are_the_layers_one_by_one(count, last):
    x, tensors, layers = both(last)
    tensors, layers = tensors[: 3 * count], layers[:count]
    expected = one_by_one(x, tensors, layers)
    for each in (x, rounded(x, GRID)):
        y = run(each, tensors, written(layers))
        assert torch.equal(y, expected)
        assert y.stride() == torch_op._int8_layers_fake(each, tensors, written(layers)).stride()
    for lies in (False, True) if layers[-1].conv else (None,):
        end = layers[-1]._replace(out=tuple(OTHER), last=lies)
        y = run(x, tensors, written([*layers[:-1], end]))
        assert torch.equal(y, rounded(expected, OTHER))
        assert lies is None or torch_op.channels_last(y) is lies
    assert run(x[:0], tensors, written(layers)).shape == (0, *expected.shape[1:])
    assert run(x, tensors, written([*layers[:-1], layers[-1]._replace(out="bfloat16")])).dtype == torch.bfloat16


def test_writes_and_other_tensors_in_their_place_are_followed():
    x, tensors, layers = both()
    text = written(layers)
    for at in range(len(tensors)):
        if tensors[at] is None:
            continue
        run(x, tensors, text)
        tensors[at].neg_() if tensors[at].dtype == torch.int8 else tensors[at].mul_(0.5)
        assert torch.equal(run(x, tensors, text), one_by_one(x, tensors, layers))
        tensors = [*tensors[:at], tensors[at].clone(), *tensors[at + 1 :]]
        assert torch.equal(run(x, tensors, text), one_by_one(x, tensors, layers))
    assert tensors[0] in torch_op._kept
    before = len(torch_op._kept)
    del tensors
    gc.collect()
    assert len(torch_op._kept) < before, "what was kept goes with the first weight"


def test_scales_that_do_not_keep_the_order_are_computed_in_plain_operations():
    x, tensors, layers = both()
    tensors[1][0], tensors[7][2] = -tensors[1][0], 0.0
    y = run(x, tensors[:3], written([layers[0]._replace(activation=None, pool=1)]))
    whole = torch.nn.functional.pad(rounded(x, GRID).double() - GRID.zero, (1, 0, 1, 0))
    wanted = torch.nn.functional.conv2d(whole, tensors[0].double()) * GRID.scale * tensors[1].double()[:, None, None]
    torch.testing.assert_close(y.double(), wanted + tensors[2].double()[:, None, None], rtol=1e-5, atol=1e-5)
    assert run(x, tensors, written(layers)).isfinite().all()


def test_what_does_not_fit_is_refused():
    x, tensors, layers = both()
    with pytest.raises(InvalidInputError, match=r"x is torch\.float64"):
        run(x.double(), tensors, written(layers))
    with pytest.raises(InvalidInputError, match=r"expected \(\.\.\., K\), \(N, K\)"):
        run(torch.randn(2, 11), tensors[-3:], written([Layer(OTHER)]))
    with pytest.raises(InvalidInputError, match="weight_scale is"):
        run(x, [tensors[0], tensors[1][:2], None], written(layers[:1]))
    with pytest.raises(InvalidInputError, match="the grid is"):
        run(torch.randn(2, 12), tensors[-3:], written([Layer((0.1, 0, 300))]))


def test_made_in_inference_mode():
    with torch.inference_mode():
        x, tensors, layers = both()
        for _ in range(2):
            tensors[0].neg_()
            assert torch.equal(run(x, tensors, written(layers)), one_by_one(x, tensors, layers))


def test_torch_checks_the_operator():
    x, tensors, layers = both()
    torch.library.opcheck(run.default, (x, tensors, written(layers)), test_utils=("test_schema", "test_faketensor"))
