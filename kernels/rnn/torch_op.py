"""`torch.ops.perfkit.rnn` and its gradient: a stack of recurrent layers as one operator, with everything registered.

torch.compile and torch.export keep it whole; autocast casts its tensors; vmap folds what it can into the batch;
autograd and torch.func.grad run `torch.ops.perfkit.rnn_backward`. `torch_call.run` comes here wherever something more
than plain autograd looks on. The arguments:

    x               (T, B, I), or (B, T, I) if batch_first, or the (P, I) data of a PackedSequence
    rows            None; or lengths (B,) of padded rows; or batch_sizes (T,) of packed ones; int64, on the CPU
    h0, c0          (layers * directions, B, H); c0 None but for LSTM
    weights         w_ih, w_hh, b_ih, b_hh of each layer and direction; without the biases unless `bias`
    mode            "LSTM", "GRU", "RNN_TANH" or "RNN_RELU"
    save            keep what the backward pass needs; else it runs the forward pass again
    implementation  who computes; "" to have it picked

It returns y, hn, cn (empty but for LSTM) in x's dtype and, if `save`, the `torch_stack.Saved`, else three empty tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from perfkit._errors import UnsupportedError
from perfkit.kernels import rnn as op
from perfkit.kernels.rnn import torch_stack
from perfkit.kernels.rnn.torch_problem import check_rows, problem_of
from perfkit.kernels.rnn.torch_stack import Saved, grouped

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
    choice = op.choose(problem, asked)
    saved = torch_stack.empty_saved(problem, x) if save else None
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
    choice = torch_stack.unrecorded(problem, asked or torch_stack.first_able(problem))
    saved = None if y is None else Saved(gates, cells, inner)
    weights = grouped(weights, bias)
    gradients = torch_stack.backward(problem, choice, x, rows, h0, c0, weights, batch_first, y, saved, d_y, d_hn, d_cn)
    return [gradient.contiguous() for gradient in gradients]


@torch.library.register_fake("perfkit::rnn_backward", lib=_LIBRARY)
def _rnn_backward_fake(x, _rows, h0, c0, weights, *_rest):
    return [like.new_empty(like.shape) for like in (x, h0, c0, *weights) if like is not None]


# ---- Autograd --------------------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output):
    x, rows, h0, c0, weights, mode, bias, bidirectional, batch_first, save, implementation = inputs
    y, hn, _, *saved = output
    ctx.options = mode, bias, bidirectional, batch_first, implementation
    ctx.shapes = y.shape, hn.shape
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)  # those of what is saved would be large
    ctx.save_for_backward(x, rows, h0, c0, *([y, *saved] if save else [None] * 4), *weights)


def _gradient(ctx, d_y, d_hn, d_cn, *_of_saved):
    x, rows, h0, c0, *rest = ctx.saved_tensors
    saved, weights = rest[:4], rest[4:]
    of_y, of_state = ctx.shapes
    d_y = x.new_zeros(of_y) if d_y is None else d_y
    d_hn, d_cn = (x.new_zeros(of_state) if given is None else given for given in (d_hn, d_cn))
    d_cn = None if c0 is None else d_cn
    d_x, d_h0, *rest = torch.ops.perfkit.rnn_backward(x, rows, h0, c0, weights, *saved, d_y, d_hn, d_cn, *ctx.options)
    d_c0, *of_weights = rest if c0 is not None else (None, *rest)
    return d_x, None, d_h0, d_c0, of_weights, *[None] * 6


def _no_second_gradient(ctx, *_gradients):
    raise UnsupportedError(
        "the second derivative of perfkit's recurrent kernels is not there: pass implementation='reference', whose plain "
        "operations torch differentiates as often as wanted"
    )


torch.library.register_autograd("perfkit::rnn", _gradient, setup_context=_setup_context, lib=_LIBRARY)
torch.library.register_autograd("perfkit::rnn_backward", _no_second_gradient, lib=_LIBRARY)


# ---- Autocast --------------------------------------------------------------------------------------------------------


def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What autocast makes of an argument: float64 and integers stay."""
    narrow = tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if narrow else tensor


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


@torch.library.register_vmap("perfkit::rnn", lib=_LIBRARY)
def _rnn_vmap(info, in_dims, *arguments):
    """Rows of all calls become one batch, where the weights are the same for all and nothing is packed."""
    x, rows, h0, c0, weights, mode, _bias, _bidirectional, batch_first, save, _implementation = arguments
    calls, (x_dim, rows_dim, h_dim, c_dim, weight_dims) = info.batch_size, in_dims[:5]
    packed = rows is not None and x.dim() - (x_dim is not None) == 2
    if packed or any(dim is not None for dim in weight_dims):
        return _one_by_one(info, in_dims, arguments, torch.ops.perfkit.rnn)

    def folded(tensor, dim, at):
        """The calls before the batch, which is number `at` of the other dimensions, and one with it."""
        if tensor is None:
            return None
        tensor = tensor.unsqueeze(at).expand(*tensor.shape[:at], calls, *tensor.shape[at:]) if dim is None else (
            tensor.movedim(dim, at))  # fmt: skip
        return tensor.flatten(at, at + 1)

    at = 0 if batch_first else 1
    many = folded(x, x_dim, at), folded(rows, rows_dim, 0), folded(h0, h_dim, 1), folded(c0, c_dim, 1)
    y, hn, cn, *saved = torch.ops.perfkit.rnn(*many, weights, *arguments[5:])
    split = (calls, -1)
    found, dims = [y.unflatten(at, split), hn.unflatten(1, split)], [at, 1]
    found, dims = [*found, cn.unflatten(1, split) if mode == "LSTM" else cn], [*dims, 1 if mode == "LSTM" else None]
    for kept in saved:  # (stack, T * calls * B, ...) to (calls, stack, T * B, ...)
        there = save and kept.dim() > 1
        steps = x.size(0 if x_dim is None or x_dim > 0 else 1)
        found.append(kept.unflatten(1, (steps, calls, -1)).movedim(2, 0).flatten(2, 3) if there else kept)
        dims.append(0 if there else None)
    return tuple(found), tuple(dims)


@torch.library.register_vmap("perfkit::rnn_backward", lib=_LIBRARY)
def _rnn_backward_vmap(info, in_dims, *arguments):
    return _one_by_one(info, in_dims, arguments, torch.ops.perfkit.rnn_backward)


def _one_by_one(info, in_dims, arguments, run):
    def pick(argument, dim, call):
        if isinstance(argument, (list, tuple)):
            return [pick(each, of_it, call) for each, of_it in zip(argument, dim, strict=True)]
        return argument if dim is None else argument.select(dim, call)

    calls = [
        run(*(pick(argument, dim, call) for argument, dim in zip(arguments, in_dims, strict=True)))
        for call in range(info.batch_size)
    ]
    found = [torch.stack(each) for each in zip(*calls, strict=True)]
    return (found, [0] * len(found)) if isinstance(calls[0], list) else (tuple(found), (0,) * len(found))
