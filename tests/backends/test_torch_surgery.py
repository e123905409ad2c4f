"""Torch models whose classes were made for them."""

import copy

import pytest

pytest.importorskip("torch")

import torch

from perfkit.backends.torch_copies import copied
from perfkit.backends.torch_surgery import around_forward, compile_in_place, parts


def doubled(forward):
    return lambda module, x: 2 * forward(module, x)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, copied])
def test_copies_keep_the_class_that_was_made_for_them(copy_of):
    """Also where the model's own __deepcopy__ makes one of the class that it knows, as torch.fx's does."""
    plain, x = torch.nn.Sequential(torch.nn.Linear(2, 2)), torch.ones(1, 2)
    for model in (torch.fx.symbolic_trace(plain), copy.deepcopy(plain)):
        kind = type(model)
        around_forward(model, doubled)
        compile_in_place(model, backend="eager")
        twin = copy_of(model)
        assert isinstance(twin, kind)
        assert twin._compiled_call_impl is not None
        assert torch.equal(twin(x), 2 * plain(x))
        with torch.no_grad():
            twin.get_parameter("0.weight").zero_()
        assert not torch.equal(twin(x), model(x)), "it has weights of its own"


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta state")
@pytest.mark.parametrize(
    ("layout", "block"),
    [("sparse_coo", None), ("sparse_csr", None), ("sparse_csc", None), ("sparse_bsr", (1, 1)), ("sparse_bsc", (1, 1))],
)
def test_the_parts_of_sparse_tensors_have_memory(layout, block):
    sparse = torch.eye(3).to_sparse(layout=getattr(torch, layout), blocksize=block)
    assert sum(part.untyped_storage().nbytes() for part in parts(sparse)) >= 3 * (4 + 8)  # a number, and where it is
