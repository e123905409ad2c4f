"""Changing a copied module without changing what it is: its class is replaced by a subclass of itself.

`isinstance`, `state_dict` keys, attributes and `copy.deepcopy` stay as they were; only `forward` (what torch.compile
traces) or `__call__` (what stands outside of it) does more than before. FSDP2 does the same to the modules it shards.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import pickle
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from perfkit._errors import InvalidInputError
from perfkit.backends.torch_containers import refilled, replaced

COMPILED_WITH = "_perfkit_compiled_with"
FIXED_SHAPES = "_perfkit_fixed_shapes"
"""Marks classes whose modules torch.compile can only compile for one shape at a time."""

INTEGER = "_perfkit_integer"
"""Marks the classes of layers on integer weights, whose `weight` is what these stand for, in float32."""

INTEGER_RNN = "_perfkit_int8"
"""Marks the classes of recurrent modules on integer weights, which call a kernel."""

WHOLE = "_perfkit_whole"
"""On the classes of layers on integers: whether they are calls of perfkit's kernels in compiled programs."""

ELSEWHERE = "_perfkit_elsewhere"
"""On a model of which this process holds a part: how many parameters others hold."""

WRAPPED = "_perfkit_wrapped"
"""On classes that `around_forward` made: the class below, and what its forward was wrapped in."""

ROUNDS = "_perfkit_rounds"
"""On the classes of modules that round what comes in and what goes out: the function that does it."""

NOT_PICKLED = (
    "an optimized {} is of a class that was made at run time, which cannot be pickled: result.save(path, model, …) "
    "writes a file that perfkit.load makes it of again. Or save its state_dict() and the result's .recipe: where they "
    "are loaded, perfkit.apply(model, recipe, …) makes it of the original again, and takes the state_dict"
)

_numbers = itertools.count()

APART = {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}
"""Has each model's programs counted for themselves against torch's limit (torch 2.13; 2.11 knows no such thing).

Without, the parts of a model behind a graph break, and functions that it calls there, share their eight programs with
all models that go through the same code, and what comes after the eighth runs eagerly.
"""


def derive(module: nn.Module, **members: Any) -> type[nn.Module]:
    """Give `module` a subclass of its class with these members; returns the class it had.

    torch.compile keeps its programs by code object and goes back to eager after eight of them, so each method gets a
    code object of its own name (equal ones are one to Python): else the ninth model that went through the same recipe
    would silently not be compiled.
    """
    base = type(module)
    for name, member in members.items():
        if isinstance(member, types.FunctionType):
            member.__code__ = member.__code__.replace(co_name=f"{name}_{next(_numbers)}")
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    copying = {"__reduce_ex__": _reduced}
    if hasattr(base, "__deepcopy__"):
        copying["__deepcopy__"] = _keeping_class(base.__deepcopy__)
    module.__class__ = type(base.__name__, (base,), names | copying | members)
    return base


class _Blank:
    """Makes an empty module of a class made at run time, for deepcopy to fill; pickle is told of another way."""

    def __init__(self, kind: type[nn.Module]):
        self.kind = kind

    def __call__(self) -> nn.Module:
        return self.kind.__new__(self.kind)

    def __reduce__(self):
        raise pickle.PicklingError(NOT_PICKLED.format(self.kind.__name__))


def _reduced(self: nn.Module, _protocol: int) -> tuple:
    return _Blank(type(self)), (), self.__getstate__()


def _keeping_class(deepcopy: Callable) -> Callable:
    """A `__deepcopy__` of the model's own, that may make a module of the class that it knows."""

    def __deepcopy__(self, memo):
        twin = deepcopy(self, memo)
        twin.__class__ = type(self)
        if options := getattr(type(self), COMPILED_WITH, None):
            twin.compile(**options, **APART)
        return twin

    return __deepcopy__


def on_grid(thing: Any) -> bool:
    """Whether it is a layer on integer weights whose input is rounded to a grid that is known beforehand."""
    return isinstance(thing, nn.Module) and getattr(type(thing), INTEGER, False) and "input_grid" in vars(thing)


def around_forward(module: nn.Module, wrap: Callable[[Callable], Callable]) -> None:
    """`forward(module, *args, **kwargs)` becomes `wrap(forward)`, inside of what torch.compile traces.

    Functions of the module, not bound methods: after a graph break torch.compile looks a bound method up by its name
    again, and would find the wrapper in place of what it wraps.
    """
    base = type(module)
    derive(module, forward=wrap(base.forward), **{WRAPPED: (base, wrap)})


def unwrapped(module: nn.Module) -> tuple[type[nn.Module], tuple[Callable[[Callable], Callable], ...]]:
    """The module's class below what `around_forward` put around it; and that, outermost first."""
    kind, wraps = type(module), []
    while WRAPPED in vars(kind):
        kind, wrap = vars(kind)[WRAPPED]
        wraps.append(wrap)
    return kind, tuple(wraps)


def wrapped(call: Callable, wraps: Iterable[Callable[[Callable], Callable]]) -> Callable:
    """`call(module, *args, **kwargs)` within what `unwrapped` told."""
    for wrap in reversed(tuple(wraps)):
        call = wrap(call)
    return call


def around_call(module: nn.Module, context: Callable[[], AbstractContextManager]) -> None:
    """Every call of `module` runs within `context()`, outside of what torch.compile traces."""
    base = type(module)

    def __call__(self, *args, **kwargs):
        with context():
            return base.__call__(self, *args, **kwargs)

    derive(module, __call__=__call__)


def compile_in_place(module: nn.Module, **options: Any) -> None:
    """`module.compile(**options)` on a `forward` and a count of its own; what is copied from it is compiled again."""
    base = type(module)

    def forward(self, *args, **kwargs):
        return base.forward(self, *args, **kwargs)

    def __setstate__(self, state):
        base.__setstate__(self, state)
        self.compile(**options, **APART)

    derive(module, forward=forward, __setstate__=__setstate__, **{COMPILED_WITH: options})
    module.compile(**options, **APART)


def settle_forward(module: nn.Module) -> None:
    """Move a `forward` that was assigned to an instance, and would hide the class's, into a class of its own.

    Raises:
        InvalidInputError: it is a function that may go on using the original's weights after a copy.
    """
    for name, part in module.named_modules():
        assigned = vars(part).get("forward")
        if assigned is None:
            continue
        if getattr(assigned, "__self__", None) is not part:
            raise InvalidInputError(
                f"forward of {name or type(module).__name__} was assigned to the instance and is no method of it: "
                "a copy would go on using the original's weights. Define forward in a subclass instead"
            )
        del part.forward
        derive(part, forward=assigned.__func__)


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], tree: Any) -> Any:
    """`tree` with `function` applied to each tensor: through tuples, lists, dicts, dataclasses and packed sequences."""
    if isinstance(tree, torch.Tensor):
        return function(tree)
    if type(tree) in (tuple, list):  # at once: what else it may be takes microseconds to find out
        return type(tree)([map_tensors(function, value) for value in tree])
    if type(tree) is dict:
        return {key: map_tensors(function, value) for key, value in tree.items()}
    if isinstance(tree, PackedSequence):
        return with_data(tree, function(tree.data))
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        fields = {item.name: getattr(tree, item.name) for item in dataclasses.fields(tree) if item.init}
        return replaced(tree, {name: map_tensors(function, value) for name, value in fields.items()})
    if isinstance(tree, Mapping):
        return refilled(tree, {key: map_tensors(function, value) for key, value in tree.items()})
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)._make(map_tensors(function, value) for value in tree)
    if isinstance(tree, (list, tuple)):
        return type(tree)(map_tensors(function, value) for value in tree)
    return tree


def with_data(packed: PackedSequence, data: torch.Tensor) -> PackedSequence:
    """The packed sequence with other numbers; by its constructor: torch.compile loses what `_replace` fills in."""
    return PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)


def tensors_in(tree: Any) -> Iterator[torch.Tensor]:
    """The tensors in `tree`, in order."""
    found: list[torch.Tensor] = []
    map_tensors(lambda tensor: found.append(tensor) or tensor, tree)
    return iter(found)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor: its part of a distributed one, else all of it."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def is_composed(tensor: torch.Tensor) -> bool:
    """Whether its numbers are computed from other tensors: a subclass such as a quantized one."""
    return hasattr(tensor, "__tensor_flatten__")


_BY_ROWS, _BY_COLUMNS = ("crow_indices", "col_indices", "values"), ("ccol_indices", "row_indices", "values")
_SPARSE = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: _BY_ROWS,
    torch.sparse_bsr: _BY_ROWS,
    torch.sparse_csc: _BY_COLUMNS,
    torch.sparse_bsc: _BY_COLUMNS,
}
"""By layout, the methods that tell what sparse tensors are made of."""


def parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors that a tensor is made of: itself, or those within a subclass or a sparse one."""
    tensor = local(tensor)
    if tensor.layout in _SPARSE:
        return [getattr(tensor, name)() for name in _SPARSE[tensor.layout]]
    if not is_composed(tensor):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in parts(getattr(tensor, name))]


def cast(tree: Any, dtype: torch.dtype, only: tuple[torch.dtype, ...] | None = None) -> Any:
    """`tree` with its floating-point tensors (those of the dtypes in `only`) in `dtype`."""

    def one(tensor: torch.Tensor) -> torch.Tensor:
        wanted = tensor.is_floating_point() if only is None else tensor.dtype in only
        return tensor.to(dtype) if wanted else tensor

    return map_tensors(one, tree)


def in_float64(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> tuple[nn.Module, tuple, Mapping[str, Any]]:
    """The model, which is changed, and what it is called with in float64, what is complex in complex128."""
    model._apply(_widened)
    for module in model.modules():
        own = {name: value for name, value in vars(module).items() if isinstance(value, torch.Tensor)}
        vars(module).update(map_tensors(_widened, own))  # used like buffers, but never registered
    return model, *map_tensors(_widened, (args, kwargs))


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    numbers = tensor.is_floating_point() or tensor.is_complex()
    return widened(tensor) if numbers else tensor


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """In float64, what is complex in complex128."""
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
