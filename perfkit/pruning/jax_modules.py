"""Telling flax nnx layers the sizes that their parameters have now."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from flax import nnx

from perfkit.backends.jax_model import JaxModel, NnxModel


def resized(model: JaxModel) -> JaxModel:
    """The model with the sizes that its layers state brought in line with their arrays.

    Layers of flax itself are known; a size that the caller's own classes state is left as it is, and where they
    compute with it, the model does not run any more, which who calls this finds out.
    """
    if not isinstance(model, NnxModel):
        return model
    module = model.module()
    for _, node in nnx.iter_modules(module):
        for kind, adapt in _ADAPT.items():
            if isinstance(node, kind):
                adapt(node)
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)
    return dataclasses.replace(model, graphdef=graphdef, params=params, rest=rest)


def evaluating(model: JaxModel) -> JaxModel:
    """The model as it infers: no dropout, norms by their running statistics. Functions and linen modules as they are.

    Its parameters and other state have the places that they have in the model itself.
    """
    if not isinstance(model, NnxModel):
        return model
    module = model.module()
    module.eval()
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)
    return dataclasses.replace(model, graphdef=graphdef, params=params, rest=rest)


def _linear(layer: nnx.Linear) -> None:
    layer.in_features, layer.out_features = layer.kernel.shape


def _linear_general(layer: nnx.LinearGeneral) -> None:
    shape, batched = layer.kernel.shape, len(layer.batch_axis)
    inner = batched + len(layer.in_features)
    layer.in_features, layer.out_features = tuple(shape[batched:inner]), tuple(shape[inner:])


def _conv(layer: nnx.Conv) -> None:
    *_, inputs, outputs = layer.kernel_shape = tuple(layer.kernel.shape)
    if layer.feature_group_count > 1 and layer.feature_group_count == layer.in_features and inputs == 1:
        channels_each = layer.out_features // layer.in_features  # depthwise
        layer.feature_group_count = outputs // channels_each
    layer.in_features, layer.out_features = inputs * layer.feature_group_count, outputs


def _conv_transpose(layer: nnx.ConvTranspose) -> None:
    *_, inputs, outputs = layer.kernel_shape = tuple(layer.kernel.shape)
    if layer.transpose_kernel:
        inputs, outputs = outputs, inputs
    layer.in_features, layer.out_features = inputs, outputs


def _embed(layer: nnx.Embed) -> None:
    layer.num_embeddings, layer.features = layer.embedding.shape


def _norm(layer: nnx.Module) -> None:
    for name in ("scale", "bias", "mean", "var"):
        if isinstance(array := getattr(layer, name, None), nnx.Variable) and array.ndim == 1:
            layer.num_features = array.shape[0]


def _lstm(cell: nnx.LSTMCell) -> None:
    cell.in_features, cell.hidden_features = cell.ii.kernel.shape


def _fused(cell: nnx.OptimizedLSTMCell | nnx.GRUCell | nnx.SimpleCell) -> None:
    cell.in_features, cell.hidden_features = cell.dense_i.kernel.shape[0], cell.dense_h.kernel.shape[0]


def _attention(layer: nnx.MultiHeadAttention) -> None:
    layer.num_heads, layer.head_dim = layer.query.kernel.shape[-2:]
    layer.qkv_features = layer.num_heads * layer.head_dim


_ADAPT: dict[type[nnx.Module], Callable] = {
    nnx.Linear: _linear,
    nnx.LinearGeneral: _linear_general,
    nnx.Conv: _conv,
    nnx.ConvTranspose: _conv_transpose,
    nnx.Embed: _embed,
    nnx.BatchNorm: _norm,
    nnx.LayerNorm: _norm,
    nnx.RMSNorm: _norm,
    nnx.InstanceNorm: _norm,
    nnx.MultiHeadAttention: _attention,
    nnx.LSTMCell: _lstm,
    nnx.OptimizedLSTMCell: _fused,
    nnx.GRUCell: _fused,
    nnx.SimpleCell: _fused,
}
