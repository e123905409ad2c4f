"""What a call of the op is in torch, checked, without its numbers."""

from __future__ import annotations

from typing import Any

from torch import SymInt, Tensor

from perfkit._errors import InvalidInputError
from perfkit.kernels.conv2d.problem import Options, Problem, check_ranks, problem, resolved


def check_tensors(weight: Any, bias: Any) -> None:
    """Raises InvalidInputError where one of them is no tensor."""
    for name, tensor in (("weight", weight), ("bias", bias)):
        if not isinstance(tensor, Tensor) and (tensor is not None or name == "weight"):
            raise InvalidInputError(f"{name} is a {type(tensor).__name__}: expected a torch tensor, as x is")


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
        image=[hinted(size) for size in x.shape],
        kernel=[hinted(size) for size in weight.shape],
        bias=None if bias is None else [hinted(size) for size in bias.shape],
        channels_last=channels_last(x),
        needs_grad=needs_grad,
    )


def _rest(given: Options) -> tuple:
    return given.dilation, given.groups, given.activation, given.pool


def hinted(size: Any) -> int:
    """A size as a number: of a symbol, what a program is compiled with first."""
    if isinstance(size, SymInt) and size.node.has_hint():
        return size.node.hint
    return int(size)  # under torch.jit.trace it is a tensor


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
