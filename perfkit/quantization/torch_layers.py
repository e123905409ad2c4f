"""Torch layers on integer weights. Each function changes one module in place, into a subclass of what it was.

Weights are int8 (or less), symmetric, one scale per output channel. The layer's `weight` is still there to read, in
float32, for code that does not call the layer but takes its weight.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from perfkit.backends.torch_surgery import FIXED_SHAPES, INTEGER, ROUNDS, WHOLE, derive
from perfkit.kernels import _native
from perfkit.kernels.max_pool_uint8.torch_op import max_pool_uint8
from perfkit.quantization import torch_native, torch_onednn
from perfkit.quantization.torch_ranges import Affine

_quantized = torch.ops.quantized_decomposed
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
EPSILON = torch.finfo(torch.float32).eps


def rounded_weight(weight: torch.Tensor, bits: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight as int8 values within ±(2^(bits - 1) - 1), and the scale of each row, (rows,) float32.

    A row of zeros gets the scale 1.
    """
    top = 2 ** (bits - 1) - 1
    rows = weight.detach().float().flatten(1)
    scale = rows.abs().amax(1) / top
    scale = torch.where(scale > 0, scale, 1.0)
    values = (rows / scale[:, None]).round().clamp(-top, top).to(torch.int8)
    return values.view(weight.shape), scale


def static(module: nn.Module, grid: Affine, bits: int = 8) -> None:
    """A linear or convolution whose input is rounded to `grid`, known beforehand."""
    _with_integer_weight(module, bits)
    module.input_grid = grid

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        # what torch.compiler.is_exporting() reads: to Dynamo in torch 2.11 that is true whatever traces
        if torch.compiler.is_compiling() and getattr(self, WHOLE) and not torch.compiler._is_exporting_flag:
            return torch_native.called(self, input, self.input_grid)
        y = torch_onednn.at_once(self, input)
        y = torch_onednn.product(self, input, self.input_grid) if y is None else y
        return _float_form(self, self.input_grid.rounded(input)) if y is None else y

    def get_extra_state(self) -> torch.Tensor:
        grid = self.input_grid
        return torch.tensor([grid.scale, grid.zero, grid.top], dtype=torch.float64)

    def set_extra_state(self, state: torch.Tensor) -> None:
        scale, zero, top = state.tolist()
        self.input_grid = Affine(scale, int(zero), int(top))

    members = _MARKED | {"get_extra_state": get_extra_state, "set_extra_state": set_extra_state}
    members[WHOLE] = torch_native.stays_whole(module, grid)
    if isinstance(module, CONVS) and not members[WHOLE]:
        members[FIXED_SHAPES] = True  # for any size at once, Inductor (torch 2.13) takes wrong strides for integers
    derive(module, forward=forward, **members)


def dynamic(module: nn.Linear, top: int, bits: int = 8) -> None:
    """A linear whose input is rounded to a grid of 0…top that each call reads from the input itself."""
    _with_integer_weight(module, bits)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if (y := torch_onednn.product(self, input, None, top)) is not None:
            return y
        x = input.float()
        if not x.numel():  # rows that nothing was routed to have no range
            return _float_form(self, x)
        grid = *_quantized.choose_qparams.tensor(x, 0, top, EPSILON, torch.uint8), 0, top, torch.uint8
        return _float_form(
            self, _quantized.dequantize_per_tensor.tensor(_quantized.quantize_per_tensor.tensor(x, *grid), *grid)
        )

    derive(module, forward=forward, **_MARKED)


def pool(module: nn.MaxPool2d, grid: Affine, flat: bool, whole: bool = False) -> None:
    """A max-pool on the grid of the layer after it. Rounding before the pool or after it gives the same numbers.

    Args:
        flat: the layer after it takes images as rows, NCHW.
        whole: compiled, that layer is a call of perfkit's kernels, which rounds.
    """
    size, base = 0 if _native.missing() else _square(module), type(module).forward

    def rounds(x: torch.Tensor) -> torch.Tensor:
        return x if torch_onednn.direct(x) else grid.rounded(x)  # the layer after it does so

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if (whole and torch.compiler.is_compiling()) or torch_onednn.direct(input):
            return base(self, input)
        if size and input.dim() == 4 and input.device.type == "cpu":
            return grid.floats(max_pool_uint8(grid.integers(input), size, flat))
        pooled = F.max_pool2d(
            grid.rounded(input), self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode
        )
        return grid.rounded(pooled)  # changes nothing but lets Inductor see a pool between integers

    derive(module, forward=forward, **{ROUNDS: staticmethod(rounds)})


def _square(module: nn.MaxPool2d) -> int:
    """The side of the squares that a max-pool takes; 0 where they overlap, pad, have gaps or are none."""
    pairs = [
        value if isinstance(value, tuple) else (value, value)
        for value in (module.kernel_size, module.stride, module.padding, module.dilation)
    ]
    size = pairs[0][0]
    return size if pairs == [(size, size), (size, size), (0, 0), (1, 1)] and not module.ceil_mode else 0


def weight_only(module: nn.Module, bits: int = 8) -> None:
    """A linear or convolution that multiplies in the input's precision, with int8 weights in memory."""
    _with_integer_weight(module, bits)

    def linear(self, input: torch.Tensor) -> torch.Tensor:
        # torch's AVX-512 kernel for bfloat16 reads 16 columns at a time, past the end of others: wrong, or a crash. So
        # does the one for ARM (torch 2.13) for any dtype, 8 at a time.
        beyond = input.shape[-1] % 16 and (input.dtype == torch.bfloat16 or not torch_onednn.X86)
        if input.device.type != "cpu" or beyond:
            return _float_form(self, input)
        rows = input.reshape(-1, self.in_features).contiguous()
        out = torch._weight_int8pack_mm(rows, self.weight_int8, self.weight_scale.to(input.dtype))
        out = out.view(*input.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias

    def conv(self, input: torch.Tensor) -> torch.Tensor:
        return _float_form(self, input)

    derive(module, forward=linear if isinstance(module, nn.Linear) else conv, **_MARKED)


def embedding(module: nn.Embedding, bits: int = 8) -> None:
    """An embedding of int8 rows, each with its scale: a lookup reads a quarter of the bytes."""
    _with_integer_weight(module, bits)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = F.embedding(input, self.weight_int8) * self.weight_scale[input].unsqueeze(-1)
        return rows.to(self.weight_dtype)

    derive(module, forward=forward, **_MARKED)


def _with_integer_weight(module: nn.Module, bits: int) -> None:
    values, scale = rounded_weight(module.weight, bits)
    module.weight_dtype = module.weight.dtype
    del module.weight
    zero = torch.zeros(len(scale), dtype=torch.int64, device=scale.device)
    # Parameters, not buffers: torch.compile freezes parameters only, and integer kernels need frozen weights.
    for name, tensor in (("weight_int8", values), ("weight_scale", scale), ("weight_zero", zero)):
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


def _dequantized(module: nn.Module) -> torch.Tensor:
    """The weight in float32. Inductor knows this operation: it does not fold it into a float32 constant."""
    grid = module.weight_scale, module.weight_zero, 0, -128, 127, torch.int8
    return _quantized.dequantize_per_channel.default(module.weight_int8, *grid)


_WEIGHT = property(_dequantized, doc="The weight in float32, made anew from the integers at each reading.")
_MARKED = {"weight": _WEIGHT, INTEGER: True}


def _float_form(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    weight = _dequantized(module).to(x.dtype)
    if isinstance(module, nn.Linear):
        return F.linear(x, weight, module.bias)
    return module._conv_forward(x, weight, module.bias)
