"""Linear layers on the sparse tensor cores that NVIDIA GPUs have since Ampere."""

from __future__ import annotations

import warnings

import torch
from torch import nn

SPARSE_KERNELS = (2, 4)
"""The pattern that they compute: at most 2 of any 4 consecutive inputs of an output."""

_DTYPES = (torch.float16, torch.bfloat16)
_CAPABILITY = (8, 0)


def use_sparse_kernel(module: nn.Module) -> str | None:
    """Store a weight of that pattern compressed and multiply with it; returns why not, None where it is done.

    The kernel's answer on random inputs is compared with the dense product before anything is replaced.

    Source: https://docs.pytorch.org/docs/stable/sparse.html#sparse-semi-structured-tensors
    """
    if type(module) is not nn.Linear:
        return "there are sparse kernels for linear layers only"
    weight = module.weight.detach()
    if weight.device.type != "cuda":
        return "sparse kernels need an NVIDIA GPU"
    if torch.cuda.get_device_capability(weight.device) < _CAPABILITY:
        return "sparse kernels need compute capability 8.0"
    if weight.dtype not in _DTYPES:
        return (
            f"sparse kernels need float16 or bfloat16, and its weights are {str(weight.dtype).removeprefix('torch.')}"
        )
    inputs = torch.randn(64, weight.shape[1], dtype=weight.dtype, device=weight.device)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.filterwarnings("ignore", message=".*SparseSemiStructuredTensor.*")
            compressed = torch.sparse.to_sparse_semi_structured(weight)
            sparse = nn.functional.linear(inputs, compressed)
    except (RuntimeError, ValueError, NotImplementedError) as error:  # shapes that no kernel takes
        return str(error).strip().splitlines()[0][:120]
    exact = nn.functional.linear(inputs.double(), weight.double())
    rounding = torch.finfo(weight.dtype).eps
    if float((sparse.double() - exact).norm()) > 2 * rounding * float(exact.norm()):
        return "the sparse kernel's product is not the dense one's"
    module.weight = nn.Parameter(compressed, requires_grad=False)
    return None
