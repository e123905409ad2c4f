"""What test_sanitizer.py runs in a process with AddressSanitizer: every CPU kernel on ragged sizes."""

from dataclasses import replace

import torch
from int8_calls import all_calls as int8
from max_pool_calls import CASES as POOLS
from max_pool_calls import images
from torch import nn

from perfkit.kernels._torch import Threads
from perfkit.kernels.conv2d import cases, conv2d
from perfkit.kernels.linear import Problem as LinearProblem
from perfkit.kernels.linear import cpu_kernel as linear_kernel
from perfkit.kernels.max_pool_uint8.torch_op import max_pool_uint8
from perfkit.kernels.rnn import cpu_kernel
from perfkit.kernels.rnn.problem import Problem
from perfkit.kernels.rnn.torch_stack import empty_saved
from perfkit.quantization.torch_rnn_int8 import quantize_rnn

RECURRENT = (nn.LSTM, nn.GRU, nn.RNN)
SIZES = [(1, 1, 1, 1, 1), (7, 17, 2, 5, 2), (33, 50, 3, 9, 1)]
"""Inputs, hidden units, batch rows, steps, layers."""


def rnn_int8():
    for kind in RECURRENT:
        for inputs, hidden, batch, steps, layers in (*SIZES, (5, 70, 11, 3, 2)):
            module = kind(inputs, hidden, layers, bidirectional=layers > 1).eval()
            x = torch.randn(steps, batch, inputs)
            quantize_rnn(module)
            with torch.inference_mode():
                module(x)
                lengths = torch.arange(batch).remainder(steps).add(1)
                module(nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False))
            yield


def conv2d_and_gradients():
    chunked = cases.Case(2, 16, 40, 43, 5, (3, 3), {"activation": "relu", "pool": 2, "padding": 1})
    for case in (*cases.CASES, chunked):
        for dtype in (torch.float32, torch.bfloat16):
            for layout in (torch.contiguous_format, torch.channels_last):
                x = torch.randn(case.image, dtype=dtype).to(memory_format=layout).requires_grad_()
                weight, bias = (
                    torch.randn(size, dtype=dtype, requires_grad=True) for size in (case.weight, case.outputs)
                )
                y = conv2d(x, weight, bias if case.bias else None, **case.options, implementation="cpu")
                y.sum().backward()
                with torch.no_grad():
                    conv2d(x, weight, bias if case.bias else None, **case.options, implementation="cpu")
            yield


def rnn_and_gradients():
    """Both dtypes, layers side by side, padded and packed rows; threads share the units of the last size."""
    for kind in RECURRENT:
        for inputs, hidden, batch, steps, layers in (*SIZES, (5, 330, 1, 3, 1)):
            for dtype in (torch.float32, torch.bfloat16):
                module = kind(inputs, hidden, layers, bidirectional=layers > 1).to(dtype)
                stack = layers * (2 if layers > 1 else 1)
                h0 = torch.zeros(stack, batch, hidden, dtype=dtype)
                problem = Problem(
                    "torch", "cpu", str(dtype)[6:], module.mode, steps, batch, inputs, hidden, layers, stack // layers
                )
                weights = [tuple(weight.detach() for weight in direction) for direction in module.all_weights]
                x, lengths = torch.randn(steps, batch, inputs, dtype=dtype), torch.arange(batch).remainder(steps).add(1)
                lengths[0] = steps
                packed = nn.utils.rnn.pack_padded_sequence(x, lengths.sort(descending=True).values)
                for ragged, x_, rows in (
                    ("no", x, None),
                    ("lengths", x, lengths),
                    ("packed", packed.data, packed.batch_sizes),
                ):
                    call = replace(problem, ragged=ragged), x_, rows, h0, h0, weights, False
                    saved = empty_saved(call[0], x_)
                    cpu_kernel.forward(*call, None, None, None)
                    y, hn, _ = cpu_kernel.forward(*call, *saved)
                    cpu_kernel.backward(*call, y, *saved, torch.ones_like(y), hn, hn)
            yield


def max_pool():
    for shape, size in POOLS:
        for x in images(shape):
            for flat in (False, True):
                max_pool_uint8(x, size, flat)
        yield


def linear():
    for rows, inputs, outputs in ((1, 1, 1), (2, 33, 9), (5, 130, 17), (13, 5408, 10), (70, 257, 131)):
        for dtype in (torch.float32, torch.bfloat16):
            x, weight, bias = (torch.randn(size, dtype=dtype) for size in ((rows, inputs), (outputs, inputs), outputs))
            problem = LinearProblem("cpu", str(dtype)[6:], rows, inputs, outputs, "relu")
            for given in (bias, None):
                linear_kernel.caller(problem, (rows,))(x, weight, given)
            linear_as_jax_has_it(problem, x, weight.T.contiguous(), bias.float())
        yield


def linear_as_jax_has_it(problem, x, weight, bias):
    library = linear_kernel.library()
    if not library.perfkit_linear_has_across(problem.dtype == "bfloat16"):
        return
    library.perfkit_linear_across.argtypes = library.perfkit_linear.argtypes
    dtypes = {"weight_dtype": str(weight.dtype)[6:], "out_dtype": str(x.dtype)[6:]}
    told = linear_kernel.told(replace(problem, framework="jax", **dtypes))
    y = torch.empty(problem.rows, problem.outputs, dtype=x.dtype)
    failed = library.perfkit_linear_across(
        told, *(tensor.data_ptr() for tensor in (x, weight, bias, y)), Threads.of_torch()
    )
    assert not failed
    torch.testing.assert_close(y, torch.relu(x @ weight + bias.to(x.dtype)), rtol=2e-2, atol=0.5)


def main():
    count = sum(
        1 for kernel in (rnn_int8, conv2d_and_gradients, rnn_and_gradients, max_pool, linear, int8) for _ in kernel()
    )
    print(count, "cases, all of their calls under AddressSanitizer")
