"""What the tests of Triton kernels stand on: a kernel runs in the interpreter, and a wrong one fails its test."""

import os

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

import torch
import triton
import triton.language as tl
from triton_interpreter import interpreted


@triton.jit
def doubled(x, y, size, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, 2 * tl.load(x + i, mask=i < size), mask=i < size)


@interpreted
def test_a_kernel_runs_on_cpu_tensors():
    x, y = torch.randn(5), torch.zeros(5)
    doubled[(1,)](x, y, 5, BLOCK=8)
    torch.testing.assert_close(y, 2 * x, rtol=0, atol=0)


@interpreted
def wrong(by):
    raise ValueError(f"off by {by}")


def test_what_fails_there_fails_here():
    with pytest.raises(pytest.fail.Exception, match="off by 3"):
        wrong(by=3)


@interpreted
def skips():
    pytest.skip("not here")


def test_what_skips_there_skips_here():
    with pytest.raises(pytest.skip.Exception, match="not here"):
        skips()


def test_this_process_stays_as_it_was():
    assert os.environ.get("TRITON_INTERPRET") != "1"
    assert isinstance(doubled, triton.runtime.jit.JITFunction)
