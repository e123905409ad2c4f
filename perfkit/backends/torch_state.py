"""What a torch model holds beside its parameters: buffers, and whatever its own code assigns while it runs."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from perfkit._workload import Workload
from perfkit.backends.torch_surgery import local

_PLAIN = (str, bytes, bool, int, float, complex)
_OF_TORCH = {*vars(nn.Module()), "_compiled_call_impl"}


@contextmanager
def keeping_state(model: nn.Module) -> Iterator[None]:
    """Within it the model may be called; after it buffers and attributes are as before.

    Hidden states, counters, caches and histories that a `forward` assigns count as well as buffers: a model would
    otherwise go on from where measuring left it. What torch's own modules assign is left to them, and so is what is in
    objects of classes that are not known here.
    """
    restore = [step for module in model.modules() for step in _restoring(module)]
    try:
        yield
    finally:
        with torch.no_grad():
            for step in restore:
                step()


def draws_random(work: Workload) -> bool:
    """Whether one run of the model, which is left as it is, takes numbers from torch's random generators."""

    def states() -> list[torch.Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if work.device == "cuda" else ())]

    inputs = work.inputs
    with torch.random.fork_rng(), torch.no_grad(), keeping_state(work.model):
        before = states()
        work.model(*inputs.args, **inputs.kwargs)
        return not all(map(torch.equal, before, states()))


def remembered(module: nn.Module) -> Any:
    """What a module holds beside its parameters and inner modules, for `unchanged` to compare with later."""
    return _noted(module._buffers | _assigned(module))


def _noted(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value, value._version
    if isinstance(value, (list, tuple, deque)):
        return [_noted(item) for item in value]
    if isinstance(value, dict):
        return {key: _noted(item) for key, item in value.items()}
    return value


def unchanged(before: Any, now: Any) -> bool:
    """Whether a module remembers the same.

    A new tensor with a history, such as a computed weight, is none: no later step could go back through it.
    """
    if isinstance(before, tuple) and isinstance(now, tuple):
        (old, version), (new, newest) = before, now
        return version == newest if old is new else new.requires_grad
    if isinstance(before, list) and isinstance(now, list):
        return len(before) == len(now) and all(map(unchanged, before, now))
    if isinstance(before, dict) and isinstance(now, dict):
        return before.keys() == now.keys() and all(unchanged(held, now[key]) for key, held in before.items())
    return before is now or (isinstance(before, _PLAIN) and type(before) is type(now) and before == now)


def _restoring(module: nn.Module) -> Iterator[Callable[[], Any]]:
    yield _kept(module._buffers)
    if type(module).__module__.startswith("torch."):
        return
    before = {name: _kept(value) for name, value in _assigned(module).items()}

    def restore() -> None:
        for name in _assigned(module).keys() - before.keys():
            del vars(module)[name]
        vars(module).update({name: value() for name, value in before.items()})

    yield restore


def _assigned(module: nn.Module) -> dict[str, Any]:
    return {k: v for k, v in vars(module).items() if k not in _OF_TORCH and not k.startswith("_perfkit")}


def _kept(value: Any) -> Callable[[], Any]:
    """A function that gives `value` back with what it holds now: tensors and nested containers keep their identity."""
    if isinstance(value, torch.Tensor):
        held = local(value).detach()
        copy = held.clone()

        def tensor() -> torch.Tensor:
            if held.layout != torch.strided or not torch.equal(held, copy):
                held.copy_(copy)
            return value

        return tensor
    if type(value) in (list, deque):
        items = [_kept(item) for item in value]

        def sequence() -> Any:
            restored = [item() for item in items]
            value.clear()
            value.extend(restored)
            return value

        return sequence
    if type(value) in (dict, OrderedDict, defaultdict):
        entries = {key: _kept(item) for key, item in value.items()}

        def mapping() -> Any:
            restored = {key: item() for key, item in entries.items()}
            value.clear()
            value.update(restored)
            return value

        return mapping
    if type(value) is set:
        members = set(value)

        def unordered() -> Any:
            value.clear()
            value.update(members)
            return value

        return unordered
    return lambda: value
