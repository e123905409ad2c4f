"""A torch model as the list of what its forward calls: torch.fx, with recurrent and transformer layers taken apart."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from perfkit._errors import UnsupportedError
from perfkit._workload import Inputs
from perfkit.backends.torch_surgery import tensors_in, unwrapped

CELLS: dict[str, Callable] = {"GRU": torch.gru, "RNN_TANH": torch.rnn_tanh, "RNN_RELU": torch.rnn_relu}
BETWEEN = "_perfkit_between"
"""The dropout between the layers of a recurrent module, as a module of its own."""

LAYER = "perfkit_layer"
"""In a node's `meta`: the name of the layer that it is of, where that is a part of a module."""
SPARE = "perfkit_spare"
"""In a node's `meta`: it is left out where nobody uses it."""


def traced(model: nn.Module, inputs: Inputs) -> fx.Graph:
    """What the model calls on such inputs; its placeholders are the tensors among them, by the names of `named`.

    What `around_forward` put around the whole model is not in it.

    Args:
        model: a copy: recurrent modules in it are given what lies between their layers.

    Raises:
        UnsupportedError: its forward looks at values, or does what torch.fx cannot follow.
    """
    kind, _ = unwrapped(model)
    given = named(kind, inputs)
    tracer = Tracer()
    try:
        return tracer.follow(model, kind, given)
    except Exception as error:  # whatever user code may raise on what is no tensor
        raise UnsupportedError(
            f"{type(model).__name__}.forward cannot be followed ({type(error).__name__}: "
            f"{(str(error).splitlines() or [''])[0]}): what looks at values or packs sequences must be in a submodule"
        ) from error


def named(kind: type[nn.Module], inputs: Inputs) -> dict[str, Any]:
    """The inputs by the names of forward's parameters.

    Raises:
        UnsupportedError: forward takes any number of them, or tensors in lists.
    """
    signature = inspect.signature(kind.forward)
    bound = signature.bind(None, *inputs.args, **inputs.kwargs).arguments
    given = dict(list(bound.items())[1:])
    for name, value in given.items():
        if signature.parameters[name].kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            raise UnsupportedError(
                f"{kind.__name__}.forward takes any number of arguments: give each a name of its own"
            )
        if not isinstance(value, torch.Tensor) and any(True for _ in tensors_in(value)):
            raise UnsupportedError(
                f"input {name!r} is a {type(value).__name__} of tensors: pass each by a name of its own"
            )
    return given


def tensors_of(given: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Those inputs that are tensors."""
    return {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}


class Tracer(fx.Tracer):
    """Follows into the caller's own modules as far as it can, and calls the others as they are."""

    def follow(self, model: nn.Module, kind: type[nn.Module], given: dict[str, Any]) -> fx.Graph:
        """The graph of a call with these inputs, of which those that are no tensors are fixed."""
        names = list(tensors_of(given))
        modules: list[Any] = list(model.modules())
        for module in modules:
            if _stacked(module, unwrapped(module)[0].forward) and module.dropout:
                module.add_module(BETWEEN, nn.Dropout(module.dropout).train(module.training))

        def call(module, *tensors):
            inputs = given | dict(zip(names, tensors, strict=True))
            apart = self._apart(module, "", kind)
            return apart(**inputs) if apart else kind.forward(module, **inputs)

        listed = ", ".join(["module", *names])
        own = type(model)
        model.__class__ = type(
            kind.__name__, (kind,), {"forward": eval(f"lambda {listed}: call({listed})", {"call": call})}
        )
        try:
            graph = self.trace(model)
        finally:
            model.__class__ = own
        for node in reversed(graph.nodes):
            if node.meta.get(SPARE) and not node.users:
                graph.erase_node(node)
        return graph

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return super().is_leaf_module(m, module_qualified_name) and not isinstance(m, nn.ModuleList)

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        path = self.path_of_module(m)
        apart = self._apart(m, path, type(m))
        if apart is None and self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        last, stack = next(iter(reversed(self.graph.nodes)), None), list(self.module_stack.items())
        try:
            self.module_stack[path] = (path, type(m))
            found = (apart or forward)(*args, **kwargs)
            self.module_stack.pop(path)
            return found
        except Exception:  # whatever user code may raise on what is no tensor: then the module is called as one
            self.module_stack.clear()
            self.module_stack.update(stack)
            for node in reversed(self.graph.nodes):
                if node is last:
                    break
                self.graph.erase_node(node)
            return self.create_proxy("call_module", path, args, kwargs)

    def _apart(self, m: nn.Module, path: str, kind: type[nn.Module]) -> Callable | None:
        """What stands for the forward of a module of torch's that can be taken apart; None for others."""
        forward: Any = kind.forward
        if _stacked(m, forward):
            return lambda input: self._layers(m, path, input)
        if forward is nn.TransformerEncoder.forward:
            return lambda src: _encoder(m, src)
        if forward is nn.TransformerEncoderLayer.forward:
            return lambda src: _encoder_layer(m, src)
        return None

    def _layers(self, rnn: Any, path: str, x: fx.Proxy) -> tuple:
        """The layers of a recurrent module one by one, beginning with zeros."""
        prefix, ways, ends = f"{path}." if path else "", 1 + rnn.bidirectional, []
        for layer in range(rnn.num_layers):
            if layer and rnn.dropout:
                x = self.create_proxy("call_module", prefix + BETWEEN, (x,), {})
            weights = [
                rnn._parameters[name] for way in rnn._all_weights[layer * ways : (layer + 1) * ways] for name in way
            ]
            how = rnn.mode, rnn.bias, rnn.bidirectional, rnn.batch_first
            called: Any = self.create_proxy("call_function", recurrent_layer, (x, weights, *how), {})
            called.node.meta[LAYER] = f"{path}[{layer}]"
            x, *end = (called[index] for index in range(3 if rnn.mode == "LSTM" else 2))
            ends.append(end)
        last = [self.create_proxy("call_function", torch.cat, (list(each),), {}) for each in zip(*ends, strict=True)]
        for proxy in [*last, *(proxy for end in ends for proxy in end)]:
            proxy.node.meta[SPARE] = True
        return x, (tuple(last) if len(last) > 1 else last[0])


def recurrent_layer(x, weights, mode, bias, bidirectional, batch_first):
    """One layer of a recurrent module, beginning with zeros: its outputs, and the states it ends in."""
    if x.dim() != 3:
        raise ValueError(f"a recurrent layer takes (time, batch, features) in some order, not {list(x.shape)}")
    rows, hidden = x.size(0 if batch_first else 1), weights[1].size(1)
    zeros = x.new_zeros(1 + bidirectional, rows, hidden)
    about = weights, bias, 1, 0.0, torch.is_grad_enabled(), bidirectional, batch_first
    return torch.lstm(x, (zeros, zeros), *about) if mode == "LSTM" else CELLS[mode](x, zeros, *about)


def _stacked(m: Any, forward: Any) -> bool:
    """Whether it is a recurrent module of several layers, as torch runs them."""
    plain = forward in (nn.LSTM.forward, nn.GRU.forward, nn.RNN.forward)
    return plain and m.num_layers > 1 and not m.proj_size


def _encoder(encoder: Any, src: fx.Proxy) -> fx.Proxy:
    """nn.TransformerEncoder without masks."""
    for layer in encoder.layers:
        src = layer(src)
    return src if encoder.norm is None else encoder.norm(src)


def _encoder_layer(layer: Any, x: fx.Proxy) -> fx.Proxy:
    """nn.TransformerEncoderLayer without masks."""
    if layer.norm_first:
        x = x + layer._sa_block(layer.norm1(x), None, None)
        return x + layer._ff_block(layer.norm2(x))
    x = layer.norm1(x + layer._sa_block(x, None, None))
    return layer.norm2(x + layer._ff_block(x))


def label(node: fx.Node) -> str:
    """What a user calls a node: its layer, or its module and function."""
    if LAYER in node.meta:
        return node.meta[LAYER]
    if node.op == "call_module":
        return str(node.target)
    path = next(iter(reversed(node.meta.get("nn_module_stack", {}) or {"": 0})), "")
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.name)
    return f"{path}.{name}" if path else str(name)
