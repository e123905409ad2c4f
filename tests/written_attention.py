"""Attention as models write it out: layers and what is done between them."""

import math

import torch
import torch.nn.functional as F
from torch import nn

WIDTH, HEADS, LENGTH = 16, 4, 5
DIM = WIDTH // HEADS


class Written(nn.Module):
    """A residual block.

    Args:
        fused: whether queries, keys and values are of one layer.
        drop: share of the weights that is dropped.
        heads: how many there are.
    """

    def __init__(self, fused=False, drop=0.0, heads=HEADS):
        super().__init__()
        self.norm, self.drop, self.count = nn.LayerNorm(WIDTH), nn.Dropout(drop), heads
        if fused:
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        else:
            self.q, self.v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.k = nn.Linear(WIDTH, WIDTH, bias=False)  # of a bias the gradient would be rounding alone
        self.out = nn.Linear(WIDTH, WIDTH)

    def heads(self, x):
        return x.view(x.size(0), x.size(1), self.count, -1).transpose(1, 2)

    def three(self, x, other=None):
        other = x if other is None else other
        return self.heads(self.q(x)), self.heads(self.k(other)), self.heads(self.v(other))


class Products(Written):
    """Separate layers, products and a softmax."""

    def forward(self, x):
        q, k, v = self.three(self.norm(x))
        weights = self.drop((q @ k.transpose(-2, -1) / math.sqrt(DIM)).softmax(-1))
        return x + self.out((weights @ v).transpose(1, 2).reshape(x.shape))


class Causal(Written):
    """Separate layers and torch's function."""

    def forward(self, x):
        q, k, v = self.three(self.norm(x))
        drop = self.drop.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=drop)
        return x + self.out(y.transpose(1, 2).contiguous().view(x.shape))


class Masked(Written):
    """One layer, split; a mask of the whole, and weights that are dropped by a function."""

    def forward(self, x):
        q, k, v = map(self.heads, self.qkv(self.norm(x)).split(WIDTH, dim=2))
        weights = torch.matmul(q, k.transpose(-2, -1)) * (1.0 / math.sqrt(DIM))
        mask = torch.ones(x.size(1), x.size(1)).tril().view(1, 1, x.size(1), x.size(1))
        weights = F.dropout(
            F.softmax(weights.masked_fill(mask == 0, float("-inf")), dim=-1), self.drop.p, self.training
        )
        return x + self.out((weights @ v).transpose(1, 2).contiguous().view(x.shape))


class Indexed(Written):
    """One layer, reshaped into three and heads; a mask for each head."""

    def __init__(self, **options):
        super().__init__(True, **options)
        self.register_buffer("mask", torch.randn(1, HEADS, LENGTH, LENGTH))

    def forward(self, x):
        qkv = self.qkv(self.norm(x)).reshape(*x.shape[:2], 3, self.count, DIM).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], attn_mask=self.mask)
        return x + self.out(y.transpose(1, 2).reshape(x.shape))


class Picked(Written):
    """One layer, reshaped and picked from; functions that are told by keywords."""

    def forward(self, x):
        qkv = self.qkv(self.norm(x)).unflatten(dim=-1, sizes=(3, self.count, DIM))
        q, k, v = (qkv[:, :, index].transpose(dim0=1, dim1=2) for index in range(3))
        weights = F.dropout((q @ k.mT).softmax(dim=-1), p=self.drop.p, training=self.training)
        return x + self.out((weights @ v).permute(dims=(0, 2, 1, 3)).flatten(start_dim=2))


class Beside(Written):
    """One layer in which queries, keys and values of a head lie beside each other."""

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).view(*x.shape[:2], self.count, -1).transpose(1, 2).chunk(3, -1)
        return x + self.out((torch.softmax(q @ k.mT / 2, -1) @ v).transpose(1, 2).flatten(2))


class Learned(Written):
    """Positions count by what is learned for each head."""

    def __init__(self, **options):
        super().__init__(**options)
        self.positions = nn.Parameter(torch.randn(HEADS, LENGTH, LENGTH))

    def forward(self, x):
        q, k, v = self.three(self.norm(x))
        weights = (q @ k.transpose(-2, -1) + self.positions).softmax(-1)
        return x + self.out((weights @ v).transpose(1, 2).reshape(x.shape))


class Otherwise(Written):
    """Queries that are normed over all heads, where `normed` is set."""

    normed = False

    def forward(self, x):
        h = self.norm(x)
        q = self.q(h)
        q, k, v = self.heads(self.norm(q) if self.normed else q), self.heads(self.k(h)), self.heads(self.v(h))
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


class Grouped(Written):
    """Two heads of keys and values for four of queries."""

    def __init__(self):
        super().__init__()
        self.k, self.v = nn.Linear(WIDTH, 2 * DIM, bias=False), nn.Linear(WIDTH, 2 * DIM)

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (y.unflatten(-1, (-1, DIM)).transpose(1, 2) for y in (self.q(h), self.k(h), self.v(h)))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return x + self.out(y.transpose(1, 2).flatten(-2))


class Einsum(Written):
    """What is not followed."""

    def forward(self, x):
        q, k, v = self.three(self.norm(x))
        weights = torch.einsum("bhld,bhsd->bhls", q, k).softmax(-1)
        return x + self.out(torch.einsum("bhls,bhsd->bhld", weights, v).transpose(1, 2).reshape(x.shape))


def models():
    return {
        "products": Products(drop=0.3),
        "by a function": Causal(drop=0.3),
        "masked": Masked(True, 0.3),
        "indexed": Indexed(),
        "picked": Picked(True, 0.3),
        "beside": Beside(True),
        "learned positions": Learned(),
        "otherwise": Otherwise(),
        "einsum": Einsum(),
        "two heads": Causal(heads=2),
        "grouped": Grouped(),
    }
