"""One launch of a Triton kernel, worked out before it happens: run here, or compiled ahead of time for a device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from perfkit.kernels._triton import Compilation

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
}
"""Triton's names for pointers."""


@dataclass(frozen=True)
class Launch:
    """A kernel with all of its arguments.

    Args:
        kernel: the `triton.jit` function.
        programs: how many run, numbered along one axis.
        arguments: tensors (or None) and integers by name. Meta tensors will do for `compilation`.
        constants: the `constexpr` arguments.
        options: `num_warps` and `num_stages`.
    """

    kernel: Any
    programs: int
    arguments: Mapping[str, Tensor | int | None]
    constants: Mapping[str, Any]
    options: Mapping[str, int]

    def run(self) -> None:
        """Start the kernel on the device of its tensors."""
        tensor = next(value for value in self.arguments.values() if isinstance(value, Tensor))
        with torch.cuda.device_of(tensor):
            self.kernel[(self.programs,)](**self.arguments, **self.constants, **self.options)

    def compilation(self, name: str, *, tensor_cores: bool, targets: tuple[str, ...] | None = None) -> Compilation:
        """What Triton would compile for this launch: it treats None and 1 as constants, and sees what 16 divides."""
        tensors = {name: value for name, value in self.arguments.items() if isinstance(value, Tensor)}
        integers = {name: value for name, value in self.arguments.items() if isinstance(value, int) and value != 1}
        fixed = {name: value for name, value in self.arguments.items() if name not in tensors and name not in integers}
        return Compilation(
            name,
            self.kernel,
            {name: TYPES[tensor.dtype] for name, tensor in tensors.items()}
            | {name: "i32" if -(2**31) <= value < 2**31 else "i64" for name, value in integers.items()},
            {**fixed, **self.constants},
            divisible=(*tensors, *(name for name, value in integers.items() if value % 16 == 0)),
            options=dict(self.options),
            tensor_cores=tensor_cores,
            **({"targets": targets} if targets else {}),
        )


def power_of_2(size: int, least: int, most: int) -> int:
    """The smallest power of two that holds `size`, within bounds that are powers of two themselves."""
    return min(max(1 << (size - 1).bit_length(), least), most)
