"""Convolutions with the batch norm, ReLU and max-pool that follow them, as one call of `perfkit.kernels.conv2d`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as all_modules

from perfkit.backends import torch_fused_linear as linears
from perfkit.backends import torch_fused_rnn as recurrent
from perfkit.backends.torch_spellings import METHODS, ROWS
from perfkit.backends.torch_surgery import INTEGER, ROUNDS, derive
from perfkit.kernels.conv2d.torch_call import conv2d

FUSES = "_perfkit_fuses"
"""Marks the classes of the convolutions whose groups run together."""
WATCHES = "_perfkit_watches"
"""Marks hooks that only look which module runs: what they see may run together as without them."""

FOLDED = "_perfkit_folded"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICES = ("cpu", "cuda")
_RELU = (F.relu, F.relu_, torch.relu, torch.relu_, *METHODS.values())
_POOL = (F.max_pool2d, torch.max_pool2d)
_ROWS = tuple(ROWS.values())
_FLATTENS = (((1,), {}), ((), {"start_dim": 1}))
_POOL_OPTIONS = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
GLOBAL_HOOKS = [getattr(all_modules, name) for name in vars(all_modules) if name.startswith("_global_") and
                 name.endswith("_hooks")]  # fmt: skip


class Group(NamedTuple):
    """What of a group runs together.

    Args:
        norm: the batch norm to fold into the weights.
        activation, pool: as `conv2d` takes them.
        rounds: what the pool rounds to, before it or after it with the same result.
        rest: how many of the outermost links are left to run after it.
    """

    norm: nn.BatchNorm2d | None
    activation: str | None
    pool: int | None
    rounds: Callable[[Tensor], Tensor] | None
    rest: int

    def __str__(self) -> str:
        parts = ["batch norm"] * (self.norm is not None) + ["ReLU"] * (self.activation is not None)
        return " + ".join(["conv", *parts, *([f"{self.pool}×{self.pool} max-pool"] if self.pool else [])])


def may_begin(thing: Any) -> bool:
    """Whether it is a convolution as torch has it, or on integer weights: of few channels, compiled, floats are faster.

    Or a linear or recurrent layer as torch has it.
    """
    if isinstance(thing, nn.Linear):
        return linears.may_begin(thing)
    if isinstance(thing, nn.RNNBase):
        return recurrent.may_begin(thing)
    own = type(thing).forward is nn.Conv2d.forward if isinstance(thing, nn.Conv2d) else False
    return own or (isinstance(thing, nn.Conv2d) and getattr(type(thing), INTEGER, False))


def may_follow(thing: Any) -> bool:
    """Whether it is a module or a function that may run together with a convolution or a linear layer before it."""
    if isinstance(thing, (nn.Linear, nn.Conv2d)):
        return may_begin(thing)
    return _kind(thing) in _MODULES or (not isinstance(thing, nn.Module) and callable(thing) and _is_in(thing, _KNOWN))


def reading(links: tuple, x: Any) -> Group | str:
    """What of a group can run together on `x`; or why nothing can."""
    conv = links[-1]
    if not isinstance(x, Tensor) or x.dim() != 4 or x.dtype not in DTYPES or x.device.type not in DEVICES:
        return "it was not called on a batch of float images on CPU or CUDA"
    if x.dtype != conv.weight.dtype and not torch.is_autocast_enabled(x.device.type):
        return f"its weight is {_short(conv.weight.dtype)} and its input {_short(x.dtype)}"
    if not x.numel():
        return "its input is empty"
    if conv.padding_mode != "zeros":
        return f"it pads with padding_mode={conv.padding_mode!r}, and the kernel with zeros"
    if seen(conv):
        return "it has hooks, which see the convolution's own output"
    found = following(links)
    if found.norm is found.activation is found.pool is None:
        why = step_of(links[-2]) if len(links) > 1 else ("", None)
        return (why[1] if why[0] == "no" else "") or "nothing that follows it runs in the kernel"
    return found


def following(links: tuple) -> Group:
    """What may run together with the convolution that a group begins with."""
    norm = activation = pool = rounds = None
    at = len(links) - 1
    while at:
        link = links[at - 1]
        kind, given = step_of(link)
        if kind == "norm" and norm is activation is pool is None:
            norm = link
        elif kind == "relu" and activation is None:
            activation = "relu"
        elif kind == "pool" and pool is None:
            pool, rounds = given, getattr(type(link), ROUNDS, None)
        else:
            break
        at -= 1
    return Group(norm, activation, pool, rounds, at)


def together(conv: nn.Conv2d, read: Group, x: Tensor) -> Tensor:
    """What a group computes, by one call."""
    weight, bias = conv.weight, conv.bias
    if read.norm is not None:
        weight, bias = folded(conv, read.norm)
    y = conv2d(x, weight, bias, *options_of(conv, read), None)
    return y if read.rounds is None else read.rounds(y)


def options_of(conv: nn.Conv2d, read: Group) -> tuple:
    """As `conv2d` takes them."""
    return conv.stride, conv.padding, conv.dilation, conv.groups, read.activation, read.pool


def hooked(module: nn.Module) -> bool:
    """Whether a hook of its own runs when it is called."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def seen(module: nn.Module) -> bool:
    """Whether hooks see its output."""
    return hooked(module) or (any(GLOBAL_HOOKS) and any(map(_looks_at_outputs, GLOBAL_HOOKS)))


def _looks_at_outputs(hooks: dict[int, Callable]) -> bool:
    return any(not getattr(hook, WATCHES, False) for hook in hooks.values())


def step_of(link: Any) -> tuple[str, Any]:
    """What a link is: "relu", "pool" and its size, "norm", "rows" (an image becomes one row), "nothing" where it gives
    what it is given, or "no" and why."""
    if (read := _MODULES.get(_kind(link))) is not None:
        return ("no", f"the {type(link).__name__} behind it has hooks") if hooked(link) else read(link)
    function, arguments, options = link if isinstance(link, tuple) else (link, (), {})
    if _is_in(function, _RELU):
        return "relu", None
    if _is_in(function, _ROWS) or (function is torch.flatten and (arguments, dict(options)) in _FLATTENS):
        return "rows", None
    if _is_in(function, _POOL):
        options = dict(zip(_POOL_OPTIONS, arguments, strict=False)) | dict(options)
        return _pool(**options) if options.keys() <= set(_POOL_OPTIONS) else ("no", "its max-pool has other options")
    return "no", "what follows it is no ReLU, max-pool or batch norm"


def _kind(module: Any) -> type:
    """Its class; of a max-pool that rounds as well, that of the max-pool."""
    return nn.MaxPool2d if isinstance(module, nn.MaxPool2d) and hasattr(type(module), ROUNDS) else type(module)


def _is_in(function: Any, functions: tuple) -> bool:
    return any(function is one for one in functions)


def _pool(
    kernel_size: Any = None,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> tuple[str, Any]:
    usual = kernel_size == stride and padding == 0 and dilation == 1 and type(kernel_size) is int
    if usual and not (ceil_mode or return_indices):
        return "pool", kernel_size  # at once: this is asked at every call
    size, step = _pair(kernel_size), _pair(kernel_size if stride is None or stride == () else stride)
    if size != step or size[0] != size[1] or _pair(padding) != (0, 0) or _pair(dilation) != (1, 1):
        return "no", "the max-pool behind it overlaps, pads, is dilated or not square"
    if ceil_mode or return_indices:
        return "no", "the max-pool behind it rounds its size up or returns indices"
    return "pool", size[0]


def _pair(value: Any) -> tuple:
    return tuple(value) * (2 // len(value)) if isinstance(value, (tuple, list)) else (value, value)


def _norm(module: nn.BatchNorm2d) -> tuple[str, Any]:
    if module.training or module.running_mean is None:
        return "no", "the batch norm behind it computes with its batch's own statistics"
    return "norm", None


def _dropout(module: nn.Module) -> tuple[str, Any]:
    return ("no", "the dropout behind it drops in training") if module.training else ("nothing", None)


_MODULES: dict[type, Callable[[Any], tuple[str, Any]]] = {
    nn.ReLU: lambda _: ("relu", None),
    nn.MaxPool2d: lambda each: _pool(
        each.kernel_size, each.stride, each.padding, each.dilation, each.ceil_mode, each.return_indices
    ),
    nn.BatchNorm2d: _norm,
    nn.Flatten: lambda each: (
        ("rows", None) if (each.start_dim, each.end_dim) == (1, -1) else ("no", "it flattens others")
    ),
    nn.Identity: lambda _: ("nothing", None),  # such as a batch norm that was folded
    nn.Dropout: _dropout,
    nn.Dropout2d: _dropout,
}
_KNOWN = (*_RELU, *_POOL, *_ROWS, torch.flatten)


class _Folded:
    """A weight and bias with a norm folded in, and what they were made of. Copies are empty."""

    def __init__(self):
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self.sources: list[tuple[Tensor, int]] = []

    def __deepcopy__(self, memo: Any) -> _Folded:
        return _Folded()

    def __reduce__(self):
        return _Folded, ()

    def holds(self, sources: list[Tensor]) -> bool:
        """Whether nothing was written to the sources since."""
        return len(sources) == len(self.sources) and all(
            new.data_ptr() == old.data_ptr() and new._version == version
            for new, (old, version) in zip(sources, self.sources, strict=True)
        )


def folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution that computes `norm(conv(x))`, for a norm that uses its running statistics.

    Kept between calls without gradients, until one of the tensors is written to or replaced. Writes through
    `parameter.data` leave no trace in torch and are the one way that is not seen.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _fold(conv, norm)
    tensors = (conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var)
    sources = [tensor for tensor in tensors if tensor is not None]
    if type(conv.weight) is not nn.Parameter or any(tensor.is_inference() for tensor in sources):
        return _fold(conv, norm)
    kept = vars(conv).setdefault(FOLDED, _Folded())
    if not kept.holds(sources):
        kept.weight, kept.bias = _fold(conv, norm)
        kept.sources = [
            (tensor.detach(), tensor._version) for tensor in sources
        ]  # keeps their memory from being reused
    return kept.weight, kept.bias


def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
    shift = shift * scale
    if norm.bias is not None:
        shift = shift + norm.bias
    return (conv.weight * scale[:, None, None, None]).to(conv.weight.dtype), shift.to(conv.weight.dtype)


def is_fused(thing: Any) -> bool:
    return getattr(type(thing), FUSES, False)


def fuse(conv: nn.Conv2d) -> None:
    """Let the groups that begin with `conv` run together."""
    derive(conv, **{FUSES: True})


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
