"""What `conv2d` does with torch tensors: the shortest way to who computes that keeps all promises.

A kernel is called as it is where no gradient is wanted and nothing looks on, and is one step of autograd where one is:
a small call takes microseconds, so what a kind of call is found to be is remembered. Under torch.compile and
torch.export, `torch.ops.perfkit.conv2d_auto` stands in the graph at first; it picks when it is traced, and becomes the
framework's own operations, or `torch.ops.perfkit.conv2d` with the name of a kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from perfkit.kernels import _autotune, _op
from perfkit.kernels import conv2d as op
from perfkit.kernels._torch import PLAIN, autocasts, cast
from perfkit.kernels.conv2d.problem import Options, check_ranks, options, resolved
from perfkit.kernels.conv2d.torch_op import OPTIONS, Conv2d, Step, given_options, observer_of, told
from perfkit.kernels.conv2d.torch_problem import check_tensors, problem_of
from perfkit.kernels.conv2d.torch_run import FRAMEWORKS, dense, kernel, picked, run

_MOST_KNOWN = 4096
_direct: dict[Any, Callable[..., tuple[Tensor, Tensor | None]]] = {}


def conv2d(x, weight, bias, stride, padding, dilation, groups, activation, pool, implementation) -> Tensor:
    """See `perfkit.kernels.conv2d.conv2d`."""
    if torch.compiler.is_compiling():
        given = options(stride, padding, dilation, groups, activation, pool)
        check_tensors(weight, bias)
        check_ranks("torch", x.dim(), weight.dim())
        padding = resolved(given, x.shape[2:], weight.shape[2:])
        rest = given.dilation, given.groups, given.activation, given.pool, implementation
        return torch.ops.perfkit.conv2d_auto(x, weight, bias, given.stride, padding, *rest)
    key = None
    if type(weight) in PLAIN and (bias is None or type(bias) in PLAIN):
        of_bias = None if bias is None else (bias.shape, bias.dtype, bias.device, bias.is_contiguous())
        of_tensors = x.shape, x.stride(), x.dtype, x.device, weight.shape, weight.dtype, weight.device, of_bias
        of_call = stride, padding, dilation, groups, activation, pool, implementation
        key = of_tensors, of_call, _autotune.state()
        try:
            at_once = _direct.get(key)
        except TypeError:  # a list among the options
            at_once = key = None
        if at_once is not None and weight.is_contiguous() and _nothing_on(x, weight, bias):
            return at_once(x, weight, bias)[0]
    given = options(stride, padding, dilation, groups, activation, pool)
    check_tensors(weight, bias)
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
        or _op.tracing()
        or observer_of((x, weight) if bias is None else (x, weight, bias))
    )


def _remember(key, x, weight, bias, given, implementation) -> None:
    """Where the CPU kernel takes such tensors as they lie, next time it is called at once."""
    made, choice = picked(x, weight, bias, given, False, implementation)
    if choice.implementation == "cpu" and dense(made, x) is x and (bias is None or bias.is_contiguous()):
        if len(_direct) >= _MOST_KNOWN:
            _direct.clear()
        _direct[key] = kernel("cpu").caller(made)


def _call(x: Tensor, weight: Tensor, bias: Tensor | None, given: Options, implementation: str | None) -> Tensor:
    device = x.device.type
    if autocasts(device):
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return _call(*(cast(tensor, dtype) for tensor in (x, weight, bias)), given, implementation)
    tensors = (x, weight) if bias is None else (x, weight, bias)
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    observed = observer_of(tensors)
    if observed:  # sizes may be symbols, and strides those of a stand-in: nothing to remember
        made = problem_of(x, weight, bias, given, needs_grad)
        choice = op.OP.choose(made, implementation)
    else:
        made, choice = picked(x, weight, bias, given, needs_grad, implementation)
    if choice.implementation in FRAMEWORKS:
        return FRAMEWORKS[choice.implementation](made, x, weight, bias)
    if not observed and not needs_grad:
        return run(made, choice, x, weight, bias)[0]
    if not observed:
        return Step.apply(x, weight, bias, made, choice)
    apply = Conv2d.apply if observed == "transformed" else torch.ops.perfkit.conv2d
    return apply(x, weight, bias, *told(made), needs_grad, choice.implementation)[0]


def _auto(x, weight, bias, stride, padding, dilation, groups, activation, pool, implementation):
    return _call(x, weight, bias, given_options(stride, padding, dilation, groups, activation, pool), implementation)


_LIBRARY = torch.library.Library("perfkit", "FRAGMENT")
_LIBRARY.define(f"conv2d_auto(Tensor x, Tensor weight, Tensor? bias, {OPTIONS}, str? implementation) -> Tensor")
_LIBRARY.impl("conv2d_auto", _auto, "CompositeImplicitAutograd")
