"""`torch.ops.perfkit.int8_layers`: layers on integers that follow each other, as compilers keep them: whole.

For inference on CPU; there is no gradient. What a layer is beside its tensors stands in the operator's text (`written`,
`read`), since programs hold what operators are told by value. Weights are packed at the first call, and again once they
were written to.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from perfkit._errors import InvalidInputError
from perfkit.kernels import _int8_torch
from perfkit.kernels._int8 import Grid
from perfkit.kernels.conv2d.problem import Options
from perfkit.kernels.conv2d_int8 import cpu_kernel as convolution
from perfkit.kernels.conv2d_int8 import reference as convolution_reference
from perfkit.kernels.conv2d_int8.torch_op import problem as convolution_problem
from perfkit.kernels.linear_int8_static import cpu_kernel as linear_kernel
from perfkit.kernels.linear_int8_static import reference as linear_reference
from perfkit.kernels.linear_int8_static.problem import Problem as IntegerLinear
from perfkit.kernels.sequence.cpu_kernel import Integer, caller, joined

TENSORS = 3
"""Of each layer: its integer weight, the weight's scales, its bias or None."""
_MOST = 64  # kinds of calls of a layer
Fields = tuple[float, int, int]
"""A grid: scale, zero and top."""


class Layer(NamedTuple):
    """One layer, without its tensors.

    Args:
        grid: of its input: floats, or, of the first layer, bytes on it.
        activation: None or "relu".
        rows: a linear layer's input is images, each of which becomes one row.
        conv: stride, padding (top, bottom, left, right) and dilation of a convolution; empty for a linear layer.
        pool: as `perfkit.kernels.conv2d` has it, behind a convolution.
        out: of the last layer: "float32", "bfloat16", or a grid, to have bytes.
        last: of the last layer, a convolution: whether its result lies as channels_last; None to lie as x does.
    """

    grid: Fields
    activation: str | None = None
    rows: bool = False
    conv: tuple[tuple[int, int], tuple[int, int, int, int], tuple[int, int]] | tuple[()] = ()
    pool: int = 1
    out: str | Fields = "float32"
    last: bool | None = None

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.out) if isinstance(self.out, str) else torch.uint8


def written(layers: Iterable[Layer]) -> str:
    """The layers as the operator's text."""
    return repr([tuple(tuple(each) if isinstance(each, tuple) else each for each in layer) for layer in layers])


@functools.lru_cache(maxsize=4096)
def read(text: str) -> tuple[Layer, ...]:
    """What `written` made a text of."""
    return tuple(Layer(*fields) for fields in ast.literal_eval(text))


def channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def problems(layers: Sequence[Layer], x: Tensor, shape: Sequence[int], weights: Sequence[Tensor]) -> list[Integer]:
    """What the layers compute of tensors like x of such a shape; each from floats to floats, but for the two ends.

    Raises:
        ValueError: nothing is left of such an image.
    """
    found: list[Integer] = []
    last, kind = channels_last(x), torch.uint8 if x.dtype == torch.uint8 else torch.float32
    for layer, weight in zip(layers, weights, strict=True):
        grid = Grid.of(Grid(*layer.grid))
        out: dict[str, Any] = {"y": str(layer.dtype).removeprefix("torch.")}
        if layer.dtype == torch.uint8:
            out["y_grid"] = Grid(*layer.out)
        if layer.conv:
            layout = torch.channels_last if last else torch.contiguous_format
            image = torch.empty(tuple(shape), dtype=kind, device="meta", memory_format=layout)
            given = Options(*layer.conv, 1, layer.activation, layer.pool)
            made = convolution_problem(image, weight, given, grid, torch.float32)
            made = replace(made, y_last=made.y_last if layer.last is None else layer.last, **out)
            shape = made.sizes.batch, made.sizes.outputs, *made.sizes.out_size
        else:
            leading = shape[:1] if layer.rows else shape[:-1]
            if prod(shape[len(leading) :]) != weight.size(1):
                raise InvalidInputError(
                    f"x is {list(shape)} and weight {list(weight.shape)}: expected (..., K), (N, K)"
                )
            sizes = prod(leading), weight.size(1), weight.size(0)
            made = IntegerLinear(*sizes, grid, layer.activation, str(kind).removeprefix("torch."), **out)
            shape = *leading, weight.size(0)
        found.append(made)
        kind = torch.float32
    return found


_kept = WeakTensorKeyDictionary()
"""By the first layer's weight: for each kind of call what its tensors were, the call, and what it reads."""


def _int8_layers(x: Tensor, tensors: Sequence[Tensor | None], text: str) -> Tensor:
    given = [each for each in tensors if each is not None]
    if not x.numel():
        return _int8_layers_fake(x, tensors, text)
    if any(map(Tensor.is_inference, given)):  # no count of writes: nothing to remember
        call, _held = _made(x, tensors, text)
    else:
        state = [(each.data_ptr(), each._version) for each in given]
        kinds = _kept.get(given[0])
        if kinds is None:
            kinds = _kept[given[0]] = {}
        kind = text, x.shape, x.stride(), x.dtype, len(given)
        found = kinds.get(kind)
        if found is None or found[0] != state:
            if len(kinds) >= _MOST:
                kinds.clear()
            found = kinds[kind] = state, *_made(x, tensors, text)
        call = found[1]
    return _by_reference(x, tensors, text) if call is None else call(x)


def _made(x: Tensor, tensors: Sequence[Tensor | None], text: str) -> tuple[Callable[[Tensor], Tensor] | None, Any]:
    """The call for tensors such as these, None where a weight cannot be packed; and what has to live as long.

    That is all but the first weight, with whose end all of it is forgotten.
    """
    own = [list(each) for each in zip(*[iter(tensors)] * TENSORS, strict=True)]
    for layer, (weight, scale, bias) in zip(read(text), own, strict=True):
        _int8_torch.check(x, weight, scale, bias, 4 if layer.conv else 2)
    made = problems(read(text), x, x.shape, [weight for weight, *_ in own])
    if any(_packed(problem, *of[:2]) is None for problem, of in zip(made, own, strict=True)):
        return None, None
    for of in own:
        of[2] = None if of[2] is None else of[2].contiguous()
    layout = torch.channels_last if channels_last(x) else torch.contiguous_format
    size = tuple(_int8_layers_fake(x, tensors, text).shape)
    run = caller(list(zip(joined(made), own, strict=True)), x.contiguous(memory_format=layout), size)
    return lambda x: run(x.contiguous(memory_format=layout)), [each for of in own for each in of][1:]


def _packed(problem: Integer, weight: Tensor, scale: Tensor) -> Tensor | None:
    if isinstance(problem, IntegerLinear):
        return linear_kernel.packed(weight, scale)
    return convolution.packed(problem, weight, scale)


def _by_reference(x: Tensor, tensors: Sequence[Any], text: str) -> Tensor:
    """The same in plain operations, for scales that do not keep the order of numbers."""
    own, like = list(zip(*[iter(tensors)] * TENSORS, strict=True)), _int8_layers_fake(x, tensors, text)
    made = problems(read(text), x, x.shape, [weight for weight, *_ in own])
    for layer, problem, (weight, scale, bias) in zip(read(text), made, own, strict=True):
        if layer.conv:
            x = convolution_reference.conv2d_int8(problem, x, weight, scale, bias)
            continue
        x = linear_reference.linear_int8_static(
            x.flatten(1) if layer.rows else x, weight, scale, bias,
            grid=problem.grid, activation=layer.activation, out_grid=problem.y_grid, out_dtype=layer.dtype,
        )  # fmt: skip
    return like.copy_(x)


def _int8_layers_fake(x: Tensor, tensors: Sequence[Tensor | None], text: str) -> Tensor:
    layers, shape = read(text), tuple(x.shape)
    for layer, weight in zip(layers, tensors[::TENSORS], strict=True):
        if layer.conv:
            size = (_length(layer, dim, shape[2 + dim], weight.size(2 + dim)) for dim in range(2))
            shape = shape[0], weight.size(0), *size
        else:
            shape = *(shape[:1] if layer.rows else shape[:-1]), weight.size(0)
    end = layers[-1]
    last = end.conv and (channels_last(x) if end.last is None else end.last)
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=end.dtype, device=x.device, memory_format=layout)


def _length(layer: Layer, dim: int, length: Any, kernel: int) -> Any:
    """What a convolution and its pool leave of a length, which may be a symbol."""
    stride, padding, dilation = layer.conv
    padded = length + padding[2 * dim] + padding[2 * dim + 1]
    return ((padded - (kernel - 1) * dilation[dim] - 1) // stride[dim] + 1) // layer.pool


_LIBRARY = torch.library.Library("perfkit", "FRAGMENT")
_LIBRARY.define(
    "int8_layers(Tensor x, Tensor?[] tensors, str layers) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
_LIBRARY.impl("int8_layers", _int8_layers, "CPU")
torch.library.register_fake("perfkit::int8_layers", _int8_layers_fake, lib=_LIBRARY)
