"""Integer layers in Inductor's graphs: as few calls as can be, with bytes in between.

A call of `torch.ops.perfkit.int8_layers` takes along the ReLU and max-pool behind it, the rounding of its result and
the layer that reads it. Where the compiler makes the input of a call, it rounds it in the same loop, and in the order
in which kernels for convolutions read it. The numbers are those of each layer by itself; all else is as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
import torch.nn.functional as F
from torch import Tensor, fx
from torch._dynamo.utils import counters
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.fx_utils import FakeTensorUpdater
from torch.fx.experimental.symbolic_shapes import statically_known_true

from perfkit.kernels.conv2d_int8.cpu_shape import FEW_CHANNELS
from perfkit.kernels.sequence import torch_auto, torch_op
from perfkit.kernels.sequence.torch_op import Layer, channels_last, read, written

_aten, _prims = torch.ops.aten, torch.ops.prims
_CALL = torch.ops.perfkit.int8_layers.default
_ROUND = torch.ops.quantized_decomposed.quantize_per_tensor.default
_VIEWS = (_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default, _aten.clone.default)
_POOLS = ("aten.max_pool2d_with_indices.default", "prims._low_memory_max_pool_with_offsets.default")
"""By name: Inductor registers its own when it is first used."""
_POOL_OPTIONS = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")


LAYERS, CALLS = "perfkit_integer_layers", "perfkit_integer_calls"
"""What is counted beside Inductor's own: layers on integers in perfkit's kernels, and the calls that they are."""

_AUTO = torch.ops.perfkit.int8_auto
_JOINING = (F.relu, F.max_pool2d, torch.relu, torch.max_pool2d, torch.flatten)
_JOINING_METHODS = ("relu", "view", "reshape", "flatten")


class ChainedIntegers(CustomGraphPass):
    """Inductor's pass over what Dynamo wrote down: tells the layers that will be one call that they will."""

    def __call__(self, graph: fx.Graph) -> None:
        for node in graph.nodes:
            if node.target not in (_AUTO, _AUTO.default) or not isinstance(node.args[0], fx.Node):
                continue
            before = node.args[0]
            while len(before.users) == 1 and (before.target in _JOINING or before.target in _JOINING_METHODS):
                before = before.args[0]
            if before.target in (_AUTO, _AUTO.default) and len(before.users) == 1:
                for each in (before, node):
                    each.kwargs = each.kwargs | {"chained": True}

    def uuid(self) -> Any:
        return get_hash_for_files((__file__, torch_auto.__file__))


class JoinedIntegers(CustomGraphPass):
    """Inductor's pass over the operations that are left to lower: makes one call of several."""

    def __call__(self, graph: fx.Graph) -> None:
        told = _what_is_told(graph)
        graph.eliminate_dead_code()  # such as the indices of max-pools
        for node in list(graph.nodes):
            if node.op != "call_function":
                continue
            if node.target is _aten.relu.default:
                _take(graph, node, node.args[0], lambda layer: layer._replace(activation="relu"))
            elif str(node.target) in _POOLS and (size := _square(node)):
                first = [user for user in node.users if user.args[1] == 0]
                if len(first) == len(node.users) == 1:
                    _take(graph, first[0], node.args[0], lambda layer, size=size: _pooled(layer, size))
            elif node.target is _ROUND:
                _round(graph, node)
            elif node.target is _CALL:
                _join(graph, node)
        graph.eliminate_dead_code()
        for node in list(graph.nodes):
            if node.target is _CALL:
                counters["inductor"][LAYERS] += len(read(node.args[2]))
                counters["inductor"][CALLS] += 1
                _lay(graph, node)
        graph.eliminate_dead_code()
        told.incremental_update()

    def uuid(self) -> Any:
        return get_hash_for_files((__file__, torch_op.__file__))


def _what_is_told(graph: fx.Graph) -> FakeTensorUpdater:
    """What nodes tell of their results; it is brought up to date where results lie in another way than before.

    Inductor does so itself, but after it has lowered the layers that are oneDNN's: torch 2.14 then raises, and earlier
    versions leave those as they were.
    """
    graphs = "graph" in signature(FakeTensorUpdater).parameters  # in torch 2.11; the graph's module later
    return FakeTensorUpdater(graph if graphs else graph.owning_module)


def _takes_more(node: Any) -> bool:
    """Whether it is a call of integer layers to floats, whose result one node reads."""
    if not (isinstance(node, fx.Node) and node.target is _CALL and len(node.users) == 1):
        return False
    return read(node.args[2])[-1].out == "float32"


def _take(graph: fx.Graph, node: fx.Node, of: Any, step: Callable[[Layer], Layer | None]) -> None:
    """Let the call before a step compute it too; a step that is None for its last layer stays."""
    if not _takes_more(of):
        return
    *before, last = read(of.args[2])
    if (layer := step(last)) is not None:
        _replace(graph, node, (*of.args[:2], written([*before, layer])))


def _pooled(layer: Layer, size: int) -> Layer | None:
    return layer._replace(pool=size) if layer.conv and layer.pool == 1 else None


def _seen(node: Any) -> tuple[Any, list[fx.Node]]:
    """What a node is a view of that nothing else reads, and the views, outermost first."""
    views = []
    while isinstance(node, fx.Node) and node.target in _VIEWS and len(node.users) == 1:
        views.append(node)
        node = node.args[0]
    return node, views


def _round(graph: fx.Graph, node: fx.Node) -> None:
    """Let a call give bytes where nothing but their rounding reads its floats."""
    of, views = _seen(node.args[0])
    _, scale, zero, low, top, _ = node.args
    if not _takes_more(of) or low != 0:
        return
    *before, last = read(of.args[2])
    layers = [*before, last._replace(out=(scale, zero, top))]
    made = _insert(graph, node, _CALL, (*of.args[:2], written(layers)), of)
    for view in reversed(views):
        made = _insert(graph, node, view.target, (made, *view.args[1:]), view, view.kwargs)
    node.replace_all_uses_with(made)
    graph.erase_node(node)


def _join(graph: fx.Graph, node: fx.Node) -> None:
    """Let the call that makes the bytes of another one compute it too."""
    of, views = _seen(node.args[0])
    if not (isinstance(of, fx.Node) and of.target is _CALL and len(of.users) == 1):
        return
    *before, last = read(of.args[2])
    first, *rest = read(node.args[2])
    if last.dtype != torch.uint8:
        return
    if views:
        if not _rows(of.meta["val"], node.args[0].meta["val"]) or not last.conv:
            return
        first = first._replace(rows=True)
    layers = [*before, last._replace(out="float32"), first, *rest]
    _replace(graph, node, (of.args[0], [*of.args[1], *node.args[1]], written(layers)))


def _rows(images: Tensor, rows: Tensor) -> bool:
    """Whether images became rows."""
    return images.dim() == 4 and rows.dim() == 2 and statically_known_true(images.shape[0] == rows.shape[0])


def _lay(graph: fx.Graph, node: fx.Node) -> None:
    """Settle how the result of a call lies, and who rounds what it is given.

    Kernels for many channels read NHWC. That is how the compiler's operations between two of them then lie too: they
    do what they read does.
    """
    x, tensors, text = node.args
    layers = list(read(text))
    rounds = isinstance(x, fx.Node) and x.target is _ROUND
    if rounds and len(x.users) == 1 and not _fuses(x.args[0]):
        x = x.args[0]
        if x.meta["val"].dtype != torch.float32:
            x = _insert(graph, node, _prims.convert_element_type.default, (x, torch.float32), x)
    if layers[-1].conv:
        shown = any(user.op == "output" or user.target in _VIEWS for user in node.users)
        channels = tensors[-torch_op.TENSORS].meta["val"].size(0)
        last = channels_last(node.meta["val"]) if shown else channels > FEW_CHANNELS
        layers[-1] = layers[-1]._replace(last=last)
    new = _replace(graph, node, (x, tensors, written(layers)))
    if layers[0].conv and rounds and x.target is _ROUND and x.meta["val"].size(1) > FEW_CHANNELS:
        given = x.meta["val"]
        with given.fake_mode:
            lies = torch.empty(given.shape, dtype=given.dtype, memory_format=torch.channels_last)
        new.meta["eager_input_vals"] = (lies, [each and each.meta["val"] for each in tensors], written(layers)), {}


def _fuses(node: fx.Node) -> bool:
    """Whether the compiler makes what a node gives by a loop of its own, which may as well round it."""
    while node.target in _VIEWS:
        node = node.args[0]
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return torch.Tag.pointwise in node.target.tags or node.target is _prims.convert_element_type.default
    return str(getattr(node.args[0], "target", None)) in _POOLS


def _replace(graph: fx.Graph, node: fx.Node, arguments: tuple) -> fx.Node:
    new = _insert(graph, node, _CALL, arguments, node)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return new


def _insert(
    graph: fx.Graph, before: fx.Node, target: Any, arguments: tuple, like: fx.Node, options: Any = None
) -> fx.Node:
    """A new node that tells of its result what another one does, in bytes where it gives such."""
    with graph.inserting_before(before):
        new = graph.call_function(target, arguments, options or {})
    # "eager_input_vals", where it is there, is of one layer
    new.meta = {name: held for name, held in like.meta.items() if name != "eager_input_vals"}
    given = arguments[0].meta["val"].dtype if target in _VIEWS else None
    dtype = read(arguments[2])[-1].dtype if target is _CALL else arguments[1] if given is None else given
    value = new.meta["val"]
    if value.dtype != dtype:
        with value.fake_mode:
            new.meta["val"] = torch.empty_strided(value.shape, value.stride(), dtype=dtype, device=value.device)
    return new


def _square(node: fx.Node) -> int:
    """The side of the squares that a max-pool takes; 0 where they overlap, pad, have gaps or are none."""
    given = dict(zip(_POOL_OPTIONS, node.args[1:], strict=False)) | node.kwargs
    size, step = (list(given.get(name) or []) for name in ("kernel_size", "stride"))
    step, (padding, dilation) = step or size, ([*(given.get(name) or [])] for name in ("padding", "dilation"))
    pairs = [each * (2 // len(each)) for each in (size, step, padding or [0], dilation or [1])]
    fine = pairs[0] == pairs[1] and pairs[0][0] == pairs[0][1] and pairs[2:] == [[0, 0], [1, 1]]
    return pairs[0][0] if fine and not given.get("ceil_mode") else 0
