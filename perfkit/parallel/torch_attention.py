"""nn.MultiheadAttention by heads: each process computes the attention of some, and their outputs are added up.

It holds its heads' rows of the queries', keys' and values' projections, and its columns of the output's. Where the
three lie in one weight, [q; k; v], its part is some rows of each, which is what torch's `_StridedShard` means:
`full_tensor()` is the weight as it was. The bias of the three is whole on each: it is small, and FSDP2 could not cut
such a part along its one dimension.

Source: https://arxiv.org/abs/1909.08053 (Megatron-LM), section 3
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed._functional_collectives as functional
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import _StridedShard

from perfkit.backends.torch_surgery import derive
from perfkit.parallel.torch_chunks import taught

_torch: Any = F
"""For what torch's stubs leave out."""

ROWS_OF_THREE = _StridedShard(0, split_factor=3)
"""Some rows of each of three that lie below each other."""

PLACEMENTS: dict[str, Placement] = {
    "in_proj_weight": ROWS_OF_THREE,
    **{f"{of}_proj_weight": Shard(0) for of in "qkv"},
    "in_proj_bias": Replicate(),
}
OUTPUTS: dict[str, Placement] = {"weight": Shard(1), "bias": Replicate()}


@dataclass(frozen=True)
class Heads:
    """Which heads a process has.

    Args:
        part, parts: its number, and of how many.
        mesh: the processes that have the others; None to leave out what is sent, for timing.
    """

    part: int
    parts: int
    mesh: DeviceMesh | None

    def mine(self, whole: Tensor, dim: int) -> Tensor:
        """The part of a dimension that goes over all heads."""
        return whole.chunk(self.parts, dim)[self.part]

    def taken(self, *whole: Tensor | None) -> list[Any]:
        """Tensors that every process has; what is computed of them here is a part of their gradients."""
        learning: list[Tensor] = []
        for one in whole:  # `is`, since torch 2.11 compiles no `id` of what is computed on the way
            if one is not None and one.requires_grad and not any(one is other for other in learning):
                learning.append(one)
        if self.mesh is None or not learning or not torch.is_grad_enabled():
            return list(whole)
        taken = list(whole)
        for old, new in zip(learning, _AddedUp.apply(self.mesh, *learning), strict=True):
            taken = [new if one is old else one for one in taken]
        return taken

    def dropped(self, weights_BHLS: Tensor, p: float) -> Tensor:
        """Of these heads; drawn for all of them alike on every process, as the whole attention would."""
        batch, own, length, keys = weights_BHLS.shape
        all_heads = batch, own * self.parts, length, keys
        drawn = torch.ones(all_heads, dtype=weights_BHLS.dtype, device=weights_BHLS.device)
        return weights_BHLS * self.mine(F.dropout(drawn, p, training=True), 1)

    def added_up(self, part: Tensor) -> Tensor:
        return self._whole(part, Partial())

    def gathered(self, part: Tensor, dim: int) -> Tensor:
        return self._whole(part, Shard(dim))

    def _whole(self, part: Tensor, placement: Placement) -> Tensor:
        if self.mesh is None:
            return part
        spread = DTensor.from_local(part, self.mesh, [placement], run_check=False)
        return spread.redistribute(placements=[Replicate()]).to_local()


class HeadParallel(ParallelStyle):
    """An nn.MultiheadAttention by heads; its inputs and outputs are whole on every process."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, nn.MultiheadAttention)
        taught()
        for owner, placements in ((module, PLACEMENTS), (module.out_proj, OUTPUTS)):
            for name, held in list(owner.named_parameters(recurse=False)):
                spread = distribute_tensor(held, device_mesh, [placements[name]], src_data_rank=self.src_data_rank)
                owner.register_parameter(name, nn.Parameter(spread, requires_grad=held.requires_grad))
        attend_with(module, Heads(device_mesh.get_local_rank(), device_mesh.size(), device_mesh))
        return module


def unsplit(module: nn.MultiheadAttention) -> str | None:
    """Why an attention cannot be split by heads in any number of parts; None where it can be."""
    if type(module).forward is not nn.MultiheadAttention.forward:
        return "its forward is not nn.MultiheadAttention's own"
    if module.bias_k is not None or module.bias_v is not None or module.add_zero_attn:
        return "add_bias_kv and add_zero_attn put a key and a value of their own beside those that are given"
    held = {name for name, _ in module.named_parameters()}
    weights = {"in_proj_weight"} if module._qkv_same_embed_dim else {f"{of}_proj_weight" for of in "qkv"}
    if held - {"in_proj_bias", "out_proj.bias"} != weights | {"out_proj.weight"}:
        return "a weight is computed from others, or it holds more than its projections"
    return None


def part_alone(module: nn.MultiheadAttention, parts: int) -> nn.MultiheadAttention:
    """What the first of so many processes computes of a copy's attention, without what is sent; for timing."""
    with torch.no_grad():
        for name, held in list(module.named_parameters(recurse=False)):
            if name != "in_proj_bias":
                blocks = held.chunk(3 if name == "in_proj_weight" else 1)
                rows = torch.cat([block.chunk(parts)[0] for block in blocks])
                module.register_parameter(name, nn.Parameter(rows))
        columns = module.out_proj.weight.chunk(parts, 1)[0].contiguous()
        module.out_proj.register_parameter("weight", nn.Parameter(columns))
    attend_with(module, Heads(0, parts, None))
    return module


def attend_with(module: nn.Module, heads: Heads) -> None:
    """Give an attention whose weights are a part already the forward of that part."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        _torch._mha_shape_check(query, key, value, key_padding_mask, attn_mask, self.num_heads)
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal says that attn_mask is the causal one: pass attn_mask as well")
        batched, batch_dim = query.dim() == 3, 0 if self.batch_first or query.dim() == 2 else 1
        key_padding_mask, attn_mask = _masks(key_padding_mask, attn_mask, query.dtype)
        given = heads.taken(query, key, value, _held(self.in_proj_bias), key_padding_mask, attn_mask)
        query, key, value, bias, key_padding_mask, attn_mask = given
        q_BHLD, k_BHSD, v_BHSD = (
            _by_heads(x if batched else x.unsqueeze(0), batch_dim, self.head_dim)
            for x in _projected(self, heads, query, key, value, bias)
        )
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else _one_mask(key_padding_mask, attn_mask, q_BHLD.size(0), self.num_heads, heads)
        dropout = self.dropout if self.training else 0.0
        weights_BHLS = None
        if need_weights or dropout:
            if causal:
                mask = _one_mask(None, attn_mask, q_BHLD.size(0), self.num_heads, heads)
            weights_BHLS = _weights(q_BHLD, k_BHSD, mask, need_weights)
            if dropout:
                weights_BHLS = heads.dropped(weights_BHLS, dropout)
            y_BHLD = weights_BHLS @ v_BHSD
        else:
            y_BHLD = F.scaled_dot_product_attention(q_BHLD, k_BHSD, v_BHSD, mask, is_causal=causal)
        y = y_BHLD.permute(2, 0, 1, 3).flatten(2)  # in memory as torch's own: dropout draws in the order of memory
        y_LBE = heads.added_up(F.linear(y, _held(self.out_proj.weight)))
        if self.out_proj.bias is not None:
            y_LBE = y_LBE + _held(self.out_proj.bias)
        told = None
        if need_weights:
            told = (
                heads.added_up(weights_BHLS.sum(1) / self.num_heads)
                if average_attn_weights
                else heads.gathered(weights_BHLS, 1)
            )
        if not batched:
            return y_LBE.squeeze(1), None if told is None else told.squeeze(0)
        return y_LBE.transpose(0, 1 - batch_dim), told

    derive(module, forward=forward)


class _AddedUp(torch.autograd.Function):
    """Tensors as they are; their gradients are added up over all processes, in one message for each dtype."""

    @staticmethod
    def forward(ctx: Any, mesh: DeviceMesh, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.mesh = mesh
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        found: list[Tensor] = list(gradients)
        for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
            places = [place for place, gradient in enumerate(gradients) if gradient.dtype == dtype]
            flat = torch.cat([gradients[place].reshape(-1) for place in places])
            flat = functional.wait_tensor(functional.all_reduce(flat, "sum", ctx.mesh))
            parts = flat.split([gradients[place].numel() for place in places])
            for place, part in zip(places, parts, strict=True):
                found[place] = part.view(gradients[place].shape)
        return None, *found


def _held(tensor: Any) -> Any:
    """What this process holds of a weight; asked in words that torch.compile understands."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _masks(padding: Tensor | None, mask: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Both as what is added to scores, as torch makes them."""
    padding = F._canonical_mask(padding, "key_padding_mask", F._none_or_dtype(mask), "attn_mask", dtype)
    return padding, F._canonical_mask(mask, "attn_mask", None, "", dtype, False)


def _projected(
    module: Any, heads: Heads, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
) -> Sequence[Tensor]:
    """Queries, keys and values of these heads, in one product where they are of one tensor."""
    biases: list[Any] = [None] * 3 if bias is None else [heads.mine(one, 0) for one in bias.chunk(3)]
    if module.in_proj_weight is None:
        weights = tuple(_held(getattr(module, f"{of}_proj_weight")) for of in "qkv")
    else:
        three = _held(module.in_proj_weight)
        if query is key and key is value:
            return F.linear(query, three, None if bias is None else torch.cat(biases)).chunk(3, -1)
        weights = three.chunk(3)
    return [F.linear(x, weight, one) for x, weight, one in zip((query, key, value), weights, biases, strict=True)]


def _by_heads(x: Tensor, batch_dim: int, head_dim: int) -> Tensor:
    """Of (B, T, features) or (T, B, features), (B, heads, T, features of a head)."""
    return x.transpose(0, batch_dim).unflatten(-1, (-1, head_dim)).transpose(1, 2)


def _one_mask(padding: Tensor | None, mask: Tensor | None, batch: int, all_heads: int, heads: Heads) -> Tensor | None:
    """What is added to scores: of (L, S) or (B · all heads, L, S), and of (B, S) or (S,); None where it is nothing."""
    if mask is not None and mask.dim() == 3:
        mask = heads.mine(mask.unflatten(0, (batch, all_heads)), 1)
    if padding is not None:
        padding = padding.view(batch, 1, 1, -1)
    return mask + padding if mask is not None and padding is not None else mask if padding is None else padding


def _weights(q_BHLD: Tensor, k_BHSD: Tensor, mask: Tensor | None, returned: bool) -> Tensor:
    """What each key counts for each query.

    Where no key may be looked at, torch gives nan in weights that are returned, and else 0.
    """
    scores = q_BHLD * q_BHLD.size(-1) ** -0.5 @ k_BHSD.transpose(-2, -1)
    scores = scores if mask is None else scores + mask
    return scores.softmax(-1) if returned else torch._safe_softmax(scores, -1)
