"""Calls of recurrent layers and of embeddings in front of them, made when it is known how far they are read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from perfkit._errors import UnsupportedError
from perfkit.backends.torch_deferred import Deferred, computed, may_anything_wait
from perfkit.backends.torch_deferred_reads import Cells
from perfkit.backends.torch_fused_rnn import calls_kernel
from perfkit.backends.torch_surgery import with_data
from perfkit.kernels._torch import observer

LEAST_WORK = 1 << 26
"""Multiply-adds of a call. A smaller one is over by the time that it takes to wait, to pack and to pick: text_lstm's of
one row, half as many, was slower for it.
"""

Seen = Callable[[str, int, int, int], None]
"""Told of each time a layer is computed: by which function whole, or ""; steps that are read, computed, and all."""


class Waiting(ABC):
    """A call of a layer with a padded input, that has not been made yet.

    Args:
        module: the layer.
        run: its forward, as `run(module, x, ...)`.
        x: what it is called with, (T, B, ...), or (B, T, ...) if `batch_first`; or what waits itself.
        others: what else it is called with.
        seen: told what is computed.
    """

    def __init__(
        self, module: nn.Module, run: Callable, x: Tensor, others: tuple, batch_first: bool, seen: Seen | None
    ):
        self.module, self.run, self.x, self.others, self.seen = module, run, x, others, seen
        self.time, self.batch = (1, 0) if batch_first else (0, 1)
        self.steps, self.rows = x.size(self.time), x.size(self.batch)
        self.ends: list[int] | None = None
        self.short: Tensor | PackedSequence | None = None
        self.found: tuple | None = None
        self._setting = _setting(x.device.type)
        self._given = [each for each in (x, *_flat(others)) if type(each) is not Deferred]
        self._versions = [_version(tensor) for tensor in self._given]

    def whole(self, part: int, why: str) -> Tensor:
        """A part of what the layer returns, called as it was; `why` wants it."""
        if self.found is None:
            if self.seen:
                self.seen(why, *[self.steps * self.rows] * 3)
            self.found = tuple(_flat(self._as_called(computed(self.x, why), *self.others)))
        return self.found[part]

    def read(self, cells: Cells) -> Tensor | None:
        """The outputs in `cells`, one row of features each; None where the whole output is there, or needed."""
        short = self._reached(cells)
        if short is None:
            return None
        if isinstance(short, Tensor):
            if len(cells.steps) == self.rows == 1:
                return short.select(self.time, cells.steps[0]).unflatten(0, cells.shape).clone()
            at = torch.tensor(cells.rows), torch.tensor(cells.steps)
            return short[at if self.batch == 0 else at[::-1]].unflatten(0, cells.shape)
        starts = short.batch_sizes.cumsum(0) - short.batch_sizes
        of_row = short.unsorted_indices.cpu()[torch.tensor(cells.rows)]
        at = (starts[torch.tensor(cells.steps)] + of_row).to(short.data.device)
        return short.data.index_select(0, at).unflatten(0, cells.shape)

    def padded(self, cells: Cells) -> Tensor | None:
        """The output as the layer lays it out, right up to `cells`; None as in `read`."""
        short = self._reached(cells)
        return pad_packed_sequence(short, self.batch == 0)[0] if isinstance(short, PackedSequence) else short

    def _reached(self, cells: Cells) -> Tensor | PackedSequence | None:
        ends = [1] * self.rows
        for row, step in zip(cells.rows, cells.steps, strict=True):
            if step >= ends[row]:
                ends[row] = step + 1
        if self.found is None and self.ends is not None and all(map(int.__le__, ends, self.ends)):
            return self.short
        return self.until(ends)

    def until(self, ends: list[int]) -> Tensor | PackedSequence | None:
        """The output of each row up to its end at least; None where the layer has been computed in another way."""
        read, most = sum(ends), max(ends)
        if min(ends) < most and not self.ragged():
            ends = [most] * self.rows
        if self.found is not None:  # and may have been written to
            return None
        if self.ends is not None:
            return self.short if ends == self.ends else None
        x = self.x.call.until(ends) if type(self.x) is Deferred else None
        if x is None:
            x = computed(self.x, "another layer")
            if min(ends) == most:
                x = x.narrow(self.time, 0, most)
            else:
                x = pack_padded_sequence(x, torch.tensor(ends), self.batch == 0, enforce_sorted=False)
        if isinstance(x, Tensor):  # also of a layer that is not ragged, for one that is
            ends = [most] * self.rows
        if self.seen:
            self.seen("", read, sum(ends), self.steps * self.rows)
        self.short, self.ends = self._output(x), ends
        return self.short

    def ragged(self) -> bool:
        """Whether the layer is to be called on packed sequences."""
        return True

    @abstractmethod
    def _output(self, x: Any) -> Any:
        """The layer's output of a shorter padded input, or of a packed sequence."""

    def _as_called(self, x: Any, *others: Any) -> Any:
        """What the layer returns, under the modes that it was called in."""
        if [_version(tensor) for tensor in self._given] != self._versions:
            raise UnsupportedError(
                f"skip_padding: what {self.module._get_name()} was called with was written to before its output was "
                "read, and the layer computes when it is: write to a copy, or leave the layer out, "
                "skip_padding(exclude=[…])"
            )
        device = self.x.device.type
        if self._setting == _setting(device):
            return self.run(self.module, x, *others)
        inference, gradients, casts, dtype = self._setting
        with ExitStack() as modes:
            modes.enter_context(torch.inference_mode(inference))
            modes.enter_context(torch.set_grad_enabled(gradients))
            modes.enter_context(torch.autocast(device, dtype, enabled=casts))
            return self.run(self.module, x, *others)


class Recurrence(Waiting):
    """A call of a recurrent layer, on an input and its initial state."""

    def __init__(self, module: nn.RNNBase, run: Callable, x: Tensor, hx: Any, seen: Seen | None):
        super().__init__(module, run, x, (hx,), module.batch_first, seen)

    def results(self) -> Any:
        """What the layer returns, all of it waiting."""
        hn, *cn = (Deferred(self, 1 + at, shape) for at, shape in enumerate(_of_states(self.module, self.rows)))
        return Deferred(self, 0, (*self.x.shape[:-1], hn.size(2))), (hn, *cn) if cn else hn

    def ragged(self) -> bool:
        return calls_kernel(self.module)

    def _output(self, x: Any) -> Any:
        return self._as_called(x, *self.others)[0]


class Lookup(Waiting):
    """A call of an embedding for a recurrent layer with such a layout, on indices."""

    def __init__(self, module: nn.Embedding, run: Callable, ids: Tensor, batch_first: bool, seen: Seen | None):
        super().__init__(module, run, ids, (), batch_first, seen)

    def results(self) -> Deferred:
        """What the embedding returns, waiting."""
        return Deferred(self, 0, (*self.x.shape, self.module.embedding_dim))

    def _output(self, x: Any) -> Any:
        return with_data(x, self._as_called(x.data)) if isinstance(x, PackedSequence) else self._as_called(x)


def may_wait(module: nn.RNNBase, x: Any, hx: Any) -> bool:
    """Whether this call of a recurrent layer may wait: it would not fail, and nobody looks on."""
    if not may_anything_wait() or module.bidirectional or not isinstance(x, Tensor):
        return False
    if type(x) is Deferred:
        fits = x.part == 0 and x.call.batch == (0 if module.batch_first else 1)
    else:
        fits = observer([x]) is None
    if not fits or x.dim() != 3 or x.size(-1) != module.input_size or not x.numel():
        return False
    rows = x.size(0 if module.batch_first else 1)
    if _work(module, x.size(0) * x.size(1)) < LEAST_WORK:
        return False
    states, expected = _flat(hx), _of_states(module, rows)
    return hx is None or (observer(states) is None and [tuple(state.shape) for state in states] == expected)


def may_look_up_later(ids: Any) -> bool:
    """Whether this call of an embedding may wait."""
    plain = may_anything_wait() and isinstance(ids, Tensor) and observer([ids]) is None
    return plain and ids.dim() == 2 and ids.numel() > 0


def _work(module: nn.RNNBase, steps: int) -> int:
    """Multiply-adds of so many steps, over all rows."""
    channels = {"LSTM": 4, "GRU": 3}.get(module.mode, 1) * module.hidden_size
    return steps * channels * (module.input_size + module.hidden_size * (2 * module.num_layers - 1))


def _of_states(module: nn.RNNBase, rows: int) -> list[tuple[int, int, int]]:
    """The shapes of a layer's states."""
    h = module.num_layers, rows, module.proj_size or module.hidden_size
    return [h, (*h[:2], module.hidden_size)] if module.mode == "LSTM" else [h]


def _flat(tree: Any) -> list[Tensor]:
    """The tensors in nested tuples."""
    if isinstance(tree, (tuple, list)):
        return [each for part in tree for each in _flat(part)]
    return [] if tree is None else [tree]


def _setting(device: str) -> tuple:
    """The modes that what a layer computes depends on."""
    casts = torch.is_autocast_enabled(device)
    return torch.is_inference_mode_enabled(), torch.is_grad_enabled(), casts, torch.get_autocast_dtype(device)


def _version(tensor: Tensor) -> int | str:
    """What changes when a tensor is written to; of one made in inference mode, which does not count, some numbers."""
    if not tensor.is_inference():
        return tensor._version
    ends = tensor.select(0, 0), tensor.select(0, -1)
    return str([part.reshape(-1)[:: max(1, part.numel() // 8)].tolist() for part in ends])  # a NaN is itself
