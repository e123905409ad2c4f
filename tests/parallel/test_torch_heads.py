"""Which linear layers of a model make an attention, as one call shows it."""

import pytest

pytest.importorskip("torch")

import torch
import torch.nn.functional as F
from torch import nn
from written_attention import LENGTH, WIDTH, Written, models

from perfkit.parallel.torch_heads import HeadFlow


def found(model, *inputs):
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    dropouts = {name: module for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
    return HeadFlow(linears, dropouts).call(model, inputs or (torch.randn(2, LENGTH, WIDTH),), {})


@pytest.mark.parametrize("name", sorted(set(models()) - {"einsum"}))
def test_an_attention_is_found_with_its_layers_heads_and_dropouts(name):
    model = models()[name]
    (attention,) = found(model.train())
    fused = hasattr(model, "qkv")
    assert attention.out == "out"
    assert attention.blocks == ({"qkv": 1 if name == "beside" else 3} if fused else {"q": 1, "k": 1, "v": 1})
    assert attention.counts == {"two heads": {2}, "grouped": {2, 4}}.get(name, {4})
    assert attention.dropouts == ({"drop"} if name == "products" else set())


def test_each_block_of_a_model_is_found():
    blocks = nn.Sequential(*(models()[name] for name in ("products", "masked", "einsum", "by a function")))
    assert [attention.out for attention in found(blocks)] == ["0.out", "1.out", "3.out"]


def test_a_batch_of_one_and_a_single_place_hide_no_heads():
    (attention,) = found(models()["products"], torch.randn(1, 1, WIDTH))
    assert attention.counts == {4}


class Between(Written):
    """Something else is done with the queries, or with what comes out."""

    def __init__(self, queries=lambda self, q: q, outputs=lambda self, y: y):
        super().__init__()
        self.queries, self.outputs = queries, outputs
        self.other = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = self.three(x)
        y = F.scaled_dot_product_attention(self.queries(self, q), k, v).transpose(1, 2).flatten(2)
        return self.out(self.outputs(self, y))


UNFOUND = {
    "queries are normed over places": {"queries": lambda self, q: F.normalize(q, dim=2)},
    "a value is read": {"queries": lambda self, q: q * float(q.max())},
    "heads are mixed": {"queries": lambda self, q: q.flip(1)},
    "heads are sorted": {"queries": lambda self, q: q.softmax(1)},
    "heads are chosen": {"queries": lambda self, q: q[:, :1].expand_as(q)},
    "batch and heads are one": {"queries": lambda self, q: q.flatten(0, 1).view(q.shape)},
    "what comes out is normed": {"outputs": lambda self, y: self.norm(y)},
    "what comes out is taken twice": {"outputs": lambda self, y: y + 0 * self.other(y)},
    "what comes out is mixed with the inputs": {"outputs": lambda self, y: y.flip(-1)},
}


@pytest.mark.parametrize("name", UNFOUND)
def test_what_needs_all_heads_at_once_is_no_attention_by_heads(name):
    assert found(Between(**UNFOUND[name])) == ()


def test_heads_that_are_given_out_are_needed_whole():
    class Returning(Written):
        def forward(self, x):
            q, k, v = self.three(x)
            weights = (q @ k.mT).softmax(-1)
            return self.out((weights @ v).transpose(1, 2).flatten(2)), weights

    assert found(Returning()) == ()


def test_layers_without_heads_are_no_attention():
    assert found(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))) == ()
