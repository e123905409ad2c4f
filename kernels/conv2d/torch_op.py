"""`conv2d` in torch: `torch.ops.perfkit.conv2d` and its gradient, with everything registered, and the way there.

A kernel is called as it is where no gradient is wanted and nothing looks on, and is one step of autograd where one is:
a small call takes microseconds, so what a kind of call is found to be is remembered. Under torch.compile and
torch.export, `torch.ops.perfkit.conv2d_auto` stands in the graph at first; it picks when it is traced, and becomes the
framework's own operations, or `torch.ops.perfkit.conv2d` with the name of a kernel. The arguments:

    x, weight, bias               as of `perfkit.kernels.conv2d.conv2d`
    stride, padding, dilation     two, four (top, bottom, left, right) and two integers
    groups, activation, pool      as of `Problem`
    save                          return argmax too, for the backward pass, which else runs the forward pass again
    implementation                "cpu" or "triton"

It returns y, and argmax: of y's shape, or empty. See the package's head for what argmax holds.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from perfkit._errors import InvalidInputError, UnsupportedError
from perfkit.kernels import _autotune, _op
from perfkit.kernels import conv2d as op
from perfkit.kernels._op import Choice
from perfkit.kernels.conv2d import reference
from perfkit.kernels.conv2d.problem import Options, Problem, check_ranks, options, problem, resolved
from perfkit.kernels.conv2d.torch_batch import batched, batched_backward

_OPTIONS = "int[] stride, SymInt[] padding, int[] dilation, int groups, str? activation, int pool"
_LIBRARY = torch.library.Library("perfkit", "FRAGMENT")
for _name, _arguments in (
    ("conv2d_auto", f"Tensor x, Tensor weight, Tensor? bias, {_OPTIONS}, str? implementation) -> Tensor"),
    (
        "conv2d",
        f"Tensor x, Tensor weight, Tensor? bias, {_OPTIONS}, bool save, str implementation) -> (Tensor, Tensor)",
    ),
    (
        "conv2d_backward",
        f"Tensor x, Tensor weight, Tensor? bias, Tensor argmax, Tensor d_y, {_OPTIONS}, bool[] wanted, "
        "str implementation) -> (Tensor, Tensor, Tensor)",
    ),
):
    _LIBRARY.define(f"{_name}({_arguments}", tags=torch.Tag.pt2_compliant_tag)

_PLAIN = {Tensor, torch.nn.Parameter}
_MOST_KNOWN = 4096
_known: dict[Any, tuple[Problem, Choice]] = {}
_direct: dict[Any, Callable[..., tuple[Tensor, Tensor | None]]] = {}


def conv2d(x, weight, bias, stride, padding, dilation, groups, activation, pool, implementation) -> Tensor:
    """See `perfkit.kernels.conv2d.conv2d`."""
    if torch.compiler.is_compiling():
        given = options(stride, padding, dilation, groups, activation, pool)
        _check_tensors(weight, bias)
        check_ranks("torch", x.dim(), weight.dim())
        padding = resolved(given, x.shape[2:], weight.shape[2:])
        rest = given.dilation, given.groups, given.activation, given.pool, implementation
        return torch.ops.perfkit.conv2d_auto(x, weight, bias, given.stride, padding, *rest)
    key = None
    if type(weight) in _PLAIN and (bias is None or type(bias) in _PLAIN):
        of_bias = None if bias is None else (bias.shape, bias.dtype, bias.device, bias.is_contiguous())
        of_tensors = x.shape, x.stride(), x.dtype, x.device, weight.shape, weight.dtype, weight.device, of_bias
        of_call = stride, padding, dilation, groups, activation, pool, implementation, _autotune._generation
        key = of_tensors, of_call
        try:
            run = _direct.get(key)
        except TypeError:  # a list among the options
            run = key = None
        if run is not None and weight.is_contiguous() and _nothing_on(x, weight, bias):
            return run(x, weight, bias)[0]
    given = options(stride, padding, dilation, groups, activation, pool)
    _check_tensors(weight, bias)
    y = _call(x, weight, bias, given, implementation)
    if key is not None and x.is_cpu and _nothing_on(x, weight, bias):
        _remember(key, x, weight, bias, given, implementation)
    return y


def _nothing_on(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Numbers are wanted of plain tensors, and no more: no gradient, autocast, trace, mode or transformation."""
    return not (
        (
            torch.is_grad_enabled()
            and (x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad))
        )
        or torch._C._is_any_autocast_enabled()
        or _op._traces.get()
        or _observed((x, weight) if bias is None else (x, weight, bias))
    )


def _remember(key, x, weight, bias, given, implementation) -> None:
    """Where the CPU kernel takes such tensors as they lie, next time it is called at once."""
    made, choice = _picked(x, weight, bias, given, False, implementation)
    if choice.implementation == "cpu" and _dense(made, x) is x and (bias is None or bias.is_contiguous()):
        if len(_direct) >= _MOST_KNOWN:
            _direct.clear()
        _direct[key] = _kernel("cpu").caller(made)


def _check_tensors(weight: Any, bias: Any) -> None:
    for name, tensor in (("weight", weight), ("bias", bias)):
        if not isinstance(tensor, Tensor) and (tensor is not None or name == "weight"):
            raise InvalidInputError(f"{name} is a {type(tensor).__name__}: expected a torch tensor, as x is")


def _call(x: Tensor, weight: Tensor, bias: Tensor | None, given: Options, implementation: str | None) -> Tensor:
    device = x.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return _call(*(_cast(tensor, dtype) for tensor in (x, weight, bias)), given, implementation)
    tensors = (x, weight) if bias is None else (x, weight, bias)
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    observed = _observed(tensors)
    made, choice = (_problem_and_choice if observed else _picked)(x, weight, bias, given, needs_grad, implementation)
    if choice.implementation in _FRAMEWORKS:
        return _FRAMEWORKS[choice.implementation](made, x, weight, bias)
    if not observed and not needs_grad:
        return _run(made, choice, x, weight, bias)[0]
    if not observed:
        return _Step.apply(x, weight, bias, made, choice)
    run = torch.ops.perfkit.conv2d if observed == "traced" else Conv2d.apply
    return run(x, weight, bias, *_told(made), needs_grad, choice.implementation)[0]


def _observed(tensors: tuple[Tensor, ...]) -> str | None:
    """Who must see the call as one operation, or be given other numbers than lie in memory; None for nobody."""
    if not _PLAIN.issuperset(map(type, tensors)) or torch.compiler.is_compiling():
        return "traced"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "transformed"
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise UnsupportedError(
            "perfkit's convolution kernels have no forward-mode derivative: pass implementation='library'"
        )
    if torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None:
        return "traced"
    return "traced" if any(map(Tensor.is_neg, tensors)) else None


# ---- Who computes ----------------------------------------------------------------------------------------------------


def _picked(x, weight, bias, given, needs_grad, implementation, recorded: bool = True) -> tuple[Problem, Choice]:
    """The problem, checked, and who computes it: found once for all calls with such tensors."""
    # the same key is the same answer as long as no table of measurements changes
    tables = os.environ.get("PERFKIT_CACHE"), _autotune._generation
    of_weight, of_bias = (weight.shape, weight.dtype, weight.device), None
    if bias is not None:
        of_bias = bias.shape, bias.dtype, bias.device
    key = (x.shape, x.stride(), x.dtype, x.device, of_weight, of_bias, given, needs_grad, implementation, tables)
    found = _known.get(key)
    if found is None:
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        found = _problem_and_choice(x, weight, bias, given, needs_grad, implementation, recorded)
        _known[key] = found
    elif recorded and _op._traces.get():
        op.OP.choose(found[0], implementation)
    return found


def _problem_and_choice(x, weight, bias, given, needs_grad, implementation, recorded: bool = True):
    made = problem_of(x, weight, bias, given, needs_grad)
    if not recorded:
        return made, _op._choose(op.OP, made, implementation, _autotune.state())
    return made, op.OP.choose(made, implementation)


def problem_of(x: Tensor, weight: Tensor, bias: Tensor | None, given: Options, needs_grad: bool) -> Problem:
    """The call's problem; of sizes that a compiler knows by symbols, the one that it is compiled with first."""
    tensors = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    devices = {name: str(tensor.device) for name, tensor in tensors.items()}
    if len(set(devices.values())) > 1:
        raise InvalidInputError(f"tensors are on several devices, {devices}: expected one")
    check_ranks("torch", x.dim(), weight.dim())
    padding = resolved(given, x.shape[2:], weight.shape[2:])
    return problem(
        Options(given.stride, tuple(map(int, padding)), *_rest(given)),
        framework="torch",
        device=x.device.type,
        dtypes={name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()},
        image=[_size(size) for size in x.shape],
        kernel=[_size(size) for size in weight.shape],
        bias=None if bias is None else [_size(size) for size in bias.shape],
        channels_last=channels_last(x),
        needs_grad=needs_grad,
    )


def _rest(given: Options) -> tuple:
    return given.dilation, given.groups, given.activation, given.pool


def _size(size: Any) -> int:
    return size if isinstance(size, int) else size.node.hint if size.node.has_hint() else int(size)


def channels_last(x: Tensor) -> bool:
    """Whether torch's own layers take x, of four dimensions, as channels_last: where its strides leave no doubt."""
    least = 0
    sizes, strides = x.shape, x.stride()
    if strides[1] == 0:
        return False
    for dim in (1, 3, 2, 0):
        if sizes[dim] == 0 or strides[dim] < least or (dim == 0 and least == strides[1]):
            return False
        least = strides[dim] * (sizes[dim] if sizes[dim] > 1 else 1)
    return True


def _dense(made: Problem, tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last if made.channels_last else torch.contiguous_format)


def _run(made: Problem, choice: Choice, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """y and argmax by a kernel, from tensors that lie anyhow."""
    bias = None if bias is None else bias.contiguous()
    return _kernel(choice.implementation).forward(
        made, _dense(made, x), weight.contiguous(), bias, choice.configuration
    )


@functools.cache
def _kernel(name: str):
    """The kernel's module."""
    if name not in ("cpu", "triton"):
        raise InvalidInputError(f"torch.ops.perfkit.conv2d has no kernel {name!r}: expected 'cpu' or 'triton'")
    return importlib.import_module(f"perfkit.kernels.conv2d.{name}_kernel")


def _by_library(made: Problem, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The framework's layers. ReLU after the pool is the same in value and gradient, and less work."""
    top, bottom, left, right = made.padding
    padding = (top, left)
    if (top, left) != (bottom, right):
        x, padding = F.pad(x, (left, right, top, bottom)), (0, 0)
    y = F.conv2d(x, weight, bias, made.stride, padding, made.dilation, made.groups)
    y = F.max_pool2d(y, made.pool) if made.pool > 1 else y
    return F.relu(y) if made.activation == "relu" else y


def _by_reference(made: Problem, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = reference.conv2d(made, x.permute(0, 2, 3, 1), weight.permute(2, 3, 1, 0), bias)
    return _dense(made, y.permute(0, 3, 1, 2))


_FRAMEWORKS = {"library": _by_library, "reference": _by_reference}


# ---- The operators ---------------------------------------------------------------------------------------------------


def _auto(x, weight, bias, stride, padding, dilation, groups, activation, pool, implementation):
    return _call(x, weight, bias, _given(stride, padding, dilation, groups, activation, pool), implementation)


def _given(stride, padding, dilation, groups, activation, pool) -> Options:
    return Options(tuple(stride), tuple(map(int, padding)), tuple(dilation), groups, activation, pool)


def _conv2d(x, weight, bias, stride, padding, dilation, groups, activation, pool, save, implementation):
    given = _given(stride, padding, dilation, groups, activation, pool)
    made, choice = _picked(x, weight, bias, given, save, implementation, recorded=False)
    y, argmax = _run(made, choice, x, weight, bias)
    return y, x.new_empty(0, dtype=torch.uint8) if argmax is None else argmax


def _conv2d_fake(x, weight, _bias, stride, padding, dilation, _groups, activation, pool, save, _implementation):
    size = (x.size(0), weight.size(0), *_pooled_size(x, weight, stride, padding, dilation, pool))
    layout = torch.channels_last if channels_last(x) else torch.contiguous_format
    saves = save and (pool > 1 or activation == "relu")
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout)
    return y, torch.empty_like(y, dtype=torch.uint8) if saves else x.new_empty(0, dtype=torch.uint8)


def _told(made: Problem) -> tuple:
    """The operators' options."""
    return made.stride, made.padding, made.dilation, made.groups, made.activation, made.pool


def _pooled_size(x, weight, stride, padding, dilation, pool):
    for i in range(2):
        padded = x.size(2 + i) + padding[2 * i] + padding[2 * i + 1]
        yield ((padded - (weight.size(2 + i) - 1) * dilation[i] - 1) // stride[i] + 1) // pool


def _backward(
    x, weight, bias, argmax, d_y, stride, padding, dilation, groups, activation, pool, wanted, implementation
):
    given = _given(stride, padding, dilation, groups, activation, pool)
    made, choice = _picked(x, weight, bias, given, True, implementation, recorded=False)
    argmax = argmax if argmax.numel() else None
    found = _gradients(made, choice, x, weight, bias, argmax, d_y, tuple(wanted))
    return tuple(x.new_empty(0) if each is None else each for each in found)


def _gradients(made: Problem, choice: Choice, x, weight, bias, argmax, d_y, wanted):
    """Of x, weight and bias by a kernel, None where it is not wanted; what was not saved is found again."""
    x, weight = _dense(made, x), weight.contiguous()
    if made.saves_argmax and argmax is None:
        argmax = _run(made, choice, x, weight, bias)[1]
    argmax = _dense(made, argmax) if made.saves_argmax else None
    backward = _kernel(choice.implementation).backward
    return backward(made, x, weight, argmax, _dense(made, d_y), wanted, choice.configuration)


def _backward_fake(x, weight, bias, _argmax, _d_y, *rest):
    layout = torch.channels_last if channels_last(x) else torch.contiguous_format
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout)
    likes = (d_x, weight.new_empty(weight.shape), None if bias is None else bias.new_empty(bias.shape))
    wanted = rest[-2]
    return tuple(
        like if want and like is not None else x.new_empty(0) for like, want in zip(likes, wanted, strict=True)
    )


_LIBRARY.impl("conv2d_auto", _auto, "CompositeImplicitAutograd")
_LIBRARY.impl("conv2d", _conv2d, "CompositeExplicitAutograd")
_LIBRARY.impl("conv2d_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("perfkit::conv2d", _conv2d_fake, lib=_LIBRARY)
torch.library.register_fake("perfkit::conv2d_backward", _backward_fake, lib=_LIBRARY)


# ---- Autograd --------------------------------------------------------------------------------------------------------
#
# `Conv2d` and `Conv2dBackward` are of the form that torch.func can transform, which torch.library.register_autograd's
# are not; `_Step` is the short form, for plain tensors.


class _Step(torch.autograd.Function):
    """A kernel as a step of autograd."""

    @staticmethod
    def forward(ctx, x, weight, bias, made, choice):
        y, argmax = _run(made, choice, x, weight, bias)
        ctx.save_for_backward(x, weight, bias, argmax)
        ctx.call = made, choice
        return y

    @staticmethod
    def backward(ctx, d_y):
        x, weight, bias, argmax = ctx.saved_tensors
        (made, choice), wanted = ctx.call, ctx.needs_input_grad[:3]
        if torch.is_grad_enabled() or _observed((x, weight, d_y)):
            argmax = x.new_empty(0, dtype=torch.uint8) if argmax is None else argmax
            rest = *_told(made), list(wanted), choice.implementation
            found = Conv2dBackward.apply(x, weight, bias, argmax, d_y, *rest)
        else:
            found = _gradients(made, choice, x, weight, bias, argmax, d_y, wanted)
        return *(each if want else None for each, want in zip(found, wanted, strict=True)), None, None


class Conv2d(torch.autograd.Function):
    """`torch.ops.perfkit.conv2d` as a step of autograd and of torch.func's transformations."""

    @staticmethod
    def forward(x, weight, bias, *rest):
        if _observed((x, weight) if bias is None else (x, weight, bias)) is None:
            return _conv2d(x, weight, bias, *rest)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.perfkit.conv2d(x, weight, bias, *rest)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, *ctx.options, _save, ctx.implementation = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, output[1])

    @staticmethod
    def backward(ctx, d_y, _):
        if d_y is None:
            return (None,) * 11
        x, weight, bias, argmax = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        found = Conv2dBackward.apply(x, weight, bias, argmax, d_y, *ctx.options, wanted, ctx.implementation)
        return *(each if want else None for each, want in zip(found, wanted, strict=True)), *(None,) * 8

    @staticmethod
    def vmap(info, in_dims, x, weight, bias, *rest):
        return batched(info, in_dims, x, weight, bias, *rest, run=Conv2d.apply)


class Conv2dBackward(torch.autograd.Function):
    """`torch.ops.perfkit.conv2d_backward`, which has no derivative."""

    @staticmethod
    def forward(x, weight, bias, argmax, d_y, *rest):
        if _observed((x, weight, argmax, d_y)) is None:
            return _backward(x, weight, bias, argmax, d_y, *rest)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.perfkit.conv2d_backward(x, weight, bias, argmax, d_y, *rest)

    @staticmethod
    def setup_context(_ctx, _inputs, _output):
        pass

    @staticmethod
    def backward(_ctx, *_gradients):
        raise UnsupportedError(
            "perfkit's convolution kernels have no second derivative: pass implementation='library', whose operations "
            "torch differentiates as often as wanted"
        )

    @staticmethod
    def vmap(info, in_dims, x, weight, bias, argmax, d_y, *rest):
        return batched_backward(info, in_dims, x, weight, bias, argmax, d_y, *rest, run=Conv2dBackward.apply)


def _differentiable(function: type[torch.autograd.Function], operator: Any):
    def run(*arguments):
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise UnsupportedError(
                "torch.func transforms perfkit.kernels.conv2d.conv2d, and not torch.ops.perfkit.conv2d: call that"
            )
        tensors = (each for each in arguments if isinstance(each, Tensor))
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return function.apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    return run


_LIBRARY.impl("conv2d", _differentiable(Conv2d, torch.ops.perfkit.conv2d), "Autograd")
_LIBRARY.impl("conv2d_backward", _differentiable(Conv2dBackward, torch.ops.perfkit.conv2d_backward), "Autograd")


# ---- Autocast --------------------------------------------------------------------------------------------------------


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What autocast makes of an argument: float64 stays."""
    narrow = tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if narrow else tensor


def _autocast(device: str):
    def run(x, weight, bias, *rest):
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return torch.ops.perfkit.conv2d(*(_cast(tensor, dtype) for tensor in (x, weight, bias)), *rest)

    return run


_LIBRARY.impl("conv2d", _autocast("cpu"), "AutocastCPU")
_LIBRARY.impl("conv2d", _autocast("cuda"), "AutocastCUDA")


# ---- vmap ------------------------------------------------------------------------------------------------------------

_operators = torch.ops.perfkit
torch.library.register_vmap("perfkit::conv2d", partial(batched, run=_operators.conv2d), lib=_LIBRARY)
torch.library.register_vmap(
    "perfkit::conv2d_backward", partial(batched_backward, run=_operators.conv2d_backward), lib=_LIBRARY
)
