"""What ops on 8-bit activations share on torch tensors: what they check, weights kept as kernels read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from perfkit._errors import InvalidInputError


def check(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dimensions: int) -> None:
    """What kernels rely on.

    Raises:
        InvalidInputError: tensors of other dtypes, sizes or devices.
    """
    outputs = weight.shape[:1]
    if weight.dtype != torch.int8 or weight.dim() != dimensions or not weight.numel():
        raise InvalidInputError(
            f"weight is {weight.dtype} {list(weight.shape)}: expected torch.int8 of {dimensions} dimensions"
        )
    if x.dtype not in (torch.float32, torch.uint8):
        raise InvalidInputError(f"x is {x.dtype}: expected torch.float32, or torch.uint8 on the grid")
    for name, tensor in (("weight_scale", weight_scale), ("bias", bias)):
        if tensor is not None and (tensor.dtype != torch.float32 or tensor.shape != outputs):
            raise InvalidInputError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}: expected torch.float32 {list(outputs)}"
            )
    given = [tensor for tensor in (x, weight, weight_scale, bias) if tensor is not None]
    if any(tensor.device.type != "cpu" for tensor in given):
        raise InvalidInputError(f"tensors are on {', '.join(str(each.device) for each in given)}: expected cpu")


_packed = WeakTensorKeyDictionary()
"""By integer weight: for each way to pack it, the versions that it was packed from, and that."""


def packed(weight: Tensor, scale: Tensor, way: Any, pack: Callable[[Tensor, Tensor], Tensor | None]) -> Tensor | None:
    """The weight as kernels read it, packed anew where it or its scales were written to; None where `pack` gives that.

    What was made in inference mode keeps no count of writes, and is packed at each call.
    """
    if weight.is_inference() or scale.is_inference():
        return pack(weight, scale)
    key = weight._version, scale._version, weight.data_ptr(), scale.data_ptr()
    ways = _packed.get(weight)
    if ways is None:
        ways = _packed[weight] = {}
    found = ways.get(way)
    if found is None or found[0] != key:
        found = ways[way] = key, pack(weight, scale)
    return found[1]


def pack_with(run: Any, told: Sequence[Any], size: int, weight: Tensor, scale: Tensor) -> Tensor | None:
    """What `run(*told, weight, scale, to)` writes into `size` bytes; None where a scale is not positive and finite."""
    with torch.inference_mode(False), torch.no_grad():  # kept for calls in other modes
        to = torch.empty(size, dtype=torch.uint8, device="cpu")
    fine = run(*told, weight.contiguous().data_ptr(), scale.contiguous().data_ptr(), to.data_ptr())
    return to if fine else None
