"""Calls of the kernels for bytes, held against their references. Plain helpers, no tests."""

from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle

import pytest
import torch

from perfkit.kernels import _int8, _op
from perfkit.kernels._int8 import Grid
from perfkit.kernels._torch import Known
from perfkit.kernels.conv2d.problem import options
from perfkit.kernels.conv2d_int8 import cpu_shape, reference, torch_op
from perfkit.kernels.conv2d_int8.cases import CASES
from perfkit.kernels.linear_int8_static import cpu_shape as linear_shape
from perfkit.kernels.linear_int8_static.cases import CASES as LINEAR
from perfkit.kernels.linear_int8_static.reference import linear_int8_static as linear_reference
from perfkit.kernels.linear_int8_static.reference import rounded
from perfkit.kernels.linear_int8_static.torch_op import linear_int8_static
from perfkit.quantization import torch_layers, torch_native

OUTS = ({}, {"out_grid": Grid(0.5, 30, 100)}, {"out_dtype": torch.bfloat16})


def grid(top=255):
    return Grid(0.021 * 255 / top, top // 3, top)


def weights(*shape, bias=True):
    """Integers, their scales, and a bias."""
    w = torch.randint(-127, 128, shape, dtype=torch.int8)
    return w, torch.rand(shape[0]) * 0.01 + 1e-3, torch.randn(shape[0]) if bias else None


def assert_linear_is_the_reference(rows, inputs, outputs, top=255, outs=OUTS):
    x, given = torch.randn(rows, inputs) * 2, grid(top)
    for activation, bias in ((None, True), ("relu", False)):
        w, scale, bias = weights(outputs, inputs, bias=bias)
        for out in outs:
            for each in (x, rounded(x, given)):
                call = (each, w, scale, bias), {"grid": given, "activation": activation, **out}
                assert torch.equal(linear_int8_static(*call[0], **call[1]), linear_reference(*call[0], **call[1]))


def assert_convolution_is_the_reference(case, top=255, outs=OUTS, layouts=(False, True)):
    w, scale, bias = weights(case.outputs, case.image[1], *case.kernel)
    for last in layouts:
        x = torch.randn(case.image) * 2
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        for y_last in layouts:
            for out in outs:
                for each in (x, rounded(x, grid(top))):
                    assert_call_is_the_reference(case, each, (w, scale, bias), grid(top), out, y_last)


def assert_call_is_the_reference(case, x, layer, given, out, y_last=False):
    y = torch_op.conv2d_int8(x, *layer, grid=given, **case.options, **out, channels_last=y_last)
    settings = ("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1), ("activation", None), ("pool", None)
    asked = options(*(case.options.get(name, default) for name, default in settings))
    made = torch_op.problem(x, layer[0], asked, given, out.get("out_dtype", torch.float32))
    expected = reference.conv2d_int8(replace(made, y_grid=out.get("out_grid")), x, *layer)
    assert y.is_contiguous(memory_format=torch.channels_last if y_last else torch.contiguous_format)
    assert y.dtype == expected.dtype
    assert torch.equal(y, expected)


def all_calls():
    """Each once, for sanitizers, with one kind of output."""
    for sizes, out in zip(LINEAR, cycle(OUTS), strict=False):
        assert_linear_is_the_reference(*sizes, outs=(out,))
        yield
    for case, out in zip(CASES, cycle(OUTS), strict=False):
        assert_convolution_is_the_reference(case, outs=(out,))
        yield
    for rows, inputs, outputs in LINEAR[:6]:
        layer, x = torch.nn.Linear(inputs, outputs), torch.randn(rows, inputs)
        torch_layers.dynamic(layer, 255)
        with torch.no_grad():
            assert torch_native.product(layer, layer.bias, x, 255, torch.float32) is not None
        yield


@contextmanager
def kernels_pay():
    """Within it the kernels take whatever they can, on any CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_int8, "slower", lambda: None)
        patch.setattr(torch_native, "has", lambda _: False)
        for kernel, known in ((linear_shape, "_linears"), (cpu_shape, "_convs")):
            patch.setattr(kernel, "has", lambda _: False)
            patch.setattr(torch_native, known, Known(kernel.OP))
        _op._choose.cache_clear()
        yield
    _op._choose.cache_clear()
