"""`torch.ops.perfkit.int8_auto`: an integer layer under torch.compile on CPU, by whom it is computed fastest.

It stands in the graph at first. When it is traced it becomes `torch.ops.perfkit.int8_layers`, a call of perfkit's
kernels, or the pattern of float operations that Inductor makes oneDNN's integer kernels of: where those are faster, and
where gradients or transformations need operations that torch knows.
"""

from __future__ import annotations

from math import prod

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
import torch.nn.functional as F
from torch import SymInt, Tensor
from torch.autograd import forward_ad

from perfkit.kernels._torch import autocasts
from perfkit.kernels.conv2d.torch_problem import hinted
from perfkit.kernels.conv2d_int8 import cpu_shape
from perfkit.kernels.linear_int8_static import cpu_shape as linear_shape
from perfkit.kernels.sequence.torch_op import Layer, problems, written

MOST_ROWS, MOST_CHAINED_ROWS = 128, 1024
"""Of a linear layer, up to which a call of the kernels takes less time than the compiler's pattern: by itself, and
where a layer that follows it, or that it follows, is in the same call.

Measured on a Zen 4, compiled models of two linear layers of 256 to 1536 outputs, a GELU, or a SiLU and norms, around
them: at 1 row half the time of the pattern, at 64 rows 0.7 to 0.95 of it, at 256 rows 0.96 to 1.1, at 1024 rows 1 to
1.15, since oneDNN computes a GELU or a sum within its product. One call with a ReLU in it: 0.97 of it at 512 rows, 1.01
at 1024 and 1.07 at 4096.
"""
_quantized = torch.ops.quantized_decomposed


def _auto(x, weight, scale, zero, bias, x_scale, x_zero, x_top, stride, padding, dilation, chained=False):
    grid = x_scale, x_zero, 0, x_top, torch.uint8
    q = _quantized.quantize_per_tensor.default(x.float(), *grid)
    conv = (tuple(stride), tuple(padding), tuple(dilation)) if stride else ()
    out = torch.get_autocast_dtype("cpu") if autocasts("cpu") else torch.float32
    layer = Layer((x_scale, x_zero, x_top), conv=conv, out=str(out).removeprefix("torch."))
    # x is rounded apart: a compiler does so within what makes it
    if out in (torch.float32, torch.bfloat16) and _takes(x, weight, bias, layer, chained):
        return torch.ops.perfkit.int8_layers(q, [weight, scale, bias], written([layer]))
    x = _quantized.dequantize_per_tensor.default(q, *grid)
    grids = scale, zero, 0, -128, 127, torch.int8
    if not conv:
        return F.linear(x, _quantized.dequantize_per_channel.default(weight, *grids), bias)
    if any(isinstance(size, SymInt) for size in x.shape):
        # For any size at once, Inductor (torch 2.13) takes wrong strides for integers: it is given floats.
        weight = weight.float() * scale[:, None, None, None]
    else:
        weight = _quantized.dequantize_per_channel.default(weight, *grids)
    top, bottom, left, right = padding
    padding = top, left
    if padding != (bottom, right):
        x, padding = F.pad(x, (left, right, top, bottom)), (0, 0)
    return F.conv2d(x, weight, bias, stride, padding, dilation)


def _takes(x: Tensor, weight: Tensor, bias: Tensor | None, layer: Layer, chained: bool) -> bool:
    """Whether a kernel is picked for such a call; of sizes that are symbols, for those that it is compiled with."""
    tensors = [x, weight] if bias is None else [x, weight, bias]
    if not all(each.is_cpu for each in tensors) or forward_ad._current_level >= 0:
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if torch.is_grad_enabled() and any(each.requires_grad for each in tensors):
        return False
    if not x.is_floating_point() or (bias is not None and bias.dtype != torch.float32):
        return False
    shape = [hinted(size) for size in x.shape]
    if (len(shape) != 4 if layer.conv else not shape) or not prod(shape):
        return False
    if shape[1 if layer.conv else -1] != weight.size(1):
        return False
    if not layer.conv and prod(shape[:-1]) > (MOST_CHAINED_ROWS if chained else MOST_ROWS):
        return False
    try:
        (problem,) = problems([layer], x, shape, [weight])
    except ValueError:  # nothing is left of such an image: torch says so
        return False
    return (cpu_shape if layer.conv else linear_shape).OP.choose(problem).implementation == "cpu"


_LIBRARY = torch.library.Library("perfkit", "FRAGMENT")
_LIBRARY.define(
    "int8_auto(Tensor x, Tensor weight, Tensor weight_scale, Tensor weight_zero, Tensor? bias, "
    "float scale, int zero, int top, int[] stride, int[] padding, int[] dilation, bool chained=False) -> Tensor"
)
_LIBRARY.impl("int8_auto", _auto, "CompositeImplicitAutograd")
