"""FLOPs of torch's operators, where torch's own counter has none or counts by another convention than `flops.py`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.flop_counter import flop_registry

from perfkit.profiling import flops


def count(operator: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> float:
    """Of one call of `operator`, an `OpOverload` or a higher-order one; 0 for what holds no products."""
    name = name_of(operator)
    if name in _FORMULAS:
        return float(_FORMULAS[name](*args, **kwargs))
    formula = flop_registry.get(getattr(operator, "_overloadpacket", operator))
    return float(formula(*args, **kwargs, out_val=output)) if formula else 0.0


def name_of(operator: Any) -> str:
    """ "aten::addmm", as the profiler calls it."""
    return operator._schema.name if hasattr(operator, "_schema") else operator.name()


def counted(operator: Any) -> bool:
    """Whether there is a rule for it: such are not taken apart."""
    return name_of(operator) in _FORMULAS or operator._overloadpacket in flop_registry


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    *batch, heads, queries, size = query.shape
    return flops.attention(math.prod(batch), heads, queries, key.shape[-2], size, value.shape[-1])


def _attention_backward(_: Tensor, query: Tensor, key: Tensor, value: Tensor, *__: Any, **___: Any) -> int:
    return flops.backward(_attention(query, key, value))


def _flex_attention_backward(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return flops.backward(_attention(query, key, value))


def _linear(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return flops.linear(x.numel() // max(x.shape[-1], 1), weight.shape[-1], weight.shape[0])


def _product(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """(…, K) @ (K, …)."""
    return 2 * a.numel() * (b.numel() // max(b.shape[0], 1))


def _added_product(_: Tensor, a: Tensor, b: Tensor, *__: Any, **___: Any) -> int:
    return _product(a, b)


def _added_batches(_: Tensor, a: Tensor, b: Tensor, *__: Any, **___: Any) -> int:
    return 2 * a.numel() * b.shape[-1]


def _transposed_product(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return 2 * x.numel() * weight.shape[0]


def _self_attention(query: Tensor, key: Tensor, _: Tensor, width: int, heads: int, *__: Any, **___: Any) -> int:
    return flops.multi_head_attention(query.shape[0], heads, query.shape[1], key.shape[1], width)


def _encoder_layer(x: Tensor, width: int, heads: int, *rest: Any, **_: Any) -> int:
    inner = rest[11].shape[0]  # ffn_weight_1
    if x.is_nested:
        return sum(flops.transformer_block(1, heads, part.shape[0], width, inner) for part in x.unbind())
    return flops.transformer_block(x.shape[0], heads, x.shape[1], width, inner)


def _mkldnn_rnn(x: Tensor, w_input: Tensor, w_hidden: Tensor, *_: Any, **__: Any) -> int:
    return 2 * _rows(x) * (w_input.numel() + w_hidden.numel())


def _mkldnn_rnn_backward(x: Tensor, w_input: Tensor, w_hidden: Tensor, *_: Any, **__: Any) -> int:
    own = 0 if x.requires_grad else 2 * _rows(x) * w_input.numel()
    return flops.backward(_mkldnn_rnn(x, w_input, w_hidden), own)


def _cudnn_rnn(x: Tensor, weights: list[Tensor], *_: Any, **__: Any) -> int:
    return 2 * _rows(x) * _matrices(weights)


def _cudnn_rnn_backward(x: Tensor, weights: list[Tensor], *rest: Any, **_: Any) -> int:
    bidirectional, (input_wanted, *_) = rest[15], rest[19]
    own = 0 if input_wanted else 2 * _rows(x) * weights[0].numel() * (2 if bidirectional else 1)
    return flops.backward(_cudnn_rnn(x, weights), own)


def _rnn(x: Tensor, *rest: Any, **_: Any) -> int:
    return 2 * _rows(x) * _matrices(rest[3])


def _rnn_backward(x: Tensor, *rest: Any, **_: Any) -> int:
    weights, bidirectional = rest[3], rest[13]
    own = 0 if x.requires_grad else 2 * _rows(x) * weights[0].numel() * (2 if bidirectional else 1)
    return flops.backward(_rnn(x, *rest), own)


def _conv2d(x: Tensor, weight: Tensor, _bias: Any, stride: Any, padding: Any, dilation: Any, *_: Any, **__: Any) -> int:
    taps = weight.shape[2:]
    positions = [
        (size + before + after - spread * (tap - 1) - 1) // step + 1
        for size, before, after, spread, tap, step in zip(
            x.shape[2:], padding[::2], padding[1::2], dilation, taps, stride, strict=True
        )
    ]
    return 2 * x.shape[0] * math.prod(positions) * weight.numel()


def _conv2d_backward(x: Tensor, weight: Tensor, *rest: Any, **_: Any) -> int:
    options, wanted = rest[3:6], rest[9]
    return _conv2d(x, weight, None, *options) * sum(wanted[:2])


def _rnn_int8(x: Tensor, *rest: Any, **_: Any) -> int:
    from perfkit.kernels.rnn_int8.torch_op import fields

    weights, mode, hidden, bidirectional = rest[3:7]
    directions = 2 if bidirectional else 1
    layers = len(weights) // len(fields(mode)) // directions
    return flops.recurrent(mode.partition("_")[0].lower(), 1, _rows(x), x.shape[-1], hidden, layers, directions)


def _int4(x: Tensor, _packed: Tensor, _group: int, scales: Tensor) -> int:
    return 2 * x.numel() * scales.shape[1]


def _matrices(weights: list[Tensor]) -> int:
    return sum(weight.numel() for weight in weights if weight.dim() > 1)


def _rows(x: Tensor) -> int:
    """Steps times batch."""
    return x.numel() // max(x.shape[-1], 1)


_FLASH = ("efficient", "flash", "cudnn", "fused")
_ATTENTIONS = [f"aten::_scaled_dot_product_{kind}_attention" for kind in _FLASH]
_FORMULAS: dict[str, Callable[..., int]] = {
    **dict.fromkeys([*_ATTENTIONS, "aten::_scaled_dot_product_flash_attention_for_cpu"], _attention),
    **dict.fromkeys(
        [f"{name}_backward" for name in (*_ATTENTIONS, "aten::_scaled_dot_product_flash_attention_for_cpu")],
        _attention_backward,
    ),
    "flex_attention": _attention,
    "flex_attention_backward": _flex_attention_backward,
    "aten::linear": _linear,
    "aten::mv": _product,
    "aten::dot": _product,
    "aten::vdot": _product,
    "aten::addmv": _added_product,
    "aten::addbmm": _added_batches,
    "aten::_int_mm": _product,
    "aten::_addmm_activation": _added_product,
    "aten::_weight_int8pack_mm": _transposed_product,
    "aten::_weight_int4pack_mm": _int4,
    "aten::_weight_int4pack_mm_for_cpu": _int4,
    "aten::_native_multi_head_attention": _self_attention,
    "aten::_transformer_encoder_layer_fwd": _encoder_layer,
    "aten::mkldnn_rnn_layer": _mkldnn_rnn,
    "aten::mkldnn_rnn_layer_backward": _mkldnn_rnn_backward,
    "aten::_cudnn_rnn": _cudnn_rnn,
    "aten::_cudnn_rnn_backward": _cudnn_rnn_backward,
    "perfkit::conv2d": _conv2d,
    "perfkit::conv2d_backward": _conv2d_backward,
    "perfkit::linear_int8": _linear,
    "perfkit::rnn": _rnn,
    "perfkit::rnn_backward": _rnn_backward,
    "perfkit::rnn_int8": _rnn_int8,
}
