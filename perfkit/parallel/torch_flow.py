"""Which linear layer's output reaches which other linear layer through elementwise functions alone."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from perfkit.backends.torch_surgery import tensors_in

ELEMENTWISE = {
    *("relu", "relu_", "gelu", "tanh", "tanh_", "sigmoid", "silu", "leaky_relu", "elu", "selu", "celu", "softplus"),
    *("mish", "softsign"),
}
"""Functions of one tensor that torch computes on distributed tensors, forwards and backwards."""

ABOUT = {"size", "dim", "ndimension", "numel", "is_floating_point", "__len__"}
"""What tells a tensor's form and no value of it, attributes aside."""

_ATTENDING = inspect.signature(nn.MultiheadAttention.forward)


class Flow(TorchFunctionMode):
    """Follows tensors by identity while a model is called; every function of torch is seen, `tensor.shape` included.

    Args:
        layers: layers with a weight, by name.
        dropouts: dropout modules, by name.

    Attributes:
        reached: by linear layer, those that its output reached; None stands for anything else.
        came: by linear layer, those whose output it was given; None for anything else.
        passed: by linear layer, the dropouts that its output went through.
        elsewhere: by layer, why it cannot be split: what reads its weight besides itself.
        called: the layers that were called, in that order.
        weights: by attention, whether its weights were asked for, and their mean over the heads.
    """

    def __init__(self, layers: Mapping[str, nn.Module], dropouts: Mapping[str, nn.Module]):
        super().__init__()
        self.layers, self.dropouts = layers, dropouts
        self.owner = {id(held): name for name, layer in layers.items() for held in layer.parameters()}
        self.running: list[str] = []
        self.made: dict[int, tuple[torch.Tensor, str]] = {}
        self.reached: dict[str, set[str | None]] = {name: set() for name in layers}
        self.came: dict[str, set[str | None]] = {name: set() for name in layers}
        self.passed: dict[str, set[str]] = {name: set() for name in layers}
        self.elsewhere: dict[str, str] = {}
        self.called: dict[str, None] = {}
        self.weights: dict[str, tuple[bool, bool]] = {}

    def call(self, model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Call the model once and follow what happens."""
        with self._watching(), torch.compiler.set_stance("force_eager"), torch.no_grad(), self:
            outputs = model(*args, **kwargs)
        for tensor in tensors_in(outputs):
            self._reach(tensor, None)
        self.made.clear()

    def pairs(self) -> dict[str, str]:
        """By a linear layer's name the one that alone takes its output, and takes nothing else."""
        return {
            name: second
            for name, reached in self.reached.items()
            if len(reached) == 1 and (second := next(iter(reached))) is not None and self.came[second] == {name}
        }

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = name_of(function)
        given = list(tensors_of((args, kwargs)))
        result = function(*args, **kwargs)
        if (name in ABOUT or name.startswith(".")) and not isinstance(result, torch.Tensor):
            return result
        inside = self.running[-1] if self.running else None
        for tensor in given:
            owner = self.owner.get(id(tensor))
            if owner is not None and owner != inside:
                self.elsewhere[owner] = f"its weight is read by {name} outside of its own call"
        if name == "linear" and isinstance(self.layers.get(inside), nn.Linear):
            self._reach(given[0], inside)
            self.came[inside].add(self._maker(given[0]))
            self.made[id(result)] = result, inside
        elif len(given) == 1 and (name in ELEMENTWISE or (name == "dropout" and inside in self.dropouts)):
            if maker := self._maker(given[0]):
                self.made[id(result)] = result, maker
                self.passed[maker] |= {inside} & self.dropouts.keys()
        else:
            for tensor in given:
                self._reach(tensor, None)
        return result

    def _maker(self, tensor: torch.Tensor) -> str | None:
        """The linear layer whose output this is. Outputs are kept, so that no other tensor gets their identity."""
        return self.made.get(id(tensor), (None, None))[1]

    def _reach(self, tensor: torch.Tensor, layer: str | None) -> None:
        if maker := self._maker(tensor):
            self.reached[maker].add(layer)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        def enter(name: str):
            def before(module, args, kwargs):
                self.running.append(name)
                self.called[name] = None
                if isinstance(module, nn.MultiheadAttention):
                    given = _ATTENDING.bind(module, *args, **kwargs)
                    given.apply_defaults()
                    self.weights[name] = given.arguments["need_weights"], given.arguments["average_attn_weights"]
                elif kwargs or len(args) != 1:
                    self.elsewhere[name] = "it is called with keywords, or with more than one argument"

            return before

        def leave(*_):
            self.running.pop()

        handles = []
        for name, module in {**self.layers, **self.dropouts}.items():
            handles.append(module.register_forward_pre_hook(enter(name), with_kwargs=True))
            handles.append(module.register_forward_hook(leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def name_of(function: Any) -> str:
    """A function's name; that of an attribute, such as ".shape", with a dot."""
    name = getattr(function, "__name__", str(function))
    return f".{function.__self__.__name__}" if name == "__get__" else name


def tensors_of(arguments: Any) -> Iterator[torch.Tensor]:
    """The tensors in a function's arguments."""
    if isinstance(arguments, torch.Tensor):
        yield arguments
    elif isinstance(arguments, Mapping):
        yield from tensors_of(list(arguments.values()))
    elif isinstance(arguments, (list, tuple)):
        for item in arguments:
            yield from tensors_of(item)
