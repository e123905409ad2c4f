"""`torch.ops.perfkit.rnn_int8`: all layers and directions of a quantized recurrent module, for inference on CPU.

A custom operator: torch.compile and torch.export keep it whole. It has no gradient, and says so when asked for one.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable, Sequence
from itertools import accumulate
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from perfkit._errors import InvalidInputError
from perfkit.kernels import _native
from perfkit.kernels._torch import folded, observer, one_by_one, parallel
from perfkit.kernels.rnn_int8.problem import GATES, MODES, MOST_COLUMNS, SOURCE, packed_size


class Direction(NamedTuple):
    """The tensors of one direction of one layer, in the operator's order; see `reference.Layer` and `weights.pack`.

    Args:
        packed_ih, packed_hh: int8, `packed_size` of their channels and columns.
        scale_ih, scale_hh, bias: (G H,), float32.
        bias_hn: (H,), float32, of the GRU alone.
    """

    packed_ih: Tensor
    scale_ih: Tensor
    packed_hh: Tensor
    scale_hh: Tensor
    bias: Tensor
    bias_hn: Tensor | None = None


def fields(mode: str) -> tuple[str, ...]:
    """Those fields of a `Direction` that a cell has."""
    return Direction._fields if mode == "GRU" else Direction._fields[:-1]


_CALL = "15q2f5q"
"""`PerfkitRnnInt8` of cpu_problem.hpp."""
Call = Callable[[Tensor, "Tensor | None", "Tensor | None", Sequence[Tensor], Tensor], "tuple[Tensor, Tensor, Tensor]"]
_form = attrgetter("shape", "dtype", "device", "layout")
_MOST_KNOWN = 4096
_direct: dict[Any, Call] = {}
"""By kind of call, of padded input: the kernel's call that is made at once."""


@functools.cache
def library() -> ctypes.CDLL:
    """The kernel, built at the first use.

    Raises:
        UnsupportedError: there is no C++ compiler, or it fails.
    """
    found = _native.load(SOURCE)
    found.perfkit_rnn_int8_in_line.argtypes = (ctypes.c_char_p,)
    found.perfkit_rnn_int8_instructions.restype = ctypes.c_char_p
    return found


def instructions() -> str:
    """What the integer products run on here: "AVX512-VNNI", "AVX-VNNI", "AVX2", "NEON-DOTPROD" or "plain C++"."""
    return library().perfkit_rnn_int8_instructions().decode()


def run(
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    mode: str,
    hidden: int,
    bidirectional: bool,
    batch_first: bool,
    input_scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.ops.perfkit.rnn_int8`; without the operator, which takes longer than a short sequence, where nobody looks
    on at a call whose like was checked before.
    """
    kind = None
    if batch_sizes is None:
        tensors = [x, *(state for state in (h0, c0) if state is not None), *weights]
        if observer(tensors) is None and not (torch.is_grad_enabled() and any(each.requires_grad for each in tensors)):
            of_call = x.stride(), h0 is None, mode, hidden, bidirectional, batch_first
            kind = tuple(map(_form, tensors)), of_call
            at_once = _direct.get(kind)
            if at_once is not None and all(map(Tensor.is_contiguous, weights)):
                return at_once(x, h0, c0, weights, input_scale)
    options = mode, hidden, bidirectional, batch_first
    found = torch.ops.perfkit.rnn_int8(x, batch_sizes, h0, c0, weights, *options, input_scale)
    if kind is not None and kind not in _direct and x.stride(-1) == 1 and x.numel():
        if len(_direct) >= _MOST_KNOWN:
            _direct.clear()
        _direct[kind] = _caller(x, None, found[1].size(1), weights, *options)
    return found


@torch.library.custom_op("perfkit::rnn_int8", mutates_args=(), device_types="cpu")
def rnn_int8(
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    mode: str,
    hidden: int,
    bidirectional: bool,
    batch_first: bool,
    input_scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a quantized recurrent module, with torch.get_num_threads() threads.

    Args:
        x: float32; (T, B, I), or (B, T, I) if `batch_first`, or the (P, I) data of a PackedSequence.
        batch_sizes: (T,), int64, those of the PackedSequence; None for padded input.
        h0, c0: (layers * directions, B, H), float32; None for zeros, `h0` not with batch_sizes; `c0` for LSTM only.
        weights: the `fields(mode)` of each direction of each layer.
        mode: "LSTM", "GRU", "RNN_TANH" or "RNN_RELU".
        hidden: H.
        input_scale: (), float32, the static scale of the first layer's input; 0 for one scale per row and step.

    Returns:
        Outputs: x's shape with H * directions features; final h and c: (layers * directions, B, H), c empty but for
        LSTM. All float32.

    Raises:
        InvalidInputError: tensors of another dtype or size than these.
        UnsupportedError: there is no C++ compiler to build the kernel.
    """
    if mode not in GATES:
        raise InvalidInputError(f"mode is {mode!r}: expected one of {', '.join(MODES)}")
    directions = 2 if bidirectional else 1
    count = len(fields(mode))
    if not weights or len(weights) % (count * directions):
        raise InvalidInputError(
            f"there are {len(weights)} weights: expected {count} for each of {directions} directions of each layer"
        )
    layers = [Direction(*weights[i : i + count]) for i in range(0, len(weights), count)]
    _check(x, batch_sizes, h0, c0, layers, mode, hidden, directions, batch_first)
    if not x.numel():
        out, h, c = _empty(x, batch_sizes, h0, weights, mode, hidden, bidirectional, batch_first)
        return out, h.zero_() if h0 is None else h.copy_(h0), c
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch = h0.size(1) if batch_sizes is not None else x.size(0 if batch_first else 1)
    call = _caller(x, batch_sizes, batch, weights, mode, hidden, bidirectional, batch_first)
    return call(x, h0, c0, weights, input_scale)


def _caller(x, batch_sizes, batch, weights, mode, hidden, bidirectional, batch_first) -> Call:
    """The call for such an x, features one after the other, and such weights, both checked: all but the addresses."""
    sizes, starts = _steps(x, batch_sizes, batch_first)
    directions, each = 2 if bidirectional else 1, len(fields(mode))
    number, of_out = len(weights) // each, (*x.shape[:-1], hidden * directions)
    of_h = number, batch, hidden
    of_c = of_h if mode == "LSTM" else (0,)
    about = MODES.index(mode), len(sizes), batch, x.size(-1), hidden, number // directions, directions
    about = *about, ctypes.addressof(sizes), ctypes.addressof(starts)
    of_x, past_out = _strides(x, batch_first), _strides(torch.empty(of_out, device="meta"), batch_first)
    kernel, address = library().perfkit_rnn_int8_in_line, Tensor.data_ptr
    fill, threads, lent = struct.Struct(f"{_CALL}{6 * number}q").pack, torch.get_num_threads, parallel()

    def call(x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor], input_scale: Tensor):
        out = x.new_empty(of_out)
        h = x.new_zeros(of_h) if h0 is None else x.new_empty(of_h).copy_(h0)
        c = x.new_zeros(of_c) if c0 is None or mode != "LSTM" else x.new_empty(of_c).copy_(c0)
        places = [*map(address, weights)]
        if each == 5:  # the sixth is of the GRU alone
            places = [place for at in range(0, len(places), 5) for place in (*places[at : at + 5], 0)]
        given = address(x), *of_x, address(out), *past_out, input_scale.item(), 0.0
        if kernel(fill(*about, *given, 0, address(h), address(c), threads(), lent, *places)):
            raise MemoryError(f"the int8 {mode} kernel found no memory for its working space")
        return out, h, c

    call.steps = sizes, starts
    return call


@rnn_int8.register_fake
def _(x, batch_sizes, h0, _c0, weights, mode, hidden, bidirectional, batch_first, _input_scale):
    return _empty(x, batch_sizes, h0, weights, mode, hidden, bidirectional, batch_first)


@rnn_int8.register_vmap
def _(info, in_dims, x, batch_sizes, h0, c0, weights, mode, hidden, bidirectional, batch_first, input_scale):
    """Rows of all calls become one batch, where the weights are the same for all and nothing is packed."""
    x_dim, _, h_dim, c_dim, weight_dims, *_, scale_dim = in_dims
    options = mode, hidden, bidirectional, batch_first, input_scale
    if batch_sizes is not None or any(dim is not None for dim in (*weight_dims, scale_dim)):
        return one_by_one(rnn_int8, info, in_dims, x, batch_sizes, h0, c0, weights, *options)
    calls, at = info.batch_size, 0 if batch_first else 1
    states = folded(calls, h0, h_dim, 1), folded(calls, c0, c_dim, 1)
    y, hn, cn = rnn_int8(folded(calls, x, x_dim, at), None, *states, weights, *options)
    y, hn = y.unflatten(at, (calls, -1)), hn.unflatten(1, (calls, -1))
    return (y, hn, cn.unflatten(1, (calls, -1)) if mode == "LSTM" else cn), (at, 1, 1 if mode == "LSTM" else None)


def _empty(x, batch_sizes, h0, weights, mode, hidden, bidirectional, batch_first) -> tuple[Tensor, Tensor, Tensor]:
    batch = h0.size(1) if batch_sizes is not None else x.size(0 if batch_first else 1)
    states = (len(weights) // len(fields(mode)), batch, hidden)
    out = x.new_empty((*x.shape[:-1], hidden * (2 if bidirectional else 1)))
    return out, x.new_empty(states), x.new_empty(states if mode == "LSTM" else (0,))


def _steps(x: Tensor, batch_sizes: Tensor | None, batch_first: bool) -> tuple[ctypes.Array, ctypes.Array]:
    """How many rows each step has, and where its first one lies, counted in rows."""
    if batch_sizes is None:
        batch, steps = (x.size(0), x.size(1)) if batch_first else (x.size(1), x.size(0))
        kind = ctypes.c_int64 * steps
        return kind(*[batch] * steps), kind()
    sizes = batch_sizes.tolist()
    kind = ctypes.c_int64 * len(sizes)
    return kind(*sizes), kind(*accumulate(sizes[:-1], initial=0))


def _strides(x: Tensor, batch_first: bool) -> tuple[int, int]:
    """From step to step and from row to row, in elements."""
    if x.dim() == 2:
        return 0, x.stride(0)
    return (x.stride(1), x.stride(0)) if batch_first else (x.stride(0), x.stride(1))


def _check(x, batch_sizes, h0, c0, layers: list[Direction], mode, hidden, directions, batch_first) -> None:
    """What the kernel relies on: a pointer to anything else would be read out of bounds."""
    if x.dim() != (3 if batch_sizes is None else 2):
        raise InvalidInputError(f"x has shape {list(x.shape)}: expected (T, B, I), or (P, I) with batch_sizes")
    batch_dim = None if batch_sizes is not None else 0 if batch_first else 1
    if any(size == 0 for dim, size in enumerate(x.shape) if dim != batch_dim):
        raise InvalidInputError(f"x has shape {list(x.shape)}: only its batch may be empty")
    batch = x.size(0 if batch_first else 1)
    if batch_sizes is not None:
        batch, steps = int(batch_sizes[0]), batch_sizes.diff()
        if batch_sizes.dtype != torch.int64 or bool((steps > 0).any()) or batch_sizes[-1] < 1 or h0 is None:
            raise InvalidInputError("batch_sizes must be int64, positive and never rising, and come with h0")
        if int(batch_sizes.sum()) != x.size(0):
            raise InvalidInputError(f"batch_sizes sum to {int(batch_sizes.sum())}, and x has {x.size(0)} rows")
    channels = GATES[mode] * hidden
    for i, direction in enumerate(layers):
        inputs = x.size(-1) if i < directions else hidden * directions
        expected = (
            (torch.int8, packed_size(channels, inputs)),
            (torch.float32, channels),
            (torch.int8, packed_size(channels, hidden)),
            (torch.float32, channels),
            (torch.float32, channels),
            (torch.float32, hidden),
        )
        for name, (dtype, size) in zip(fields(mode), expected, strict=False):
            tensor = getattr(direction, name)
            if tensor.dtype != dtype or tensor.shape != (size,) or not tensor.is_contiguous():
                raise InvalidInputError(
                    f"{name} of direction {i} is {tensor.dtype} {list(tensor.shape)}: "
                    f"expected contiguous {dtype} [{size}]"
                )
        if max(inputs, hidden) > MOST_COLUMNS:
            raise InvalidInputError(f"{max(inputs, hidden)} columns could overflow int32: at most {MOST_COLUMNS}")
    for name, tensor in (("x", x), ("h0", h0), ("c0", c0)):
        if tensor is not None and (tensor.dtype != torch.float32 or tensor.device.type != "cpu"):
            raise InvalidInputError(f"{name} is {tensor.dtype} on {tensor.device}: expected torch.float32 on cpu")
    for name, state in (("h0", h0), ("c0", c0)):
        expected = (len(layers), batch, hidden)
        if state is not None and state.shape != expected and (name == "h0" or mode == "LSTM"):
            raise InvalidInputError(f"{name} has shape {list(state.shape)}: expected {list(expected)}")
