"""What each module of a torch model saves for its backward pass, and how long it takes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from perfkit._workload import Inputs, Workload
from perfkit.backends.torch_checks import content
from perfkit.backends.torch_copies import copied
from perfkit.backends.torch_hooks import call_hooks
from perfkit.backends.torch_state import remembered, unchanged
from perfkit.backends.torch_surgery import parts, tensors_in

MOST_CHUNKS = 32


@dataclass
class Record:
    """One module in one forward pass.

    Args:
        own_bytes: saved by its own operations, its children's not included; a storage counts where it is first saved.
        input_bytes: of the tensors that go into it.
        seconds: of its calls, its children's included.
        order: when it was first called.
        calls: how often it was called.
        writes_input: it changed what went into it.
        changes: it changed one of its buffers or attributes, other than a batch norm's statistics.
        sequence: steps of a sequence that it can run in pieces; 0 where it cannot.
        hooked: the caller has hooks on its calls.
    """

    own_bytes: float = 0.0
    input_bytes: float = 0.0
    seconds: float = 0.0
    order: int = -1
    calls: int = 0
    writes_input: bool = False
    changes: bool = False
    sequence: int = 0
    hooked: bool = False
    saved_bytes: float = field(default=0.0)


def records(work: Workload) -> dict[str, Record]:
    """A record of each module, by each of its names: bytes of a training step of a copy, the least seconds of three."""
    model = copied(work.model)
    found = {name: Record(hooked=bool(call_hooks(module))) for name, module in model.named_modules()}
    _step(work, model)  # warm
    with _counting(model, found):
        _step(work, model)
    seconds = []
    for _ in range(3):
        again = {name: Record() for name in found}
        with _timing(model, again, work.device):
            _step(work, model)
        seconds.append({name: record.seconds for name, record in again.items()})
    for name, record in found.items():
        record.seconds = min(one[name] for one in seconds)
    first = {module: name for name, module in model.named_modules()}
    found = {name: found[first[module]] for name, module in model.named_modules(remove_duplicate=False)}
    for name, record in found.items():
        within = f"{name}." if name else ""
        inside = {id(other): other for key, other in found.items() if key == name or key.startswith(within)}
        record.saved_bytes = sum(other.own_bytes for other in inside.values())
    return found


def _step(work: Workload, model: nn.Module) -> None:
    work.backend.seed(work.seed)
    outputs = model(*work.inputs.args, **work.inputs.kwargs)
    work.training.loss(outputs, work.training.targets).backward()
    model.zero_grad(set_to_none=True)


@contextmanager
def _hooked(model: nn.Module, before: Any, after: Any) -> Iterator[None]:
    handles = []
    for name, module in model.named_modules():
        handles.append(
            module.register_forward_pre_hook(
                lambda module, args, kwargs, name=name: before(name, module, (args, kwargs)),
                with_kwargs=True,
                prepend=True,  # what the model's own hooks do belongs to the call, and is run again with it
            )
        )
        handles.append(
            module.register_forward_hook(
                lambda module, args, kwargs, _, name=name: after(name, module, (args, kwargs)), with_kwargs=True
            )
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _counting(model: nn.Module, found: dict[str, Record]) -> Iterator[None]:
    own = [part for tensor in (*model.parameters(), *model.buffers()) for part in parts(tensor)]
    held = {tensor.untyped_storage().data_ptr() for tensor in own}
    stack: list[tuple[str, list[tuple], Any]] = []
    seen: list[torch.UntypedStorage] = []  # kept, so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        for storage in [part.untyped_storage() for part in parts(tensor)] if stack else ():
            if storage.data_ptr() not in held:
                held.add(storage.data_ptr())
                seen.append(storage)
                found[stack[-1][0]].own_bytes += storage.nbytes()
        return tensor

    def before(name: str, module: nn.Module, given: Any) -> None:
        record, tensors = found[name], list(tensors_in(given))
        record.order = len([one for one in found.values() if one.calls]) if record.order < 0 else record.order
        record.calls += 1
        record.input_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.requires_grad)
        record.sequence = _sequence(module, given)
        stack.append((name, content(Inputs(*given)), remembered(module)))

    def after(name: str, module: nn.Module, given: Any) -> None:
        _, before_it, held = stack.pop()
        record = found[name]
        record.writes_input |= content(Inputs(*given)) != before_it  # to a tensor of it, or to a cache
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            record.changes |= not unchanged(held, remembered(module))

    with _hooked(model, before, after), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


@contextmanager
def _timing(model: nn.Module, found: dict[str, Record], device: str) -> Iterator[None]:
    began: list[float] = []

    def now() -> float:
        if device != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    def before(*_: Any) -> None:
        began.append(now())

    def after(name: str, *_: Any) -> None:
        found[name].seconds += now() - began.pop()

    with _hooked(model, before, after):
        yield


def _sequence(module: nn.Module, given: Any) -> int:
    """Steps of the sequence that a recurrent layer reads, where it may read it piece by piece."""
    args, kwargs = given
    x = args[0] if args else kwargs.get("input")
    if not isinstance(module, nn.RNNBase) or module.bidirectional or not isinstance(x, torch.Tensor):
        return 0
    return x.shape[time_dim(module, x)]


def time_dim(module: nn.RNNBase, x: torch.Tensor) -> int:
    return 1 if module.batch_first and x.dim() == 3 else 0
