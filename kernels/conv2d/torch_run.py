"""A call of the op on torch tensors, forward and backward, by the implementation that was chosen."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from perfkit._errors import InvalidInputError
from perfkit.kernels import conv2d as op
from perfkit.kernels._op import Choice
from perfkit.kernels._torch import Known
from perfkit.kernels.conv2d import reference
from perfkit.kernels.conv2d.problem import Options, Problem
from perfkit.kernels.conv2d.torch_problem import problem_of

_known = Known(op.OP)


def picked(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    given: Options,
    needs_grad: bool,
    implementation: str | None,
    recorded: bool = True,
) -> tuple[Problem, Choice]:
    """The problem, checked, and who computes it."""
    of_weight, of_bias = (weight.shape, weight.dtype, weight.device), None
    if bias is not None:
        of_bias = bias.shape, bias.dtype, bias.device
    kind = x.shape, x.stride(), x.dtype, x.device, of_weight, of_bias, given, needs_grad
    return _known(kind, lambda: problem_of(x, weight, bias, given, needs_grad), implementation, recorded=recorded)


def dense(made: Problem, tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last if made.channels_last else torch.contiguous_format)


def run(made: Problem, choice: Choice, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """y and argmax by a kernel, from tensors that lie anyhow."""
    bias = None if bias is None else bias.contiguous()
    return kernel(choice.implementation).forward(made, dense(made, x), weight.contiguous(), bias, choice.configuration)


@functools.cache
def kernel(name: str) -> ModuleType:
    """The kernel's module."""
    if name not in ("cpu", "triton"):
        raise InvalidInputError(f"torch.ops.perfkit.conv2d has no kernel {name!r}: expected 'cpu' or 'triton'")
    return importlib.import_module(f"perfkit.kernels.conv2d.{name}_kernel")


def by_library(made: Problem, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The framework's layers. ReLU after the pool is the same in value and gradient, and less work."""
    top, bottom, left, right = made.padding
    padding = (top, left)
    if (top, left) != (bottom, right):
        x, padding = F.pad(x, (left, right, top, bottom)), (0, 0)
    y = F.conv2d(x, weight, bias, made.stride, padding, made.dilation, made.groups)
    y = F.max_pool2d(y, made.pool) if made.pool > 1 else y
    return F.relu(y) if made.activation == "relu" else y


def by_reference(made: Problem, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = reference.conv2d(made, x.permute(0, 2, 3, 1), weight.permute(2, 3, 1, 0), bias)
    return dense(made, y.permute(0, 3, 1, 2))


FRAMEWORKS = {"library": by_library, "reference": by_reference}


def gradients(made: Problem, choice: Choice, x, weight, bias, argmax, d_y, wanted):
    """Of x, weight and bias by a kernel, None where it is not wanted; what was not saved is found again."""
    x, weight = dense(made, x), weight.contiguous()
    if made.saves_argmax and argmax is None:
        argmax = run(made, choice, x, weight, bias)[1]
    argmax = dense(made, argmax) if made.saves_argmax else None
    backward = kernel(choice.implementation).backward
    return backward(made, x, weight, argmax, dense(made, d_y), wanted, choice.configuration)
