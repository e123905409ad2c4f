"""What `lstm`, `gru` and `rnn` do with torch tensors: the shortest way to who computes that keeps all promises.

An implementation is called as it is where no gradient is wanted and nothing looks on; a kernel is one step of autograd
where a gradient is; and all is `torch.ops.perfkit.rnn` under torch.compile, torch.export, torch.func, dispatch modes
and tensor subclasses. A small model's call takes microseconds: what a kind of call is found to be is remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from perfkit._errors import InvalidInputError, UnsupportedError
from perfkit.kernels import _autotune, _op
from perfkit.kernels import rnn as op
from perfkit.kernels._op import Choice
from perfkit.kernels._torch import Known, autocasts, cast, lowered, observer
from perfkit.kernels.rnn import torch_op, torch_stack
from perfkit.kernels.rnn.problem import Problem
from perfkit.kernels.rnn.torch_problem import check_rows, problem_of

_form = attrgetter("shape", "dtype", "device", "layout")
_known = Known(op.OP)
_MOST_KNOWN = 4096
_direct: dict[Any, Callable[..., tuple[Tensor, Tensor, Tensor | None]] | None] = {}
"""By kind of call on a CPU: the kernel's call that is made at once; None where there is none."""


def run(
    x: Tensor | PackedSequence,
    mode: str,
    weights: Sequence[Sequence[Tensor]],
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Any,
    batch_first: bool,
    bidirectional: bool,
    dropout: float,
    training: bool,
    key: Any,
    recompute: bool,
    implementation: str | None,
) -> tuple[Any, Tensor, Tensor | None]:
    """y, hn and cn; see `perfkit.kernels.rnn.lstm`."""
    kind = None
    if lengths is None and key is None:
        flat = [weight for direction in weights for weight in direction]
        tensors = [x, *(state for state in (h0, c0) if state is not None), *flat]
        if _nothing_on(tensors) and x.is_cpu:
            low = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
            of_call = mode, tuple(map(len, weights)), h0 is None, batch_first, bidirectional, dropout, training, low
            kind = tuple(map(_form, tensors)), of_call, implementation, _autotune.state()
            at_once = _direct.get(kind)
            if at_once is not None and all(map(Tensor.is_contiguous, tensors)):
                return at_once(x, h0, c0, flat)
    found = _checked(x, mode, weights, h0, c0, lengths, batch_first, bidirectional, dropout, training, key, recompute,
                     implementation)  # fmt: skip
    if kind is not None and kind not in _direct:
        form = mode, len(weights[0]) == 4, bidirectional, batch_first, False
        given, *weights_given = lowered("cpu", x, *flat)
        problem, choice = _picked(given, None, *lowered("cpu", h0, c0), weights_given, form, implementation)
        rounded = _rounded(tensors, flat, low)
        whole = choice.implementation == "cpu" and not (dropout and training and problem.layers > 1)
        if len(_direct) >= _MOST_KNOWN:
            _direct.clear()
        at_once = whole and rounded is not None
        _direct[kind] = torch_stack.module("cpu").caller(problem, batch_first, form[1], rounded) if at_once else None
    return found


def _rounded(tensors: Sequence[Tensor], weights: Sequence[Tensor], low: torch.dtype | None) -> int | None:
    """What the kernel itself is to round, as its `caller` counts it; None where autocast does more than that."""
    if low is None or all(tensor.dtype == low for tensor in tensors):
        return 0
    if low != torch.bfloat16 or any(weight.dtype != torch.float32 for weight in weights):
        return None
    return {torch.bfloat16: 1, torch.float32: 2}.get(tensors[0].dtype)


def picked_at_once(
    x: Tensor, mode: str, weights: Sequence[Sequence[Tensor]], batch_first: bool, bidirectional: bool
) -> Problem | None:
    """The problem without states or gradients, checked, where the CPU kernel takes it as it lies; else None."""
    flat = [weight for direction in weights for weight in direction]
    form = mode, len(weights[0]) == 4, bidirectional, batch_first, False
    problem, choice = _picked(x, None, None, None, flat, form, None)
    at_once = choice.implementation == "cpu" and torch_stack.module("cpu").takes_as_it_is(problem)
    return problem if at_once else None


def _nothing_on(tensors: list[Tensor]) -> bool:
    """Numbers are wanted of plain tensors, and no more: no gradient, trace, mode or transformation."""
    if observer(tensors) or _op.tracing():
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


def _checked(
    x, mode, weights, h0, c0, lengths, batch_first, bidirectional, dropout, training, key, recompute, implementation
):
    """The same for any call, checked."""
    if key is not None:
        raise InvalidInputError("key is for JAX: torch draws from its own generator, see torch.manual_seed")
    if not 0 <= dropout <= 1:
        raise InvalidInputError(f"dropout is {dropout}: expected a probability, from 0 to 1")
    options = (mode, _has_bias(weights), bidirectional, recompute, implementation)
    if not isinstance(x, PackedSequence):
        rows = None if lengths is None else _rows(lengths)
        return _layers(x, rows, h0, c0, weights, dropout if training else 0.0, batch_first, *options)
    if lengths is not None:
        raise InvalidInputError("a PackedSequence knows its lengths: leave out lengths")
    data, sizes, order, back = x
    if order is not None:  # rows are sorted: states on the way in, and back on the way out
        h0, c0 = (_reordered(state, order) for state in (h0, c0))
    if h0 is None:
        batch = int(sizes[0]) if back is None else back.size(0)
        torch._check(batch >= 1)  # a compiler is not told what sizes holds
        h0 = data.new_zeros(len(weights), batch, weights[0][1].size(-1))
    y, hn, cn = _layers(data, sizes, h0, c0, weights, dropout if training else 0.0, False, *options)
    if back is not None:
        hn, cn = (_reordered(state, back) for state in (hn, cn))
    return PackedSequence(y, sizes, order, back), hn, cn


def _reordered(state: Tensor | None, order: Tensor) -> Tensor | None:
    """Its rows in another order, where it is a state; what else it may be is told later."""
    return state.index_select(1, order) if isinstance(state, Tensor) and state.dim() == 3 else state


def _has_bias(weights: Sequence[Sequence[Tensor]]) -> bool:
    """Whether the groups are of four tensors or of two."""
    counts = {len(direction) for direction in weights}
    if counts == {4} or counts == {2}:
        return counts == {4}
    raise InvalidInputError(
        f"weights are {len(weights)} groups of {' or '.join(map(str, sorted(counts))) or 'no'} tensors: expected "
        "(w_ih, w_hh) or (w_ih, w_hh, b_ih, b_hh) for each layer and direction, all alike, and no projections"
    )


def _rows(lengths: Any) -> Tensor:
    """Lengths as the operator takes them."""
    rows = lengths if isinstance(lengths, Tensor) else torch.tensor(lengths)
    if rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool:
        raise InvalidInputError(f"lengths are {rows.dtype}: expected integers")
    return rows.to("cpu", torch.int64)


def _layers(x, rows, h0, c0, weights, dropout, batch_first, mode, bias, bidirectional, recompute, implementation):
    """The whole stack at once, or layer after layer where there is dropout between them."""
    options = batch_first, mode, bias, bidirectional, recompute, implementation
    directions = 2 if bidirectional else 1
    if not dropout or len(weights) <= directions:
        return _stack(x, rows, h0, c0, weights, *options)
    states = []
    for first in range(0, len(weights), directions):
        of_layer = slice(first, first + directions)
        h, c = (None if state is None else state[of_layer] for state in (h0, c0))
        x = torch.nn.functional.dropout(x, dropout) if first else x
        x, *state = _stack(x, rows, h, c, weights[of_layer], *options)
        states.append(state)
    hn, cn = zip(*states, strict=True)
    return x, torch.cat(hn), torch.cat(cn) if mode == "LSTM" else None


def _stack(x, rows, h0, c0, weights, batch_first, mode, bias, bidirectional, recompute, implementation):
    """A stack without dropout."""
    flat = [weight for direction in weights for weight in direction]
    tensors = [x, *flat, *(state for state in (h0, c0) if state is not None)]
    device = x.device.type
    if autocasts(device):
        dtype = torch.get_autocast_dtype(device)
        x, h0, c0 = (cast(tensor, dtype) for tensor in (x, h0, c0))
        weights = [[cast(weight, dtype) for weight in direction] for direction in weights]
        options = batch_first, mode, bias, bidirectional, recompute, implementation
        with torch.autocast(device, enabled=False):
            return _stack(x, rows, h0, c0, weights, *options)
    observed = _observer(tensors, implementation)
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    form = mode, bias, bidirectional, batch_first, needs_grad
    if not observed:
        problem, choice = _picked(x, rows, h0, c0, flat, form, implementation)
        if rows is not None:
            check_rows(problem, rows, x.size(0))
    elif observed != "compiled":  # there the operator tells
        problem_of(x, rows, h0, c0, flat, *form)
    if h0 is None or (c0 is None and mode == "LSTM"):
        given = c0 if h0 is None else h0
        batch = x.size(0 if batch_first else 1) if given is None else given.size(1)
        zeros = x.new_zeros(len(weights), batch, flat[1].size(-1))
        h0 = zeros if h0 is None else h0
        c0 = zeros if c0 is None and mode == "LSTM" else c0
    if observed:
        save = needs_grad and not recompute and implementation not in ("library", "reference")
        options = mode, bias, bidirectional, batch_first, save, implementation or ""
        if observed == "transformed":
            y, hn, cn, *_ = torch_op.Rnn.apply(*options, x, rows, h0, c0, *flat)
        else:
            y, hn, cn, *_ = torch.ops.perfkit.rnn(x, rows, h0, c0, flat, *options)
        return y, hn, cn if mode == "LSTM" else None
    if needs_grad and choice.implementation in torch_stack.KERNELS:
        return torch_stack.Stack.apply(problem, choice, rows, batch_first, bias, recompute, x, h0, c0, *flat)
    y, hn, cn = torch_stack.forward(problem, choice, x, rows, h0, c0, weights, batch_first)
    if y.dtype != x.dtype:
        y, hn, cn = y.to(x.dtype), hn.to(x.dtype), None if cn is None else cn.to(x.dtype)
    return y, hn, cn


def _observer(tensors: list[Tensor], implementation: str | None) -> str | None:
    """Who must see the call as one operation; the reference is plain operations, which torch differentiates any way."""
    if strangers := [tensor for tensor in tensors if not isinstance(tensor, Tensor)]:
        kind = type(strangers[0]).__name__
        raise InvalidInputError(f"a {kind} among the weights and states: expected torch tensors")
    found = observer(tensors)
    if implementation == "reference" and found in ("transformed", "dual"):
        return None
    if found == "dual":
        raise UnsupportedError(torch_op.ONLY_BACKWARD)
    return found


def _picked(x, rows, h0, c0, flat, form, implementation) -> tuple[Problem, Choice]:
    """The problem, checked, and who computes it."""
    states = tuple(None if given is None else _form(given) for given in (rows, h0, c0))
    kind = _form(x), states, tuple(map(_form, flat)), form
    return _known(kind, lambda: problem_of(x, rows, h0, c0, flat, *form), implementation)
