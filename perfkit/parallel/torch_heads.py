"""Attention that a model writes out: projections, heads by reshaping, a product with weights, a projection of it.

A call is followed from linear layers whose outputs are reshaped into heads to the one linear layer that takes what they
become. The first are then split by columns, so that each process has some heads, and the last by rows: it adds up.
In between the values are DTensors; what is done with them computes what the whole would give, or raises.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from perfkit.backends.torch_surgery import tensors_in
from perfkit.parallel.torch_flow import ABOUT, ELEMENTWISE, name_of, tensors_of

POINTWISE = ELEMENTWISE | {
    *(
        "add",
        "__add__",
        "__radd__",
        "sub",
        "__sub__",
        "mul",
        "__mul__",
        "__rmul__",
        "div",
        "true_divide",
        "__truediv__",
    ),
    *("masked_fill", "masked_fill_", "where", "neg", "__neg__", "contiguous", "clone", "to", "float", "type_as"),
}
"""Functions that compute each number of one place, whatever lies beside it."""


@dataclass(frozen=True)
class Held:
    """A value that is in parts once its layers are.

    Args:
        layers: the linear layers that it is made of.
        dim: the dimension in parts.
        heads: whether that goes over heads already, and not over all outputs of a layer.
    """

    layers: frozenset[str]
    dim: int
    heads: bool = False


@dataclass(frozen=True)
class Attention:
    """Linear layers that make one attention.

    Args:
        blocks: by layer that makes heads, how many blocks its outputs are: 3 where queries, keys and values are of one.
        out: the layer that takes what they become.
        counts: what the number of devices must divide: how many heads there are.
        dropouts: modules that drop what is in parts.
    """

    blocks: Mapping[str, int]
    out: str
    counts: frozenset[int]
    dropouts: frozenset[str]


class HeadFlow(TorchFunctionMode):
    """Follows a call from linear layers through heads to the next linear layer.

    Args:
        linears, dropouts: modules by name.
    """

    def __init__(self, linears: Mapping[str, nn.Module], dropouts: Mapping[str, nn.Module]):
        super().__init__()
        self.linears, self.dropouts = linears, dropouts
        self.running: list[str] = []
        self.held: dict[int, tuple[torch.Tensor, Held]] = {}
        self.blocks = dict.fromkeys(linears, 1)
        self.counts: dict[str, set[int]] = {name: set() for name in linears}
        self.passed: dict[str, set[str]] = {name: set() for name in linears}
        self.ends: dict[str, set[str]] = {name: set() for name in linears}
        self.takes: dict[str, list[frozenset[str]]] = {name: [] for name in linears}
        self.spoiled: set[str] = set()

    def call(self, model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> tuple[Attention, ...]:
        """The attentions that one call of the model shows."""
        handles = []
        for name, module in {**self.linears, **self.dropouts}.items():
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: self.running.append(name)))
            handles.append(module.register_forward_hook(lambda *_: self.running.pop() and None))
        try:
            with torch.compiler.set_stance("force_eager"), torch.no_grad(), self:
                outputs = model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        self._spoil(tensors_in(outputs))
        self.held.clear()
        return tuple(self._attentions())

    def _attentions(self) -> Iterator[Attention]:
        for out, taken in self.takes.items():
            layers = frozenset().union(*taken)
            whole = len(set(taken)) == 1 and layers and all(self.counts[name] for name in layers)
            if whole and not layers & self.spoiled and all(self.ends[name] == {out} for name in layers):
                counts = frozenset().union(*(self.counts[name] for name in layers))
                dropouts = frozenset().union(*(self.passed[name] for name in layers))
                yield Attention({name: self.blocks[name] for name in sorted(layers)}, out, counts, dropouts)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name, inside = name_of(function), self.running[-1] if self.running else None
        given = [held for tensor in tensors_of((args, kwargs)) if (held := self._of(tensor)) is not None]
        result = function(*args, **kwargs)
        if name == "linear" and inside in self.linears:
            self._take(args[0], inside)
            if isinstance(result, torch.Tensor):
                self.held[id(result)] = result, Held(frozenset([inside]), result.dim() - 1)
        elif given and not ((name in ABOUT or name.startswith(".")) and not isinstance(result, torch.Tensor)):
            becomes = self._becomes(name, inside, args, kwargs, result, given)
            if becomes is None:
                self._spoil(tensors_of((args, kwargs)))
            else:
                for tensor, held in zip(tensors_of(result), becomes, strict=True):
                    self.held[id(tensor)] = tensor, held
        return result

    def _of(self, tensor: torch.Tensor) -> Held | None:
        return self.held.get(id(tensor), (None, None))[1]

    def _spoil(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            if held := self._of(tensor):
                self.spoiled |= held.layers

    def _take(self, x: torch.Tensor, layer: str) -> None:
        held = self._of(x)
        if held is None:
            self.takes[layer].append(frozenset())
        elif held.heads and held.dim == x.dim() - 1:
            self.takes[layer].append(held.layers)
            for name in held.layers:
                self.ends[name].add(layer)
        else:
            self.takes[layer].append(frozenset())
            self._spoil([x])

    def _becomes(
        self, name: str, inside: str | None, args: tuple, kwargs: Mapping, result: Any, given: Sequence[Held]
    ) -> list[Held] | None:
        """What is in parts of each tensor that a function gives; None where it needs the whole."""
        first, count = given[0], len(list(tensors_of(result)))
        if len(given) > 1:
            return self._together(name, args, kwargs, result)
        x = next(tensor for tensor in tensors_of((args, kwargs)) if self._of(tensor) is not None)
        dims = x.dim()
        if name in POINTWISE:
            return [first] if isinstance(result, torch.Tensor) and result.shape == x.shape else None
        if not args or x is not args[0]:
            return None
        if name == "dropout":
            if inside in self.dropouts:
                for layer in first.layers:
                    self.passed[layer].add(inside)
            return [first]
        if name in ("view", "reshape", "unflatten", "flatten"):
            found = self._reshaped(first, tuple(x.shape), tuple(result.shape))
            return None if found is None else [found]
        if name in ("transpose", "swapaxes", ".mT"):
            a, b = (dim % dims for dim in ((*args[1:], *kwargs.values()) if name != ".mT" else (-2, -1)))
            return [replace(first, dim={a: b, b: a}.get(first.dim, first.dim))]
        if name == "permute":
            order = kwargs["dims"] if "dims" in kwargs else args[1] if len(args) == 2 else args[1:]
            return [replace(first, dim=[dim % dims for dim in order].index(first.dim))]
        if name == "softmax":
            dim = _dim(args, kwargs, None)
            return [first] if dim is not None and dim % dims != first.dim else None
        if name in ("chunk", "split"):
            return self._cut(first, x, _dim(args[1:], kwargs, 0) % dims, result, count)
        if name == "unbind":
            at = _dim(args, kwargs, 0) % dims
            return None if at == first.dim else [replace(first, dim=first.dim - (at < first.dim))] * count
        if name == "__getitem__":
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            taken = [at for at, one in enumerate(index) if isinstance(one, int)]
            if first.dim in taken or not all(isinstance(one, int) or one == slice(None) for one in index):
                return None
            return [replace(first, dim=first.dim - sum(at < first.dim for at in taken))]
        return None

    def _together(self, name: str, args: tuple, kwargs: Mapping, result: Any) -> list[Held] | None:
        """The same of functions of several such values: their parts must be those of the same heads."""
        tensors = [tensor for tensor in tensors_of((args, kwargs)) if self._of(tensor) is not None]
        held = [self._of(tensor) for tensor in tensors]
        from_last = {tensor.dim() - one.dim for tensor, one in zip(tensors, held, strict=True)}
        if len(from_last) != 1 or not all(one.heads for one in held) or not isinstance(result, torch.Tensor):
            return None
        (place,) = from_last
        both = Held(frozenset().union(*(one.layers for one in held)), result.dim() - place, True)
        if name in ("matmul", "__matmul__", "bmm"):
            return [both] if len(tensors) == 2 and place > 2 else None
        if name == "scaled_dot_product_attention":
            return [both] if len(tensors) == 3 and place == 3 and all(tensor.dim() == 4 for tensor in tensors) else None
        return [both] if name in ("add", "__add__", "mul", "__mul__", "sub", "__sub__") else None

    def _reshaped(self, held: Held, old: tuple[int, ...], new: tuple[int, ...]) -> Held | None:
        """Where the parts are in a new shape; outputs of a layer that become heads are counted there."""
        before, at = math.prod(old[: held.dim]), 0
        while at < len(new) and (math.prod(new[:at]) != before or (new[at] == 1 and old[held.dim] > 1)):
            at += 1
        if at == len(new):
            return None
        inside = [at]  # the dimensions that this one becomes, or is the first of
        while math.prod(new[dim] for dim in inside) < old[held.dim] and inside[-1] + 1 < len(new):
            inside.append(inside[-1] + 1)
        if held.heads:  # merged with what comes behind it, which each part has whole
            return replace(held, dim=at) if new[at] % old[held.dim] == 0 else None
        if math.prod(new[dim] for dim in inside) != old[held.dim] or len(inside) < 2:
            return replace(held, dim=at) if new[at] == old[held.dim] else None
        if new[at] == 3 and len(inside) > 2:
            self._set_blocks(held)
            at += 1
        for layer in held.layers:
            self.counts[layer].add(new[at])
        return replace(held, dim=at, heads=True)

    def _cut(
        self, held: Held, x: torch.Tensor, at: int, pieces: Sequence[torch.Tensor], count: int
    ) -> list[Held] | None:
        if at != held.dim:
            return [held] * count
        if held.heads or count != 3 or any(piece.size(at) * 3 != x.size(at) for piece in pieces):
            return None
        self._set_blocks(held)
        return [held] * 3

    def _set_blocks(self, held: Held) -> None:
        for layer in held.layers:
            self.blocks[layer] = 3


def _dim(args: tuple, kwargs: Mapping, default: int | None) -> Any:
    """The dimension that a function of a tensor, and of one number at most before it, is told."""
    return kwargs.get("dim", args[1] if len(args) > 1 else default)
