"""What one step of a torch model computes and moves, operator by operator: counted, not timed.

The step runs without torch.compile, whose programs cannot be looked into: what is counted is the model's mathematics.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from perfkit._workload import Workload
from perfkit.backends.adapter import Finished
from perfkit.backends.torch_surgery import tensors_in
from perfkit.profiling import torch_flops
from perfkit.profiling.torch_where import Where

Key = tuple[str, str, str]
"""An operator's name, its module and its phase."""

_LOOKS_UP = {"aten::embedding", "aten::index_select", "aten::gather", "aten::index"}
"""Read as much of their first argument as they return."""


MOST_SHAPES = 8


@dataclass(frozen=True)
class Call:
    """One call of an operator: its inputs' shapes, FLOPs, and the bytes that it must read and write."""

    shapes: str
    flops: float
    moved_bytes: float


@dataclass
class Count:
    """One step, counted.

    Args:
        calls: of each operator in each module and phase, in order.
        modules: how often each module was called.
        saved_bytes: what each keeps for the backward pass, without the modules in it and without parameters.
        output_bytes: what each returned.
    """

    calls: defaultdict[Key, list[Call]] = field(default_factory=lambda: defaultdict(list))
    modules: Counter[str] = field(default_factory=Counter)
    saved_bytes: Counter[str] = field(default_factory=Counter)
    output_bytes: Counter[str] = field(default_factory=Counter)

    @property
    def operators(self) -> set[str]:
        return {name for name, _, _ in self.calls}

    def flops(self, path: str = "") -> float:
        """Of a module and those in it."""
        return sum(call.flops for (_, module, _), calls in self.calls.items() for call in calls if within(module, path))


def counted(work: Workload, finished: Finished) -> Count:
    """Run one step, warmed up by another, and count it; the state of the model is as before.

    A model that calls torch.func in its forward pass forbids to look at what is saved: `saved_bytes` is empty then.
    """
    try:
        count = _counted(work, finished, looking_at_saved=True)
    except RuntimeError as error:
        if "saved tensor hooks" not in str(error):
            raise
        count = _counted(work, finished, looking_at_saved=False)
    if work.trains and any(isinstance(module, nn.RNNBase) for module in work.model.modules()):
        with _StatesWanted():
            _complete(count, _counted(work, finished, looking_at_saved=False))
    return count


def _counted(work: Workload, finished: Finished, looking_at_saved: bool) -> Count:
    count = Count()

    def returned(path: str, output: Any) -> None:
        count.output_bytes[path] += sum(map(_bytes, tensors_in(output)))

    where = Where(work.model, returned)
    step = where.stepping(work, finished)
    with ExitStack() as stack:
        stack.enter_context(finished.keeping_state())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        step()
        stack.enter_context(where.following(eager=True))
        if looking_at_saved:
            saving = _Saving(work, where, count)
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(saving, lambda tensor: tensor))
        stack.enter_context(_Counting(where, count))
        step()
    count.modules.update(where.calls)
    return count


def within(module: str, path: str) -> bool:
    """Whether a module is `path` or lies in it."""
    return not path or module == path or module.startswith(path + ".")


class _Counting(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self, where: Where, count: Count):
        super().__init__()
        self.where = where
        self.count = count

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.higher_order.cond:
            chosen, otherwise, operands = args[1:4]
            with self:
                return (chosen if bool(args[0]) else otherwise)(*operands)
        if isinstance(func, torch._ops.HigherOrderOperator):
            output = func(*args, **kwargs)
            self._note(func, args, kwargs, output)
            return output
        if not torch_flops.counted(func) and func is not torch.ops.prim.device.default:
            with self:
                parts = func.decompose(*args, **kwargs)
                if parts is not NotImplemented:
                    return parts
        output = func(*args, **kwargs)
        if func.namespace != "profiler":
            self._note(func, args, kwargs, output)
        return output

    def _note(self, func: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        inputs, outputs = list(tensors_in((args, kwargs))), list(tensors_in(output))
        flops = torch_flops.count(func, args, kwargs, output)
        call = Call(_shapes(inputs), flops, _moved(func, inputs, outputs))
        self.count.calls[torch_flops.name_of(func), self.where.module, self.where.phase].append(call)


class _StatesWanted(TorchFunctionMode):
    """Within it, the initial states of recurrent layers have gradients.

    Layers that run as one operator compute these anyhow, and so does JAX; those that torch takes apart (GRU, RNN, LSTM
    with projections, on a CPU) leave out the first step's.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in _RECURRENT and torch.is_grad_enabled():
            place = 1 if isinstance(args[3], bool) else 2  # of a packed sequence the sizes stand before the states
            args = (*args[:place], _wanted(args[place]), *args[place + 1 :])
        return func(*args, **(kwargs or {}))


_RECURRENT = {"rnn_tanh", "rnn_relu", "gru", "lstm"}


def _wanted(states: Any) -> Any:
    if isinstance(states, Tensor):
        return states if states.requires_grad else states.detach().requires_grad_()
    return tuple(map(_wanted, states))


def _complete(count: Count, whole: Count) -> None:
    """Give the products that `whole` has more of to those of the same shapes, so that the calls stay those that run."""
    for key, calls in whole.calls.items():
        if not any(call.flops for call in calls):
            continue
        there, wanted = _by_shapes(count.calls[key]), _by_shapes(calls)
        count.calls[key] = [
            replace(call, flops=call.flops * wanted[call.shapes] / there[call.shapes]) if call.flops else call
            for call in count.calls[key]
        ]
        count.calls[key] += [call for call in calls if call.flops and not there[call.shapes]]


def _by_shapes(calls: Iterable[Call]) -> defaultdict[str, float]:
    found: defaultdict[str, float] = defaultdict(float)
    for call in calls:
        found[call.shapes] += call.flops
    return found


class _Saving:
    """Called with each tensor that is saved for the backward pass; counts each storage once."""

    def __init__(self, work: Workload, where: Where, count: Count):
        self.where, self.count = where, count
        self.seen = {_storage(tensor) for tensor in (*work.model.parameters(), *work.model.buffers())}

    def __call__(self, tensor: Tensor) -> Tensor:
        if (key := _storage(tensor)) not in self.seen:
            self.seen.add(key)
            self.count.saved_bytes[self.where.module] += tensor.untyped_storage().nbytes() if key else _bytes(tensor)
        return tensor


def described(tensor: Tensor) -> str:
    """ "float32[64, 10]"."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}" if not tensor.is_nested else "nested"


def _shapes(tensors: list[Tensor]) -> str:
    told = ", ".join(map(described, tensors[:MOST_SHAPES]))
    return told if len(tensors) <= MOST_SHAPES else f"{told}, … ({len(tensors)} tensors)"


def _moved(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> float:
    held = {_storage(tensor) for tensor in inputs} - {0}
    changes = getattr(getattr(func, "_schema", None), "is_mutable", False)
    if getattr(func, "is_view", False) or (outputs and not changes and held.issuperset(map(_storage, outputs))):
        return 0.0
    written = sum(_bytes(tensor) for tensor in _distinct(outputs))
    if torch_flops.name_of(func) in _LOOKS_UP and inputs:
        return 2.0 * written + sum(map(_bytes, inputs[1:]))
    read = sum(_bytes(tensor) for tensor in _distinct(inputs))
    return float(read + written)


def _distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())


def _bytes(tensor: Tensor) -> int:
    """What of a tensor lies in memory: an expanded one is smaller than it looks."""
    if tensor.is_nested or tensor.layout != torch.strided:
        return 0
    size = tensor.numel() * tensor.element_size()
    try:
        return min(size, tensor.untyped_storage().nbytes()) if type(tensor) is Tensor else size
    except _NO_STORAGE:
        return size


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except _NO_STORAGE:
        return 0


_NO_STORAGE = (NotImplementedError, RuntimeError)
"""Sparse tensors, those of torch.func and some subclasses raise one of these."""
