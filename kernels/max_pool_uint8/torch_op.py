"""`torch.ops.perfkit.max_pool_uint8`: the op in torch, for inference on CPU. Compilers keep it whole."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from perfkit._errors import InvalidInputError
from perfkit.kernels import _native
from perfkit.kernels._torch import Threads, folded

SOURCE = Path(__file__).with_name("cpu_kernel.cpp")


@functools.cache
def library() -> ctypes.CDLL:
    """The kernel, built at the first use.

    Raises:
        UnsupportedError: there is no C++ compiler, or it fails.
    """
    return _native.load(SOURCE)


# Compilers may hand over x as it lies best for them: the kernel reads both layouts.
@torch.library.custom_op(
    "perfkit::max_pool_uint8", mutates_args=(), device_types="cpu", tags=(torch.Tag.flexible_layout,)
)
def max_pool_uint8(x: Tensor, size: int, flat: bool) -> Tensor:
    """The largest of each square, with torch.get_num_threads() threads.

    Args:
        x: (N, C, H, W), uint8, contiguous or channels_last.
        size: side of the squares. Rows and columns beyond the last whole square are left out.
        flat: the result is contiguous, whatever the layout of x.

    Returns:
        (N, C, H // size, W // size), uint8.

    Raises:
        InvalidInputError: x is nothing of that kind, or smaller than a square.
        UnsupportedError: there is no C++ compiler to build the kernel.
    """
    y, last = _empty(x, size, flat), _channels_last(x)
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    told = (ctypes.c_int64 * 7)(*x.shape, size, last, flat)
    pointers = ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr())
    if y.numel() and library().perfkit_max_pool_uint8(told, *pointers, Threads.of_torch()):
        raise MemoryError("the max-pool kernel found no memory for its working space")
    return y


@max_pool_uint8.register_fake
def _(x: Tensor, size: int, flat: bool) -> Tensor:
    return _empty(x, size, flat)


@max_pool_uint8.register_vmap
def _(info, in_dims, x: Tensor, size: int, flat: bool) -> tuple[Tensor, int]:
    """torch would call it row by row, and warns of that from 2.14 on."""
    y = max_pool_uint8(folded(info.batch_size, x, in_dims[0], 0), size, flat)
    return y.unflatten(0, (info.batch_size, -1)), 0


def _empty(x: Tensor, size: int, flat: bool) -> Tensor:
    if x.dim() != 4 or x.dtype != torch.uint8 or size < 1 or min(x.shape[2:]) < size:
        raise InvalidInputError(
            f"x is {x.dtype} {list(x.shape)}: expected (N, C, H, W), torch.uint8, of at least {size} × {size}"
        )
    layout = torch.channels_last if _channels_last(x) and not flat else torch.contiguous_format
    shape = (x.size(0), x.size(1), x.size(2) // size, x.size(3) // size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def _channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
