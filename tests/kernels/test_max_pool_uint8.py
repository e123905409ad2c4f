"""The max-pool of integers against plain torch, on every layout and ragged sizes."""

import pytest

pytest.importorskip("torch")

import torch
from max_pool_calls import CASES, images

from perfkit._errors import InvalidInputError
from perfkit.kernels import _native
from perfkit.kernels.max_pool_uint8 import torch_op
from perfkit.kernels.max_pool_uint8.reference import max_pool_uint8 as reference
from perfkit.kernels.max_pool_uint8.torch_op import max_pool_uint8

needs_compiler = pytest.mark.skipif(_native.find_compiler() is None, reason="no C++ compiler")


@needs_compiler
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(("shape", "size"), CASES)
def test_as_torch_has_it(shape, size, flat):
    for x in images(shape):
        y = max_pool_uint8(x, size, flat)
        assert torch.equal(y, reference(x, size))
        last = not flat and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@needs_compiler
def test_the_operator_keeps_its_promises():
    for x in images((2, 20, 6, 6)):
        for flat in (False, True):
            torch.library.opcheck(max_pool_uint8, (x, 2, flat))


@needs_compiler
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_vmap_is_more_rows(dim, monkeypatch):
    built, calls = torch_op.library, []
    monkeypatch.setattr(torch_op, "library", lambda: calls.append(1) or built())
    x = torch.randint(0, 256, (3, 2, 20, 7, 6), dtype=torch.uint8)
    y = torch.func.vmap(lambda x: max_pool_uint8(x, 2, False), dim)(x.movedim(0, dim))
    assert calls == [1]
    assert torch.equal(y, torch.stack([reference(each, 2) for each in x]))


@needs_compiler
def test_the_number_of_threads_changes_nothing():
    threads, (x, *_) = torch.get_num_threads(), images((7, 33, 9, 8))
    try:
        found = [torch.set_num_threads(count) or max_pool_uint8(x, 2, True) for count in (1, 2, 3)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(y, found[0]) for y in found)


@pytest.mark.parametrize(
    ("x", "size"),
    [
        (torch.zeros(2, 3, 4, dtype=torch.uint8), 2),
        (torch.zeros(1, 1, 4, 4), 2),
        (torch.zeros(1, 1, 4, 1, dtype=torch.uint8), 2),
        (torch.zeros(1, 1, 4, 4, dtype=torch.uint8), 0),
    ],
)
def test_what_it_cannot_take(x, size):
    with pytest.raises(InvalidInputError, match=r"expected \(N, C, H, W\)"):
        max_pool_uint8(x, size, False)
