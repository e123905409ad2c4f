"""Running an attention that a model writes out: what lies between its first layers and the last one, by heads."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import _StridedShard
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from perfkit.backends.torch_surgery import around_forward, derive
from perfkit.parallel.torch_attention import ROWS_OF_THREE, Heads
from perfkit.parallel.torch_chunks import taught
from perfkit.parallel.torch_flow import name_of, tensors_of


class ThreeParallel(ParallelStyle):
    """A linear layer of which queries, keys and values are three blocks of outputs: each process has its rows of each.

    The bias is whole on each, as that of nn.MultiheadAttention.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        taught()
        for name, placement in (("weight", ROWS_OF_THREE), ("bias", Replicate())):
            if (held := module._parameters[name]) is not None:
                spread = distribute_tensor(held, device_mesh, [placement], src_data_rank=self.src_data_rank)
                module.register_parameter(name, nn.Parameter(spread, requires_grad=held.requires_grad))
        heads = Heads(device_mesh.get_local_rank(), device_mesh.size(), device_mesh)

        def forward(self, x: Tensor) -> Tensor:
            x, bias = heads.taken(x, None if self.bias is None else self.bias.to_local())
            if bias is not None:
                bias = torch.cat([heads.mine(block, 0) for block in bias.chunk(3)])
            y = F.linear(x, self.weight.to_local(), bias)
            three = _StridedShard(y.dim() - 1, split_factor=3)
            return DTensor.from_local(y, device_mesh, [three], run_check=False)

        derive(module, forward=forward)
        return module


def by_heads(model: nn.Module, mesh: DeviceMesh) -> None:
    """Every call of the model runs what torch has no plan for, between the layers of an attention, by heads."""
    mode = _ByHeads(Heads(mesh.get_local_rank(), mesh.size(), mesh))

    def wrap(forward: Callable) -> Callable:
        def within(self, *args, **kwargs):
            with mode:
                return forward(self, *args, **kwargs)

        return within

    around_forward(model, wrap)


class _ByHeads(TorchFunctionMode):
    """Functions of distributed tensors: plain ones beside them are whole, and attention needs no other process."""

    def __init__(self, heads: Heads):
        super().__init__()
        self.heads = heads

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = list(tensors_of((args, kwargs)))
        if not any(isinstance(tensor, DTensor) for tensor in given):
            return function(*args, **kwargs)
        name = name_of(function)
        if name in ("chunk", "split") and _blocks(args[0]):
            return self._three(function, *args, **kwargs)
        if name in ("view", "reshape", "unflatten") and _blocks(args[0]):
            return self._apart(function, *args, **kwargs)
        if name in ("matmul", "__matmul__") and len(given) == 2 and _alike_by_heads(*given):
            return self._multiplied(*given)
        if name == "scaled_dot_product_attention":
            return self._attended(*args, **kwargs)
        if name == "dropout":
            return self._dropped(*args, **kwargs)
        if not all(isinstance(tensor, DTensor) for tensor in given):
            args, kwargs = tree_map(self._whole, (args, kwargs))
        return function(*args, **kwargs)

    def _whole(self, value: Any) -> Any:
        """A plain tensor is the same on every process."""
        if not isinstance(value, Tensor) or isinstance(value, DTensor):
            return value
        return DTensor.from_local(value, self.heads.mesh, [Replicate()], run_check=False)

    def _three(self, function: Callable, x: DTensor, *args: Any, **kwargs: Any) -> Any:
        """Queries, keys and values of an output that is three blocks."""
        pieces = function(torch.empty(x.shape, device="meta"), *args, **kwargs)
        if [piece.shape for piece in pieces] != [torch.Size([*x.shape[:-1], x.size(-1) // 3])] * 3:
            return function(x, *args, **kwargs)
        return self._apart(Tensor.unflatten, x, -1, (3, -1)).unbind(-2)

    def _apart(self, function: Callable, x: DTensor, *args: Any, **kwargs: Any) -> Tensor:
        """Queries, keys and values laid apart, as (..., 3, heads, ...): each process has its heads of all three.

        torch 2.11 does not cut a dimension of which it holds some rows here and there; later versions do the same.
        """
        shape = function(torch.empty(x.shape, device="meta"), *args, **kwargs).shape
        three, parts = x.dim() - 1, self.heads.parts
        if shape[: three + 1] != (*x.shape[:-1], 3) or shape[three + 1] % parts:
            return function(x, *args, **kwargs)
        own = x.to_local().reshape(*shape[: three + 1], shape[three + 1] // parts, *shape[three + 2 :])
        return DTensor.from_local(own, self.heads.mesh, [Shard(three + 1)], run_check=False)

    def _multiplied(self, a: DTensor, b: DTensor) -> Tensor:
        """Products of heads; torch 2.11 multiplies no batches of which a later dimension than the first is in parts."""
        return DTensor.from_local(a.to_local() @ b.to_local(), self.heads.mesh, a.placements, run_check=False)

    def _attended(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Of (batch, heads, …) by heads where their numbers allow; else every process computes the whole."""
        given = [self._whole(x) for x in (query, key, value)]
        mask = attn_mask.full_tensor() if isinstance(attn_mask, DTensor) else attn_mask
        even = all(x.dim() == 4 and x.size(1) % self.heads.parts == 0 for x in given)
        placement = Shard(1) if even else Replicate()
        q_BHLD, k_BHSD, v_BHSD = (x.redistribute(placements=[placement]).to_local() for x in given)
        if even:
            (mask,) = self.heads.taken(mask)
            if mask is not None and mask.dim() > 2 and mask.size(-3) > 1:
                mask = self.heads.mine(mask, mask.dim() - 3)
        if dropout_p and even:
            groups = q_BHLD.size(1) // k_BHSD.size(1) if enable_gqa else 1
            k_BHSD, v_BHSD = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (k_BHSD, v_BHSD))
            scores = q_BHLD * (scale or 1 / math.sqrt(q_BHLD.size(-1))) @ k_BHSD.transpose(-2, -1)
            if is_causal:
                mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            if mask is not None:
                scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
            y_BHLD = self.heads.dropped(torch._safe_softmax(scores, -1), dropout_p) @ v_BHSD
        else:
            y_BHLD = F.scaled_dot_product_attention(
                q_BHLD, k_BHSD, v_BHSD, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        return DTensor.from_local(y_BHLD, self.heads.mesh, [placement], run_check=False)

    def _dropped(self, x: DTensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        """Drawn for the whole, as every process does alike."""
        if not training:
            return x
        drawn = F.dropout(torch.ones(x.shape, dtype=x.dtype, device=x.device), p)
        mine = distribute_tensor(drawn, self.heads.mesh, x.placements, src_data_rank=None)
        return x.mul_(mine) if inplace else x * mine


def _blocks(x: Any) -> bool:
    return isinstance(x, DTensor) and x.placements == (_StridedShard(x.dim() - 1, split_factor=3),)


def _alike_by_heads(a: Any, b: Any) -> bool:
    return (
        isinstance(a, DTensor)
        and isinstance(b, DTensor)
        and a.dim() == b.dim() == 4
        and a.placements == b.placements == (Shard(1),)
        and a.size(1) == b.size(1)
    )
