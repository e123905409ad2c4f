"""Convolutions and linear layers that follow each other, by one call of `perfkit.kernels.sequence`.

Of small layers the checks of each call take longer than the layers. So what a group of links is found to be is kept
with its first layer, beside everything that it was read from: where that is as it was, all of it is one call. For
inference, where nobody looks on and each layer is a kernel's.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from perfkit.backends import torch_fused_conv as convolutions
from perfkit.kernels import _autotune, _op
from perfkit.kernels._torch import PLAIN, observer
from perfkit.kernels.sequence.cpu_kernel import Problem, caller

KEPT = "_perfkit_sequences"
_MOST = 64  # kinds of inputs of a layer

Layers = list[tuple[nn.Module, Problem]]
"""Layers that follow each other, with nothing between them but what their problems say, and what each computes."""

_READ = {
    nn.Conv2d: operator.attrgetter("stride", "padding", "dilation", "groups", "padding_mode"),
    nn.MaxPool2d: operator.attrgetter("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
    nn.Flatten: operator.attrgetter("start_dim", "end_dim"),
}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def run(links: tuple, x: Any, layers: Callable[[tuple, Tensor], tuple[Layers | None, Tensor]]) -> Tensor | None:
    """What the links, outermost first, compute of `x`, by one call; None where that cannot be.

    Args:
        layers: tells of links and x which layers they are, None where some of them are no kernel's, and computes them.
    """
    first = links[-1]
    if type(x) not in PLAIN or not isinstance(first, (nn.Conv2d, nn.Linear)):
        return None
    kept = vars(first).setdefault(KEPT, _Kept())
    key = len(links), x.shape, x.dtype, _autotune.state()
    known = kept.get(key, _unknown)
    if known is None:
        return None
    if known is not _unknown and known.holds(links):
        return known.call(x) if known.quiet(x) else None
    new = _Sequence(links)
    if not new.quiet(x):
        return None
    if len(kept) >= _MOST:
        kept.clear()
    found, y = layers(links, x)
    if found and new.holds(links):
        new.call = caller([(problem, layer.weight, layer.bias) for layer, problem in found], tuple(y.shape))
        kept[key] = new
    else:
        kept[key] = None
    return y


class _Kept(dict):
    """What is known of the groups that begin with a layer. Copies are empty."""

    def __deepcopy__(self, memo: Any) -> _Kept:
        return _Kept()

    def __reduce__(self):
        return _Kept, ()


_unknown = object()


class _Weight(NamedTuple):
    """A parameter, where its module holds it, and what it was."""

    holder: dict[str, Tensor | None]
    name: str
    tensor: Tensor | None
    at: int
    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def of(cls, layer: nn.Module, name: str) -> _Weight:
        tensor = getattr(layer, name)
        told = (0, torch.Size(), torch.float32) if tensor is None else (tensor.data_ptr(), tensor.shape, tensor.dtype)
        return cls(layer._parameters, name, tensor, *told)

    def holds(self) -> bool:
        tensor = self.holder.get(self.name)
        return tensor is self.tensor and (
            tensor is None
            or (
                tensor.data_ptr() == self.at
                and tensor.dtype is self.dtype
                and tensor.is_contiguous()
                and tensor.shape == self.shape
            )
        )


class _Sequence:
    """Links as one call, and what must be so for it to be what they compute. Final."""

    call: Callable[[Tensor], Tensor]

    def __init__(self, links: tuple):
        modules = [link for link in links if isinstance(link, nn.Module)]
        layers = [each for each in modules if isinstance(each, (nn.Conv2d, nn.Linear))]
        self.links, self.modules, self.types = links, modules, list(map(type, modules))
        self.own = list(map(vars, modules))
        self.hooks = [*(getattr(each, name) for each in modules for name in _HOOKS), *convolutions.GLOBAL_HOOKS]
        read = [(each, _READ[kind]) for each in modules for kind in _READ if isinstance(each, kind)]
        self.read = [(each, tell, tell(each)) for each, tell in read]
        self.weights = [_Weight.of(layer, name) for layer in layers for name in ("weight", "bias")]
        self.tensors = [weight.tensor for weight in self.weights if weight.tensor is not None]

    def holds(self, links: tuple) -> bool:
        """Whether they are these links, and are what they were."""
        return (
            links == self.links
            and list(map(type, self.modules)) == self.types
            and all(tell(module) == told for module, tell, told in self.read)
            and all(weight.holds() for weight in self.weights)
        )

    def quiet(self, x: Tensor) -> bool:
        """Whether numbers are wanted of x as it lies, and no more: no hook, gradient, autocast, trace or mode."""
        tensors = [x, *self.tensors]
        return not (
            any(self.hooks)
            or any("forward" in own for own in self.own)
            or not (x.is_cpu and x.is_contiguous())
            or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
            or torch._C._is_any_autocast_enabled()
            or _op.tracing()
            or observer(tensors)
        )
