"""A JAX model as a pure function of its parameters and of its other state, whatever it was written in."""

from __future__ import annotations

import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import errors, linen, nnx

from perfkit.backends.jax_inputs import as_written
from perfkit.backends.jax_placement import ONE_DEVICE, Placement

Function = Callable[..., tuple[Any, Any]]
"""`function(params, rest, *args, **kwargs) -> (outputs, new rest)`."""


@dataclass(frozen=True, kw_only=True)
class JaxModel(ABC):
    """What the recipes transform.

    Args:
        original: the caller's module or function; never called with anything but copies of its state.
        params: pytree of what is trained.
        rest: pytree of the other state: running statistics, random keys and counters.
        transforms: applied to the base function, first one innermost.
        ahead: compile the transformed function ahead of time.
        placement: on which devices its state lies, and batches are put.
        reads_numbers: its code needs the values of Python numbers among the inputs: they are settings then.
    """

    original: Any
    params: Any
    rest: Any = ()
    transforms: tuple[Callable[[Function], Function], ...] = ()
    ahead: bool = False
    placement: Placement = ONE_DEVICE
    reads_numbers: bool = False

    more_keywords: ClassVar[tuple[str, ...]] = ()
    """What a call takes by name beside what `signature_of` tells."""

    def then(self, wrap: Callable[[Function], Function]) -> Self:
        """The model with its function wrapped once more."""
        return dataclasses.replace(self, transforms=(*self.transforms, wrap))

    def compiled_ahead(self) -> Self:
        return dataclasses.replace(self, ahead=True)

    def with_state(self, params: Any, rest: Any) -> Self:
        return dataclasses.replace(self, params=params, rest=rest)

    @property
    def untouched(self) -> bool:
        return not self.transforms and not self.ahead

    def function(self) -> Function:
        """The base function with every transform applied."""
        return self.transformed(self.base())

    def transformed(self, function: Function) -> Function:
        for wrap in self.transforms:
            function = wrap(function)
        return function

    @abstractmethod
    def base(self) -> Function:
        """The original as a pure function."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What the caller calls it."""

    def called_once(self, *args: Any, **kwargs: Any) -> tuple[Any, tuple[str, ...]]:
        """The outputs of the original, and what it does with its state that the result will not, in words."""
        return self.base()(self.params, self.rest, *args, **kwargs)[0], ()

    def advice(self, error: Exception) -> str:
        """What to do about an error that a call raised; empty where nothing is known."""
        return ""

    @property
    @abstractmethod
    def signature_of(self) -> tuple[Callable, int]:
        """The callable whose parameters the inputs are, and how many leading ones are not inputs."""


@dataclass(frozen=True, kw_only=True)
class NnxModel(JaxModel):
    """A flax nnx module: `original` is the class, `graphdef` its structure."""

    graphdef: Any

    @classmethod
    def of(cls, module: nnx.Module) -> Self:
        graphdef, params, rest = nnx.split(module, nnx.Param, ...)
        return cls(original=type(module), params=params, rest=rest, graphdef=graphdef)

    def base(self) -> Function:
        return nnx_function(self.original, self.graphdef)

    def module(self) -> nnx.Module:
        """A module of its own with this state."""
        return nnx.merge(self.graphdef, self.params, self.rest, copy=True)

    def called_once(self, *args: Any, **kwargs: Any) -> tuple[Any, tuple[str, ...]]:
        module, (args, kwargs) = self.module(), as_written((args, kwargs))
        outputs = self.original.__call__(module, *args, **kwargs)
        after, before = (dict(nnx.to_flat_state(nnx.state(each))) for each in (module, self.module()))
        added = _named(after.keys() - before)
        trained = (path for path, _ in nnx.to_flat_state(self.params))
        written = _named(path for path in trained if not _holds_same(after[path], before[path]))
        told = (
            f"adds state when it is called, which the result does not keep: {added}" if added else "",
            f"writes to parameters when it is called, and the result leaves them: {written}" if written else "",
        )
        return outputs, tuple(filter(None, told))

    @property
    def name(self) -> str:
        return self.original.__name__

    @property
    def signature_of(self) -> tuple[Callable, int]:
        return self.original.__call__, 1


@dataclass(frozen=True, kw_only=True)
class LinenModel(JaxModel):
    """A flax linen module: `params` is the collection of that name, `rest` the other collections.

    Args:
        bare: it has no such collection, as where all its layers are pools and fixed norms.
    """

    trains: bool = False
    bare: bool = False

    more_keywords = ("rngs", "method")

    def base(self) -> Function:
        def function(params, rest, *args, **kwargs):
            args, kwargs = as_written((args, kwargs))
            variables = {"params": params, **rest}
            if not (self.trains and rest):
                return self.original.apply(variables, *args, **kwargs), rest
            return self.original.apply(variables, *args, mutable=list(rest), **kwargs)

        return function

    def advice(self, error: Exception) -> str:
        if isinstance(error, errors.ModifyScopeVariableError):
            written = re.search(r'collection "(\w+)"', str(error))
            return (
                "It writes to a collection of its variables, as batch norm does in training: for inference leave "
                "train=True out, else pass a function, lambda variables, *inputs: module.apply(variables, *inputs, "
                f"mutable=[{written[1] if written else 'cache'!r}]), with params=variables"
            )
        if self.bare and isinstance(error, _NOT_FOUND):
            return (
                f"params has the collections {sorted(self.rest)}, and no 'params', which linen keeps parameters in: "
                "pass all that module.init(key, *inputs) returned, or params={'params': ...}"
            )
        if isinstance(error, errors.InvalidRngError):
            asked = re.search(r'PRNG for "(\w+)"', str(error))
            keys = f"{{{asked[1] if asked else 'dropout'!r}: key}}"
            return (
                f"Pass its keys by name among the inputs, example_inputs={{'x': x, 'rngs': {keys}}}, or a function of "
                "(variables, *inputs) that makes them"
            )
        return ""

    @property
    def name(self) -> str:
        return type(self.original).__name__

    @property
    def signature_of(self) -> tuple[Callable, int]:
        return type(self.original).__call__, 1


@dataclass(frozen=True, kw_only=True)
class FunctionModel(JaxModel):
    """A plain function: of a parameter pytree and its inputs, or where `params` is None of its inputs alone."""

    def base(self) -> Function:
        def function(params, rest, *args, **kwargs):
            args, kwargs = as_written((args, kwargs))
            leading = () if params is None else (params,)
            return self.original(*leading, *args, **kwargs), rest

        return function

    @property
    def name(self) -> str:
        return getattr(self.original, "__name__", type(self.original).__name__)

    @property
    def signature_of(self) -> tuple[Callable, int]:
        return self.original, int(self.params is not None)


_NOT_FOUND = (
    errors.ScopeParamNotFoundError,
    errors.ScopeCollectionNotFound,
    errors.ApplyScopeInvalidVariablesTypeError,
)
"""What linen raises where parameters are not in their collection."""


def nnx_function(kind: type[nnx.Module], graphdef: Any) -> Function:
    """A call of an nnx module as a pure function; `kind` is the class whose `__call__` it is."""

    def function(params, rest, *args, **kwargs):
        args, kwargs = as_written((args, kwargs))
        module = nnx.merge(graphdef, params, rest, copy=True)  # variables of this trace, so that it may write to them
        outputs = kind.__call__(module, *args, **kwargs)
        return outputs, _known(nnx.split(module, nnx.Param, ...)[2], rest)

    return function


def _named(paths: Iterable[tuple]) -> str:
    return ", ".join(".".join(map(str, path)) for path in sorted(paths, key=str))


def _holds_same(one: Any, other: Any) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(a is b or jnp.array_equal(a, b, equal_nan=True) for a, b in pairs)


def _known(new: nnx.State, rest: nnx.State) -> nnx.State:
    """The state without what a call has added, such as intermediates: a program's state is of one form."""
    known = {path for path, _ in nnx.to_flat_state(rest)}
    flat = nnx.to_flat_state(new)
    if len(flat) == len(known):
        return new
    return nnx.from_flat_state([(path, variable) for path, variable in flat if path in known])


def is_linen(model: Any) -> bool:
    return isinstance(model, linen.Module)
