"""Layers that follow each other, by one call of `perfkit.kernels.sequence`.

Of small layers the checks of each call take longer than the layers. So what a group of links is found to be is kept
with its first layer, beside everything that it was read from: where that is as it was, all of it is one call. For
inference, where nobody looks on and each layer is a kernel's.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from perfkit.backends import torch_fused_conv as convolutions
from perfkit.backends import torch_fused_int8 as integers
from perfkit.kernels import _autotune, _op
from perfkit.kernels._torch import PLAIN, autocasts, counts_allocations, observer
from perfkit.kernels.sequence.cpu_kernel import Problem, caller, joined

KEPT = "_perfkit_sequences"
_MOST = 64  # kinds of inputs of a layer

Layers = list[tuple[nn.Module, Problem]]
"""Layers that follow each other, with nothing between them but what their problems say, and what each computes."""

LAYERS = (nn.Conv2d, nn.Linear, nn.RNNBase)
_READ = {
    nn.Conv2d: operator.attrgetter("stride", "padding", "dilation", "groups", "padding_mode"),
    nn.MaxPool2d: operator.attrgetter("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
    nn.Flatten: operator.attrgetter("start_dim", "end_dim"),
    nn.modules.dropout._DropoutNd: operator.attrgetter("training"),
    nn.RNNBase: operator.attrgetter("mode", "batch_first", "bidirectional", "dropout", "training"),
}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_form = operator.attrgetter("dtype", "requires_grad")
GUARDS = getattr(torch._C._dynamo.guards, "TensorGuards", None)
"""What torch.compile looks with whether tensors are as they were, and the modes that they are dispatched in: in a
quarter of the time that asking each takes."""


def run(links: tuple, x: Any, layers: Callable[[tuple, Tensor], tuple[Layers | None, Tensor]]) -> Tensor | None:
    """What the links, outermost first, compute of `x`, by one call; None where that cannot be.

    Args:
        layers: tells of links and x which layers they are, None where some of them are no kernel's, and computes them.
    """
    first = links[-1]
    if not isinstance(first, LAYERS):
        return None
    kept = vars(first).get(KEPT)
    if kept is None:
        kept = vars(first).setdefault(KEPT, _Kept())
    last = kept.last
    if last is not None and last.holds(links, x):
        return last.call(x)
    return _other(kept, links, x, layers) if type(x) in PLAIN else None


def _other(kept: _Kept, links: tuple, x: Tensor, layers: Callable[[tuple, Tensor], tuple[Layers | None, Tensor]]):
    """The same for links or an `x` that are not like those of the last call."""
    low, counting = _autocasts_to(x), counts_allocations()
    of_x = type(x), x.shape, x.stride(), x.dtype, x.requires_grad, x.is_inference()
    key = len(links), of_x, low, torch.is_inference_mode_enabled(), _autotune.state()
    known = kept.get(key, _unknown)
    if known is None:
        return None
    if known is not _unknown and known.holds(links, x, counting):
        kept.last = known
        return known.counted(x) if counting else known.call(x)
    if not (x.is_cpu and x.is_contiguous()):
        return None
    new = _Sequence(links, x, low)
    if not new.quiet() or observer([x, *new.tensors]):
        return None
    if low is None and torch._C._is_any_autocast_enabled():
        return None
    new.remember(x)
    if len(kept) >= _MOST:
        kept.clear()
    found, y = layers(links, x)
    if found and new.holds(links, x) and all(map(Tensor.is_contiguous, new.tensors)):
        new.learn([problem for _, problem in found], x, tuple(y.shape))
        kept[key] = kept.last = new
    else:
        kept[key] = None
    return y


def _autocasts_to(x: Tensor) -> torch.dtype | None:
    """What autocast makes of it and of weights like it."""
    if not torch._C._is_any_autocast_enabled() or not autocasts("cpu") or x.dtype != torch.float32:
        return None
    return torch.get_autocast_dtype("cpu")


def _names(layer: nn.Module) -> Sequence[str]:
    """Of its parameters, in the order in which its kernel takes them."""
    if integers.is_integer(layer):
        return "weight_int8", "weight_scale", "bias"
    return layer._flat_weights_names if isinstance(layer, nn.RNNBase) else ("weight", "bias")


class _Kept(dict):
    """What is known of the groups that begin with a layer, and what the last call was. Copies are empty."""

    last: _Sequence | None = None

    def __deepcopy__(self, memo: Any) -> _Kept:
        return _Kept()

    def __reduce__(self):
        return _Kept, ()


_unknown = object()


class _Sequence:
    """Links as one call, and what must be so for it to be what they compute. Final."""

    call: Callable[[Tensor], Tensor]
    between: Callable[[], int]

    def __init__(self, links: tuple, x: Tensor, low: torch.dtype | None):
        modules = [link for link in links if isinstance(link, nn.Module)]
        layers = [each for each in reversed(modules) if isinstance(each, LAYERS)]
        self.links, self.modules, self.types = links, modules, list(map(type, modules))
        self.own = list(map(vars, modules))
        self.hooks = [*(getattr(each, name) for each in modules for name in _HOOKS), *convolutions.GLOBAL_HOOKS]
        self.read = [(each, _READ[kind]) for each in modules for kind in _READ if isinstance(each, kind)]
        self.read += [(each, integers.written) for each in layers if integers.is_integer(each)]
        self.told = [tell(each) for each, tell in self.read]
        self.places = [(layer._parameters, name) for layer in layers for name in _names(layer)]
        self.low, self.of_layers = low, [[getattr(layer, name) for name in _names(layer)] for layer in layers]
        parameters = list(chain(*self.of_layers))
        self.parameters, self.tensors = list(map(id, parameters)), [each for each in parameters if each is not None]
        self.differentiable = any(tensor.requires_grad for tensor in (x, *self.tensors))
        self.state = _autotune.state()

    def remember(self, x: Tensor) -> None:
        """How x and the parameters lie, of which somebody who looks on may make tensors that lie nowhere."""
        self.addresses, self.alike = list(map(Tensor.data_ptr, self.tensors)), _alike([x, *self.tensors])

    def learn(self, problems: Sequence[Problem], x: Tensor, size: tuple[int, ...]) -> None:
        """Make the call of tensors such as x, which gives one of `size`."""
        problems = joined(problems)
        if self.low is None:
            self.call = caller(list(zip(problems, self.of_layers, strict=True)), x, size)
            self.between = self.call.between
            return
        # As autocast has it: weights are what they are at each call, and are rounded then.
        low, tensors = self.low, self.tensors
        with torch.inference_mode(False):  # what is made within could not be written to outside
            copies = [torch.empty_like(each, dtype=low) for each in tensors]
        of = dict(zip(map(id, tensors), copies, strict=True)) | {id(None): None}
        run = caller(
            [(problem, [of[id(each)] for each in own]) for problem, own in zip(problems, self.of_layers, strict=True)],
            x.to(low),
            size,
        )

        def call(x: Tensor) -> Tensor:
            torch._foreach_copy_(copies, tensors)
            return run(x.to(low))

        self.call, self.between = call, run.between

    def counted(self, x: Tensor) -> Tensor:
        """The call where allocations are counted: what lies between the layers is none of torch's."""
        between = torch.empty(self.between(), dtype=torch.uint8)
        y = self.call(x)
        del between
        return y

    def holds(self, links: tuple, x: Any, counting: bool = False) -> bool:
        """Whether they are these links and such an x, all is as it was, and numbers are wanted and no more.

        Args:
            counting: a profiler that looks at allocations alone is none.
        """
        return (
            links == self.links
            and list(map(type, self.modules)) == self.types
            and [id(holder.get(name)) for holder, name in self.places] == self.parameters
            and self.alike(x, *self.tensors)
            and list(map(Tensor.data_ptr, self.tensors)) == self.addresses
            and [tell(each) for each, tell in self.read] == self.told
            and self.state == _autotune.state()
            and self.quiet(counting)
        )

    def quiet(self, counting: bool = False) -> bool:
        """Whether no hook, gradient, trace or profiler, nor another dtype of autocast, is there to be followed."""
        return not (
            any(self.hooks)
            or any(map(operator.contains, self.own, repeat("forward")))
            or (self.differentiable and torch.is_grad_enabled())
            or forward_ad._current_level >= 0
            or torch._C._len_torch_dispatch_stack()
            or (torch.autograd._profiler_enabled() and not counting)
            or _op.tracing()
            or (self.low is not None and torch.get_autocast_dtype("cpu") != self.low)
        )


def _alike(tensors: list[Tensor]) -> Callable[..., bool]:
    """Whether such tensors are of the classes, dtypes, sizes and strides that these are, and numbers as they lie; and
    operations on them would be dispatched as now: in inference mode, under autocast, in a transformation or not."""
    if GUARDS is not None:
        return GUARDS(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
    types, forms = list(map(type, tensors)), list(map(_form, tensors))
    sizes, strides = list(map(Tensor.size, tensors)), list(map(Tensor.stride, tensors))
    modes = torch.is_inference_mode_enabled, torch._C._is_any_autocast_enabled
    on = [mode() for mode in modes]

    def alike(*given: Any) -> bool:
        return (
            list(map(type, given)) == types
            and observer(given) is None
            and list(map(_form, given)) == forms
            and list(map(Tensor.size, given)) == sizes
            and list(map(Tensor.stride, given)) == strides
            and [mode() for mode in modes] == on
        )

    return alike
