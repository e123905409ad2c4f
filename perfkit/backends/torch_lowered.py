"""Which layers autocast really runs in low precision, seen from one run: not every one of a kind that it knows does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from perfkit._workload import Workload
from perfkit.backends.torch_state import keeping_state


class _Casts(TorchDispatchMode):
    """Notes which parameters, and whether any tensor at all, are cast to a lower precision."""

    def __init__(self, parameters: Iterable[torch.Tensor], dtype: torch.dtype):
        super().__init__()
        self.dtype, self.parameters = dtype, {id(parameter) for parameter in parameters}
        self.cast: set[int] = set()
        self.any = False

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: Mapping | None = None) -> Any:
        kwargs = kwargs or {}
        if operation is torch.ops.aten._to_copy.default and kwargs.get("dtype") == self.dtype:
            self.any = True
            if id(args[0]) in self.parameters:
                self.cast.add(id(args[0]))
        return operation(*args, **kwargs)


def lowered(work: Workload, dtype: torch.dtype) -> set[nn.Module] | None:
    """The modules that have a weight which autocast casts on the example inputs; None where it casts nothing at all.

    The model is left as it is.
    """
    model, inputs = work.model, work.inputs
    casts = _Casts(model.parameters(), dtype)
    with torch.random.fork_rng(), torch.no_grad(), keeping_state(model):
        work.backend.seed(work.seed)
        with torch.autocast(work.device, dtype), casts:
            model(*inputs.args, **inputs.kwargs)
    if not casts.any:
        return None
    return {m for m in model.modules() if any(id(p) in casts.cast for p in m.parameters(recurse=False))}
