"""Integer layers on x86 CPUs without a compiler: oneDNN's kernels, which Inductor's programs call, called directly; or
perfkit's own (`torch_native.py`), where these are no slower.

Where something looks on at a call (a compiler, a tracer, torch.func, a tensor's class) there is no such product: the
layer is then its pattern of float operations, which those know.
"""

from __future__ import annotations

import functools
import math
import platform
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from perfkit.backends import torch_fused_int8 as integers
from perfkit.backends import torch_fused_sequence as sequences
from perfkit.kernels._torch import autocasts, observer
from perfkit.measure.environment import has
from perfkit.quantization import torch_native
from perfkit.quantization.torch_ranges import Affine

VNNI = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp")
FULL, REDUCED = 255, 127
X86 = platform.machine() in ("x86_64", "AMD64")

_packed = WeakTensorKeyDictionary()
"""By integer weight: what it was packed from (versions, and of a convolution what of the call matters), and that."""


def top() -> int:
    """The largest q of an activation: without VNNI pairs of larger ones, times weights, overflow 16 bits."""
    return FULL if any(map(has, VNNI)) else REDUCED


@functools.cache
def missing() -> str:
    """Why there are no such kernels here; empty where there are. They are tried once on the largest sums."""
    if not X86:
        return f"oneDNN's integer kernels are for x86 CPUs, and this is {platform.machine()}"
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    for sign in (1, -1):
        layer = nn.Linear(512, 3, bias=False)
        layer.weight_int8 = nn.Parameter(torch.full((3, 512), 127 * sign, dtype=torch.int8), requires_grad=False)
        layer.weight_scale = nn.Parameter(torch.ones(3), requires_grad=False)
        layer.weight_zero = nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)
        try:
            y = _linear(
                layer, None, torch.full((2, 512), top(), dtype=torch.uint8), Affine(1.0, 0, top()), torch.float32
            )
        except (AttributeError, RuntimeError) as error:
            return f"oneDNN's integer kernels cannot be called: {type(error).__name__}: {error}"
        if not bool((y == 127 * sign * top() * 512).all()):
            return "oneDNN's integer sums overflow on this CPU"
    return ""


def takes(module: nn.Module) -> bool:
    """Whether such a layer's products run here: of linear layers and convolutions over images, padded with zeros."""
    if missing():
        return False
    if isinstance(module, nn.Conv2d):
        return module.padding_mode == "zeros" and _padding(module) is not None
    return isinstance(module, nn.Linear)


def _padding(conv: nn.Conv2d) -> list[int] | None:
    """Rows and columns of zeros at either side; None where "same" puts more of them behind."""
    if not isinstance(conv.padding, str):
        return list(conv.padding)
    left, right, top, bottom = conv._reversed_padding_repeated_twice
    return [top, left] if (top, left) == (bottom, right) else None


def direct(*tensors: torch.Tensor) -> bool:
    """Whether a call with these tensors is one of a layer by itself, on CPU, that nothing looks on at."""
    if torch.compiler.is_compiling():  # before all that Dynamo would look into
        return False
    seen = observer(tensors)
    if seen == "traced" and not torch._C._len_torch_dispatch_stack() and torch._C._get_tracing_state() is None:
        seen = None  # by a profiler, which knows these operators
    return not seen and all(tensor.device.type == "cpu" for tensor in tensors) and not missing()


def at_once(module: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """What a layer makes of `x` by a call that was worked out before, where all is as it was then; else None."""
    if torch.compiler.is_compiling() or missing() or not isinstance(module, (nn.Linear, nn.Conv2d)):
        return None
    return sequences.run((module,), x, integers.alone)


def product(module: nn.Module, x: torch.Tensor, grid: Affine | None, top: int = 0) -> torch.Tensor | None:
    """What a linear layer or a 2-D convolution makes of `x` on integers; None where it has to be in floats.

    Args:
        grid: of x; None to read it from x, with values of 0…top.
    """
    if torch.compiler.is_compiling() or not takes(module):
        return None
    bias = module.bias
    held = (module.weight_int8,) if bias is None else (module.weight_int8, bias)
    if not direct(x, *held) or not x.numel() or not x.is_floating_point():
        return None
    out = torch.get_autocast_dtype("cpu") if autocasts("cpu") else torch.float32
    if out not in (torch.float32, torch.bfloat16) or (bias is not None and bias.dtype != torch.float32):
        return None
    kernel, dimensions = (_linear, x.dim() > 1) if isinstance(module, nn.Linear) else (_conv, x.dim() == 4)
    if not dimensions:
        return None

    def run(bias: torch.Tensor | None) -> torch.Tensor | None:
        if (y := torch_native.product(module, bias, x, top if grid is None else grid, out)) is not None:
            return y
        known = _read(x, top) if grid is None else grid
        return None if known is None else kernel(module, bias, _rounded(x, known), known, out)

    if bias is None or not (bias.requires_grad and torch.is_grad_enabled()):
        return run(bias)
    with torch.no_grad():  # as in the pattern, the bias alone has a gradient
        y = run(None)
    return None if y is None else y + (bias if kernel is _linear else bias[:, None, None]).to(out)


def _read(x: torch.Tensor, top: int) -> Affine | None:
    """The grid that torch's `choose_qparams` chooses, without its dozen operations; None without a finite one."""
    low, high = (np.float32(float(value)) for value in torch.aminmax(x))
    if not (math.isfinite(low) and math.isfinite(high)):
        return None
    low, high = min(low, np.float32(0)), max(high, np.float32(0))
    with np.errstate(over="ignore"):
        span = high - low
    if not math.isfinite(span):
        return None
    scale = max(span / np.float32(top), np.finfo(np.float32).eps)
    return Affine(float(scale), int(np.clip(-np.rint(low / scale), 0, top)), top)


def _rounded(x: torch.Tensor, grid: Affine) -> torch.Tensor:
    """The q of `x`, in the order of `quantize_per_tensor` and in place from the second operation on."""
    return x.float().mul(1.0 / grid.scale).round_().add_(grid.zero).clamp_(0, grid.top).to(torch.uint8)


def _linear(module: Any, bias: torch.Tensor | None, q: torch.Tensor, grid: Affine, out: torch.dtype) -> torch.Tensor:
    columns = q.shape[-1]
    # a dimension of size 1 may have any stride, and oneDNN takes it at its word
    rows = q.reshape(-1, columns).contiguous().as_strided((q.numel() // columns, columns), (columns, 1))
    weight = _as_packed(module, None, lambda: torch.ops.onednn.qlinear_prepack(module.weight_int8, list(rows.shape)))
    y = torch.ops.onednn.qlinear_pointwise(
        rows, grid.scale, grid.zero, weight, module.weight_scale, module.weight_zero, bias,
        1.0, 0, out, "none", [], "",
    )  # fmt: skip
    return y.view(*q.shape[:-1], -1)


def _conv(module: Any, bias: torch.Tensor | None, q: torch.Tensor, grid: Affine, out: torch.dtype) -> torch.Tensor:
    place = list(module.stride), _padding(module), list(module.dilation), module.groups
    weight = _as_packed(
        module,
        grid,
        lambda: torch.ops.onednn.qconv_prepack(
            module.weight_int8, module.weight_scale, grid.scale, grid.zero, *place, list(q.shape)
        ),
    )
    y = torch.ops.onednn.qconv_pointwise(
        q, grid.scale, grid.zero, weight, module.weight_scale, module.weight_zero, bias, *place,
        1.0, 0, out, "none", [], "",
    )  # fmt: skip
    return y.contiguous() if q.is_contiguous() else y  # as float layers: what follows may call view


def _as_packed(module: Any, call: Any, pack) -> torch.Tensor:
    """The weight as the kernels read it, packed anew where it was changed."""
    key = module.weight_int8._version, module.weight_scale._version, call
    found = _packed.get(module.weight_int8)
    if found is None or found[0] != key:
        found = _packed[module.weight_int8] = key, pack()
    return found[1]
