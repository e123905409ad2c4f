"""`torch.ops.perfkit.conv2d` and its gradient, with everything registered: compilers keep them whole.

The arguments:

    x, weight, bias               as of `perfkit.kernels.conv2d.conv2d`
    stride, padding, dilation     two, four (top, bottom, left, right) and two integers
    groups, activation, pool      as of `Problem`
    save                          return argmax too, for the backward pass, which else runs the forward pass again
    implementation                "cpu" or "triton"

It returns y, and argmax: of y's shape, or empty. See the package's head for what argmax holds.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from perfkit._errors import UnsupportedError
from perfkit.kernels._torch import cast, observer
from perfkit.kernels.conv2d.problem import Options, Problem
from perfkit.kernels.conv2d.torch_batch import batched, batched_backward
from perfkit.kernels.conv2d.torch_problem import channels_last
from perfkit.kernels.conv2d.torch_run import gradients, picked, run

OPTIONS = "int[] stride, SymInt[] padding, int[] dilation, int groups, str? activation, int pool"
_TENSORS = "Tensor x, Tensor weight, Tensor? bias"
_LIBRARY = torch.library.Library("perfkit", "FRAGMENT")
for _name, _signature in (
    ("conv2d", f"({_TENSORS}, {OPTIONS}, bool save, str implementation) -> (Tensor, Tensor)"),
    (
        "conv2d_backward",
        f"({_TENSORS}, Tensor argmax, Tensor d_y, {OPTIONS}, bool[] wanted, str implementation) "
        "-> (Tensor, Tensor, Tensor)",
    ),
):
    _LIBRARY.define(f"{_name}{_signature}", tags=torch.Tag.pt2_compliant_tag)


def given_options(stride, padding, dilation, groups, activation, pool) -> Options:
    return Options(tuple(stride), tuple(map(int, padding)), tuple(dilation), groups, activation, pool)


def _conv2d(x, weight, bias, stride, padding, dilation, groups, activation, pool, save, implementation):
    given = given_options(stride, padding, dilation, groups, activation, pool)
    made, choice = picked(x, weight, bias, given, save, implementation, recorded=False)
    y, argmax = run(made, choice, x, weight, bias)
    return y, x.new_empty(0, dtype=torch.uint8) if argmax is None else argmax


def _conv2d_fake(x, weight, _bias, stride, padding, dilation, _groups, activation, pool, save, _implementation):
    size = (x.size(0), weight.size(0), *_pooled_size(x, weight, stride, padding, dilation, pool))
    layout = torch.channels_last if channels_last(x) else torch.contiguous_format
    saves = save and (pool > 1 or activation == "relu")
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout)
    return y, torch.empty_like(y, dtype=torch.uint8) if saves else x.new_empty(0, dtype=torch.uint8)


def told(made: Problem) -> tuple:
    """The operators' options."""
    return made.stride, made.padding, made.dilation, made.groups, made.activation, made.pool


def _pooled_size(x, weight, stride, padding, dilation, pool):
    for i in range(2):
        padded = x.size(2 + i) + padding[2 * i] + padding[2 * i + 1]
        yield ((padded - (weight.size(2 + i) - 1) * dilation[i] - 1) // stride[i] + 1) // pool


def _backward(
    x, weight, bias, argmax, d_y, stride, padding, dilation, groups, activation, pool, wanted, implementation
):
    given = given_options(stride, padding, dilation, groups, activation, pool)
    made, choice = picked(x, weight, bias, given, True, implementation, recorded=False)
    argmax = argmax if argmax.numel() else None
    found = gradients(made, choice, x, weight, bias, argmax, d_y, tuple(wanted))
    return tuple(x.new_empty(0) if each is None else each for each in found)


def _backward_fake(x, weight, bias, _argmax, _d_y, *rest):
    layout = torch.channels_last if channels_last(x) else torch.contiguous_format
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout)
    likes = (d_x, weight.new_empty(weight.shape), None if bias is None else bias.new_empty(bias.shape))
    wanted = rest[-2]
    return tuple(
        like if want and like is not None else x.new_empty(0) for like, want in zip(likes, wanted, strict=True)
    )


_LIBRARY.impl("conv2d", _conv2d, "CompositeExplicitAutograd")
_LIBRARY.impl("conv2d_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("perfkit::conv2d", _conv2d_fake, lib=_LIBRARY)
torch.library.register_fake("perfkit::conv2d_backward", _backward_fake, lib=_LIBRARY)


# ---- Autograd --------------------------------------------------------------------------------------------------------
#
# `Conv2d` and `Conv2dBackward` are of the form that torch.func can transform, which torch.library.register_autograd's
# are not; `Step` is the short form, for plain tensors.


def observer_of(tensors: tuple[Tensor, ...]) -> str | None:
    """Who must see the call as one operation; None for nobody."""
    found = observer(tensors)
    if found == "dual":
        raise UnsupportedError(
            "perfkit's convolution kernels have no forward-mode derivative: pass implementation='library'"
        )
    return found


class Step(torch.autograd.Function):
    """A kernel as a step of autograd."""

    @staticmethod
    def forward(ctx, x, weight, bias, made, choice):
        y, argmax = run(made, choice, x, weight, bias)
        ctx.save_for_backward(x, weight, bias, argmax)
        ctx.call = made, choice
        return y

    @staticmethod
    def backward(ctx, d_y):
        x, weight, bias, argmax = ctx.saved_tensors
        (made, choice), wanted = ctx.call, ctx.needs_input_grad[:3]
        if torch.is_grad_enabled() or observer_of((x, weight, d_y)):
            argmax = x.new_empty(0, dtype=torch.uint8) if argmax is None else argmax
            rest = *told(made), list(wanted), choice.implementation
            found = Conv2dBackward.apply(x, weight, bias, argmax, d_y, *rest)
        else:
            found = gradients(made, choice, x, weight, bias, argmax, d_y, wanted)
        return *(each if want else None for each, want in zip(found, wanted, strict=True)), None, None


class Conv2d(torch.autograd.Function):
    """`torch.ops.perfkit.conv2d` as a step of autograd and of torch.func's transformations."""

    @staticmethod
    def forward(x, weight, bias, *rest):
        if observer_of((x, weight) if bias is None else (x, weight, bias)) is None:
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
        if observer_of((x, weight, argmax, d_y)) is None:
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


def _autocast(device: str):
    def run(x, weight, bias, *rest):
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return torch.ops.perfkit.conv2d(*(cast(tensor, dtype) for tensor in (x, weight, bias)), *rest)

    return run


_LIBRARY.impl("conv2d", _autocast("cpu"), "AutocastCPU")
_LIBRARY.impl("conv2d", _autocast("cuda"), "AutocastCUDA")


# ---- vmap ------------------------------------------------------------------------------------------------------------

_operators = torch.ops.perfkit
torch.library.register_vmap("perfkit::conv2d", partial(batched, run=_operators.conv2d), lib=_LIBRARY)
torch.library.register_vmap(
    "perfkit::conv2d_backward", partial(batched_backward, run=_operators.conv2d_backward), lib=_LIBRARY
)
