"""`torch.ops.perfkit.linear_int8`: the op in torch, for inference.

A custom operator: torch.compile and torch.export keep it whole, vmap folds a batch into the rows. Autocast leaves it as
it is: integers have no narrower form, and y is what out_dtype says. It has no gradient, and says so.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from perfkit._errors import InvalidInputError, UnsupportedError
from perfkit.kernels import linear_int8 as op
from perfkit.kernels._torch import one_by_one
from perfkit.kernels.linear_int8 import cpu_kernel, reference
from perfkit.kernels.linear_int8.problem import Problem, problem


def run(x, weight, weight_scale, bias, x_scale, activation, out_dtype, implementation) -> Tensor:
    """See `perfkit.kernels.linear_int8.linear_int8`."""
    if isinstance(x_scale, (int, float)) and not isinstance(x_scale, bool):
        x_scale = torch.tensor(float(x_scale), dtype=torch.float32, device=x.device)
    given = {"weight": weight, "weight_scale": weight_scale, "bias": bias, "x_scale": x_scale}
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor) and (tensor is not None or name.startswith("weight")):
            raise InvalidInputError(f"{name} is a {type(tensor).__name__}: expected a torch tensor, as x is")
    out_dtype = torch.float32 if out_dtype is None else out_dtype
    if not isinstance(out_dtype, torch.dtype):
        raise InvalidInputError(f"out_dtype is {out_dtype!r}: expected a torch dtype")
    options = activation or "", out_dtype, implementation or ""
    return torch.ops.perfkit.linear_int8(x, weight, weight_scale, bias, x_scale, *options)


@torch.library.custom_op("perfkit::linear_int8", mutates_args=())
def linear_int8(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    x_scale: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    implementation: str,
) -> Tensor:
    """y of shape (..., N); "" for no activation, and to have the implementation picked."""
    made = _problem(x, weight, weight_scale, bias, x_scale, activation, out_dtype)
    choice = op.OP.choose(made, implementation or None)
    rows = x.reshape(made.rows, made.inputs)
    bias = None if bias is None else bias.float()
    x_scale = None if x_scale is None else x_scale.reshape(-1, 1)
    if made.rows == 0:
        y = x.new_empty((0, made.outputs), dtype=out_dtype)
    else:
        y = _run(choice.implementation)(made, rows, weight, weight_scale, bias, x_scale, choice.configuration)
    return y.to(out_dtype).view(*x.shape[:-1], made.outputs)


@linear_int8.register_fake
def _(x, weight, weight_scale, bias, x_scale, activation, out_dtype, _implementation):
    _problem(x, weight, weight_scale, bias, x_scale, activation, out_dtype)
    return x.new_empty((*x.shape[:-1], weight.size(0)), dtype=out_dtype)


@linear_int8.register_vmap
def _(info, in_dims, x, weight, weight_scale, bias, x_scale, *options):
    x_dim, *weight_dims, scale_dim = in_dims[:5]
    if x_dim is None or any(dim is not None for dim in weight_dims):
        return one_by_one(linear_int8, info, in_dims, x, weight, weight_scale, bias, x_scale, *options)
    x = x.movedim(x_dim, 0)
    if x_scale is not None and scale_dim is not None:
        x_scale = x_scale.movedim(scale_dim, 0)
        # one scale for each of the batch: one for each of its rows
        x_scale = x_scale.reshape(info.batch_size, *([1] * (x.dim() - 2)) if x_scale[0].numel() == 1 else x.shape[1:-1])
        x_scale = x_scale.expand(x.shape[:-1])
    elif x_scale is not None and x_scale.numel() > 1:
        x_scale = x_scale.reshape(x.shape[1:-1]).expand(x.shape[:-1])
    return linear_int8(x, weight, weight_scale, bias, x_scale, *options), 0


def _no_gradient(*_arguments):
    raise UnsupportedError(
        "linear_int8 is for inference: rounding has no gradient. Call it under torch.no_grad(), or train with the qat "
        "recipe"
    )


linear_int8.register_autograd(_no_gradient)


def _problem(x, weight, weight_scale, bias, x_scale, activation, out_dtype) -> Problem:
    tensors = {"x": x, "weight": weight, "weight_scale": weight_scale, "bias": bias, "x_scale": x_scale}
    there = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    devices = {name: str(tensor.device) for name, tensor in there.items()}
    if len(set(devices.values())) > 1:
        raise InvalidInputError(f"tensors are on several devices, {devices}: expected one")
    return problem(
        "torch",
        x.device.type,
        shapes={name: tensor.shape for name, tensor in there.items()},
        dtypes={name: _name(tensor.dtype) for name, tensor in there.items()},
        activation=activation or None,
        out_dtype=_name(out_dtype),
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def _run(implementation: str) -> Any:
    """The function that computes (M, N)."""
    if implementation == "triton":
        from perfkit.kernels.linear_int8 import triton_kernel

        return triton_kernel.forward
    return {"cpu": _cpu, "library": _library, "reference": _reference}[implementation]


def _cpu(made, x, weight, weight_scale, bias, x_scale, _configuration):
    return cpu_kernel.forward(made, x, weight, weight_scale, bias, x_scale)


def _reference(made, x, weight, weight_scale, bias, x_scale, _configuration):
    return reference.linear_int8(made, x, weight, weight_scale, bias, x_scale)


def _library(made, x, weight, weight_scale, bias, x_scale, _configuration):
    if x_scale is None:
        q, x_scale = reference.quantize(torch, x.float())
        x = q.to(torch.int8)
    return reference.finish(made, torch, torch._int_mm(x, weight.t()).float(), x_scale, weight_scale, bias)
