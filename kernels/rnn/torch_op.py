"""`torch.ops.perfkit.rnn` and its gradient: a stack of recurrent layers as one operator, with everything registered.

torch.compile and torch.export keep it whole; autocast casts its tensors; vmap folds what it can into the batch;
autograd and torch.func run `torch.ops.perfkit.rnn_backward`. `torch_call.run` comes here wherever something more than
plain autograd looks on. The arguments:

    x               (T, B, I), or (B, T, I) if batch_first, or the (P, I) data of a PackedSequence
    rows            None; or lengths (B,) of padded rows; or batch_sizes (T,) of packed ones; int64, on the CPU
    h0, c0          (layers * directions, B, H); c0 None but for LSTM
    weights         w_ih, w_hh, b_ih, b_hh of each layer and direction; without the biases unless `bias`
    mode            "LSTM", "GRU", "RNN_TANH" or "RNN_RELU"
    save            keep what the backward pass needs; else it runs the forward pass again
    implementation  who computes; "" to have it picked

It returns y, hn, cn (empty but for LSTM), in x's dtype, and three tensors: `torch_stack.Saved` if `save`, else empty.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from perfkit._errors import UnsupportedError
from perfkit.kernels import rnn as op
from perfkit.kernels._torch import cast, folded, one_by_one
from perfkit.kernels.rnn import torch_stack
from perfkit.kernels.rnn.torch_problem import check_rows, problem_of
from perfkit.kernels.rnn.torch_stack import Saved, grouped

ONLY_BACKWARD = (
    "perfkit's recurrent kernels have a first derivative in backward mode, and no other: pass "
    "implementation='reference', whose plain operations torch differentiates in every way"
)

_INPUTS = "Tensor x, Tensor? rows, Tensor h0, Tensor? c0, Tensor[] weights"
_SAVED = "Tensor? y, Tensor? gates, Tensor? cells, Tensor? inner"
_OPTIONS = "str mode, bool bias, bool bidirectional, bool batch_first"
_RNN = f"({_INPUTS}, {_OPTIONS}, bool save, str implementation) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
_BACKWARD = f"({_INPUTS}, {_SAVED}, Tensor d_y, Tensor d_hn, Tensor? d_cn, {_OPTIONS}, str implementation) -> Tensor[]"
_LIBRARY = torch.library.Library("perfkit", "FRAGMENT")
_LIBRARY.define(f"rnn{_RNN}", tags=torch.Tag.pt2_compliant_tag)
_LIBRARY.define(f"rnn_backward{_BACKWARD}", tags=torch.Tag.pt2_compliant_tag)


@torch.library.impl(_LIBRARY, "rnn", "CompositeExplicitAutograd")
def _rnn(x, rows, h0, c0, weights, mode, bias, bidirectional, batch_first, save, implementation):
    problem = problem_of(x, rows, h0, c0, weights, mode, bias, bidirectional, batch_first, save)
    check_rows(problem, rows, x.size(0))
    # Where states are saved it is the first that can, whatever was measured: the backward pass must find it again.
    asked = implementation or (torch_stack.first_able(problem) if save else None)
    choice = op.OP.choose(problem, asked)
    saved = torch_stack.empty_saved(problem, x) if save else None
    if save and (problem.ragged == "lengths" or asked not in torch_stack.KERNELS or mode.startswith("RNN")):
        saved = Saved(*(kept.zero_() for kept in saved))  # what nobody fills: an operator's results are told apart
    found = torch_stack.forward(problem, choice, x, rows, h0, c0, grouped(weights, bias), batch_first, saved)
    outputs = [x.new_empty(0) if state is None else state.to(x.dtype).contiguous() for state in found]
    return *outputs, *(saved or _nothing(x))


@torch.library.register_fake("perfkit::rnn", lib=_LIBRARY)
def _rnn_fake(x, rows, h0, c0, weights, mode, bias, bidirectional, batch_first, save, _implementation):
    problem = problem_of(x, rows, h0, c0, weights, mode, bias, bidirectional, batch_first, save)
    y = x.new_empty((*x.shape[:-1], problem.hidden * problem.directions))
    cn = x.new_empty(h0.shape if mode == "LSTM" else (0,))
    return y, x.new_empty(h0.shape), cn, *(torch_stack.empty_saved(problem, x) if save else _nothing(x))


def _nothing(x: Tensor) -> Saved:
    return Saved(*(x.new_empty(0) for _ in Saved._fields))


@torch.library.impl(_LIBRARY, "rnn_backward", "CompositeExplicitAutograd")
def _rnn_backward(
    x, rows, h0, c0, weights, y, gates, cells, inner, d_y, d_hn, d_cn, mode, bias, bidirectional, batch_first, asked
):
    problem = problem_of(x, rows, h0, c0, weights, mode, bias, bidirectional, batch_first, True)
    choice = op.OP.choose(problem, asked or torch_stack.first_able(problem), recorded=False)
    saved = None if y is None else Saved(*(kept.contiguous() for kept in (gates, cells, inner)))
    weights = grouped(weights, bias)
    found = torch_stack.backward(problem, choice, x, rows, h0, c0, weights, batch_first, y, saved, d_y, d_hn, d_cn)
    return _apart(found)


def _apart(tensors: list[Tensor]) -> list[Tensor]:
    """Contiguous, each in memory of its own, as those who plan an operator's memory take for granted."""
    seen, found = set(), []
    for tensor in tensors:
        where = tensor.untyped_storage().data_ptr()
        found.append(tensor.clone(memory_format=torch.contiguous_format) if where in seen else tensor.contiguous())
        seen.add(where)
    return found


@torch.library.register_fake("perfkit::rnn_backward", lib=_LIBRARY)
def _rnn_backward_fake(x, _rows, h0, c0, weights, *_rest):
    return [like.new_empty(like.shape) for like in (x, h0, c0, *weights) if like is not None]


# ---- Autograd --------------------------------------------------------------------------------------------------------
#
# Functions of the form that torch.func can transform, which torch.library.register_autograd's are not. The options come
# first, as weights are of any number.


class Rnn(torch.autograd.Function):
    """`torch.ops.perfkit.rnn` as a step of autograd and of torch.func's transformations."""

    @staticmethod
    def forward(mode, bias, bidirectional, batch_first, save, implementation, x, rows, h0, c0, *weights):
        options = mode, bias, bidirectional, batch_first, save, implementation
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.perfkit.rnn(x, rows, h0, c0, weights, *options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *options, save, implementation, x, rows, h0, c0 = inputs[:10]
        y, hn, _, *saved = output
        ctx.options = *options, implementation
        ctx.shapes = y.shape, hn.shape
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)  # those of what is saved would be large
        ctx.save_for_backward(x, rows, h0, c0, *([y, *saved] if save else [None] * 4), *inputs[10:])

    @staticmethod
    def backward(ctx, d_y, d_hn, d_cn, *_of_saved):
        x, rows, h0, c0, *rest = ctx.saved_tensors
        of_y, of_state = ctx.shapes
        d_y = x.new_zeros(of_y) if d_y is None else d_y
        d_hn, d_cn = (x.new_zeros(of_state) if given is None else given for given in (d_hn, d_cn))
        d_cn = None if c0 is None else d_cn
        found = RnnBackward.apply(*ctx.options, x, rows, h0, c0, *rest[:4], d_y, d_hn, d_cn, *rest[4:])
        d_x, d_h0, *rest = found
        d_c0, *of_weights = rest if c0 is not None else (None, *rest)
        return *[None] * 6, d_x, None, d_h0, d_c0, *of_weights

    @staticmethod
    def jvp(_ctx, *_tangents):
        raise UnsupportedError(ONLY_BACKWARD)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        in_dims = *in_dims[6:10], in_dims[10:], *in_dims[:6]
        return _rnn_vmap(_rnn_step, info, in_dims, *inputs[6:10], inputs[10:], *inputs[:6])


class RnnBackward(torch.autograd.Function):
    """`torch.ops.perfkit.rnn_backward`, which has no derivative."""

    @staticmethod
    def forward(mode, bias, bidirectional, batch_first, implementation, x, rows, h0, c0, *rest):
        saved_and_given, weights = rest[:7], rest[7:]
        options = mode, bias, bidirectional, batch_first, implementation
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(torch.ops.perfkit.rnn_backward(x, rows, h0, c0, weights, *saved_and_given, *options))

    @staticmethod
    def setup_context(_ctx, _inputs, _output):
        pass

    @staticmethod
    def backward(_ctx, *_gradients):
        raise UnsupportedError(ONLY_BACKWARD)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        def ordered(values):
            return *values[5:9], values[16:], *values[9:16], *values[:5]

        return one_by_one(_backward_step, info, ordered(in_dims), *ordered(inputs))


def _autograd(*arguments):
    _refuse_transformations()
    return _rnn_step(*arguments)


def _backward_autograd(*arguments):
    _refuse_transformations()
    return list(_backward_step(*arguments))


def _refuse_transformations():
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise UnsupportedError(
            "torch.func differentiates perfkit.kernels.rnn's functions, and not torch.ops.perfkit.rnn: call those"
        )


_LIBRARY.impl("rnn", _autograd, "Autograd")
_LIBRARY.impl("rnn_backward", _backward_autograd, "Autograd")


# ---- Autocast --------------------------------------------------------------------------------------------------------


def _autocast(device: str, key: str):
    def run(x, rows, h0, c0, weights, *options):
        dtype = torch.get_autocast_dtype(device)
        x, h0, c0 = (cast(tensor, dtype) for tensor in (x, h0, c0))
        without = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
        with torch._C._ExcludeDispatchKeyGuard(without):
            return torch.ops.perfkit.rnn(x, rows, h0, c0, [cast(weight, dtype) for weight in weights], *options)

    return run


for _device, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    _LIBRARY.impl("rnn", _autocast(_device, _key), _key)


# ---- vmap ------------------------------------------------------------------------------------------------------------
#
# `run` is the operator where it was called itself, and its step of autograd where torch.func came upon that.


def _rnn_vmap(run, info, in_dims, x, rows, h0, c0, weights, *options):
    """Rows of all calls become one batch, where the weights are the same for all and nothing is packed."""
    mode, _bias, _bidirectional, batch_first, save, _implementation = options
    x_dim, rows_dim, h_dim, c_dim, weight_dims = in_dims[:5]
    packed = rows is not None and x.dim() - (x_dim is not None) == 2
    if packed or any(dim is not None for dim in weight_dims):
        return one_by_one(run, info, in_dims, x, rows, h0, c0, weights, *options)
    calls, at = info.batch_size, 0 if batch_first else 1
    x, rows = folded(calls, x, x_dim, at), folded(calls, rows, rows_dim, 0)
    h0, c0 = folded(calls, h0, h_dim, 1), folded(calls, c0, c_dim, 1)
    y, hn, cn, *saved = run(x, rows, h0, c0, weights, *options)
    steps, split = x.size(1 - at), (calls, -1)
    found = [(y.unflatten(at, split), at), (hn.unflatten(1, split), 1)]
    found.append((cn.unflatten(1, split), 1) if mode == "LSTM" else (cn, None))
    for kept in saved:  # (stack, T * calls * B, ...) to (calls, stack, T * B, ...)
        there = save and kept.dim() > 1
        found.append((kept.unflatten(1, (steps, calls, -1)).movedim(2, 0).flatten(2, 3), 0) if there else (kept, None))
    return tuple(zip(*found, strict=True))


def _rnn_step(x, rows, h0, c0, weights, *options):
    return Rnn.apply(*options, x, rows, h0, c0, *weights)


def _backward_step(x, rows, h0, c0, weights, *rest):
    saved_and_given, options = rest[:7], rest[7:]
    return RnnBackward.apply(*options, x, rows, h0, c0, *saved_and_given, *weights)


torch.library.register_vmap("perfkit::rnn", functools.partial(_rnn_vmap, torch.ops.perfkit.rnn), lib=_LIBRARY)
torch.library.register_vmap(
    "perfkit::rnn_backward", functools.partial(one_by_one, torch.ops.perfkit.rnn_backward), lib=_LIBRARY
)
