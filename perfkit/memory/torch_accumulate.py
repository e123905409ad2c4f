"""What a torch model makes of a batch that comes in micro-batches."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.rnn import PackedSequence

from perfkit._errors import UnsupportedError
from perfkit._report import Effect
from perfkit._workload import Workload
from perfkit.backends.torch_copies import copied
from perfkit.backends.torch_surgery import map_tensors, tensors_in
from perfkit.memory import micro_batches


def accumulate(work: Workload, parts: int, batch_dim: int) -> tuple[Workload, Effect]:
    """Cut each training step into micro-batches.

    Raises:
        UnsupportedError: an input is a packed sequence, or the loss is no mean over the batch.
    """
    given = [*work.inputs.args, *work.inputs.kwargs.values()]
    if any(isinstance(value, PackedSequence) for value in given):
        raise UnsupportedError("a packed sequence mixes the rows of a batch: give padded ones with their lengths")

    def call(*args: Any, **kwargs: Any) -> Any:
        work.backend.seed(work.seed)
        return copied(work.model)(*args, **kwargs)

    with torch.no_grad():
        return micro_batches.accumulated(work, parts, batch_dim, call, _rounding, map_tensors, _notes(work))


def _rounding(outputs: Any) -> float:
    floats = [tensor for tensor in tensors_in(outputs) if tensor.is_floating_point()]
    return max((torch.finfo(tensor.dtype).eps for tensor in floats), default=0.0)


def _notes(work: Workload) -> list[str]:
    found = [(name, module) for name, module in work.model.named_modules() if module.training]
    norms = [name for name, module in found if isinstance(module, _BatchNorm)]
    draws = [
        name
        for name, module in found
        if (isinstance(module, _DropoutNd) and module.p) or (isinstance(module, torch.nn.RNNBase) and module.dropout)
    ]
    notes = []
    if norms:
        notes.append(f"{', '.join(norms)}: statistics of each micro-batch, so losses differ from the whole batch's")
    if draws:
        notes.append(f"{', '.join(draws)}: random numbers are drawn for each micro-batch, in another order")
    return notes
