"""Calls of layers that wait until something of their output is read, and then go as far as is read.

What a recurrent layer returns is a tensor that knows its shape alone. Of one that reads single steps of single rows,

    hidden[torch.arange(B), lengths - 1]    hidden.gather(1, steps)    torch.take_along_dim(hidden, steps, 1)

the layer computes each row up to the last step of it that is read, by a packed sequence. Where it is the library's,
which is slower on packed ones, it computes all rows up to the last step of any. So does a layer that feeds it, and an
embedding looks up no more than that. Whatever else is done with the tensor has the layer computed as it was called.
Nothing waits beyond the call of the model that `settling` is around. Who reads what: `torch_deferred_reads.py`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from perfkit._errors import UnsupportedError
from perfkit.backends.torch_deferred_reads import READERS
from perfkit.backends.torch_surgery import map_tensors

if TYPE_CHECKING:
    from perfkit.backends.torch_waiting import Waiting

OF_SHAPE = {
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.__len__,
    Tensor.shape.__get__,
    Tensor.ndim.__get__,
    Tensor.device.__get__,
}
"""Functions that look at a tensor's shape, or at where it is."""


class _State(threading.local):
    """The tensors that wait in this thread, weakly; None where none may."""

    waiting: list[weakref.ref[Deferred]] | None = None


_state = _State()


class Deferred(Tensor):
    """Output or state of a layer that has not computed it; any use has it computed, but for a look at its shape.

    Args:
        call: the layer's call.
        part: which of its results.
        shape: its shape.
    """

    call: Waiting
    part: int

    @staticmethod
    def __new__(cls, call: Waiting, part: int, shape: tuple[int, ...]) -> Deferred:
        trains = torch.is_grad_enabled()
        made = Tensor._make_wrapper_subclass(cls, shape, device=call.x.device, requires_grad=trains)
        made.call, made.part = call, part
        if trains:
            with torch._C.DisableTorchFunctionSubclass():
                made.register_hook(_lost)
        if _state.waiting is not None:
            _state.waiting.append(weakref.ref(made))
        return made

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in OF_SHAPE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        reader = READERS.get(func)
        if reader is not None and args and type(args[0]) is cls and args[0].part == 0:
            found = reader(*args, **(kwargs or {}))
            if found is not None:
                return found
        args, kwargs = computed((args, kwargs or {}), _name(func))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = computed((args, kwargs or {}), str(func))
        return func(*args, **kwargs)


def _lost(_gradient: Tensor) -> None:
    """Gradients go to what is computed, but from where torch asks no subclass, as in autograd's functions of one's own.

    Raises:
        UnsupportedError: always.
    """
    raise UnsupportedError(
        "skip_padding: a gradient came to an output that had not been computed when a function of autograd's own, or "
        "TorchScript, was called with it: leave the layer out, skip_padding(exclude=[…])"
    )


def computed(tree: Any, why: str) -> Any:
    """`tree` with what waits in it computed whole."""
    return map_tensors(lambda each: each.call.whole(each.part, why) if type(each) is Deferred else each, tree)


def may_anything_wait() -> bool:
    """Whether this thread is within `settling`."""
    return _state.waiting is not None


def settling(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`call(*args, **kwargs)`, within which calls may wait; what still does at its end is computed."""
    if _state.waiting is not None:
        return call(*args, **kwargs)
    _state.waiting = waiting = []
    try:
        out = call(*args, **kwargs)
        left = [each for each in (reference() for reference in waiting) if each is not None]
        for each in left:
            each.call.whole(each.part, "what the model returns or keeps")
        return computed(out, "what the model returns") if left else out
    finally:
        _state.waiting = None


def _name(func: Callable) -> str:
    """A function as reports name it."""
    name = getattr(func, "__name__", str(func))
    owner = getattr(func, "__self__", None)
    return getattr(owner, "__name__", name) if name == "__get__" else name
