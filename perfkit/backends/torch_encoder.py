"""The ways of nn.TransformerEncoder around its layers in inference, left where those are no longer torch's own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from perfkit.backends.torch_surgery import derive


def leave_short_cuts(model: nn.Module) -> None:
    """Let every layer of an encoder be called as a layer, on padded sequences."""
    leave_fast_path(model)
    _leave_nested(model)


def leave_fast_path(model: nn.Module) -> None:
    """TransformerEncoderLayer's fast path reads its layers' weights and never calls them: take the other path."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0


def _leave_nested(model: nn.Module) -> None:
    """TransformerEncoder packs padded sequences for inference, which only torch's layers take; its outputs stay."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor:
            module.use_nested_tensor = False
            _unpacked(module)


def _unpacked(encoder: nn.TransformerEncoder) -> None:
    base = type(encoder)

    def forward(self, src, mask=None, src_key_padding_mask=None, is_causal=None):
        y = base.forward(self, src, mask, src_key_padding_mask, is_causal)
        if mask is not None or src_key_padding_mask is None or not _would_nest(self, src, src_key_padding_mask):
            return y
        nothing = y.new_zeros(y.size(-1))  # what is unpacked again, in places of padding
        return torch.where(
            src_key_padding_mask.bool()[..., None], nothing if self.norm is None else self.norm(nothing), y
        )

    derive(encoder, forward=forward)


def _would_nest(encoder: nn.TransformerEncoder, src: Tensor, padding: Tensor) -> bool:
    """Whether the whole model packs these sequences, as nn.TransformerEncoder.forward decides it."""
    first, checks = encoder.layers[0], encoder.mask_check
    if first.training or src.dim() != 3 or torch.is_autocast_enabled() or not torch.backends.mha.get_fastpath_enabled():
        return False
    if torch.is_grad_enabled() and (src.requires_grad or any(held.requires_grad for held in first.parameters())):
        return False
    if not checks:
        return True
    return not torch.compiler.is_compiling() and torch._nested_tensor_from_mask_left_aligned(src, ~padding.bool())
