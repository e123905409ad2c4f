"""Modules and phases in the names of XLA's operations.

A scope "{encoder.0}" around a module's call, and "{:loss}" around a phase, stand in the `op_name` of everything that
was traced within, also after differentiation: "jit(step)/transpose(jvp({encoder.0}))/dot_general".
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax
from flax import linen, nnx

from perfkit.backends.jax_model import Function, JaxModel, LinenModel, NnxModel

PRODUCTS = frozenset({"dot_general", "conv_general_dilated"})

_MARK = re.compile(r"\{(:?)([^{}:]*)\}")
_INNER_FUNCTION = re.compile(r"/jit\((\w+)\)[^{}]*$")
_FUNCTION = re.compile(r"^jit\((\w+)\)/[^/{}]*$")
_TRANSFORMED = re.compile(r"^(?:(?:jvp|transpose|vmap)\()*(.*?)\)*$")


@dataclass(frozen=True)
class Place:
    """Where in the model an operation stands.

    Args:
        module: path of the innermost module; "" outside of all.
        phase: "forward", "loss", "backward", "optimizer" or "other".
        primitive: what JAX calls the operation, or the function of its library within which it stands: "relu"; "" where
            XLA made it up.
    """

    module: str = ""
    phase: str = "other"
    primitive: str = ""


@dataclass
class Called:
    """A module that was called while the model was traced, or ran.

    Attributes:
        kind: its class.
        calls: how often; within a loop once.
        output_bytes: what one call returns.
    """

    kind: str
    calls: int = 0
    output_bytes: float = 0.0


@dataclass(frozen=True)
class Marked:
    """A model whose modules leave their marks, and what it is known by then."""

    model: JaxModel
    called: dict[str, Called] = field(default_factory=dict)


def marked(model: JaxModel) -> Marked:
    """The same model on the same state, with every call of a module in a scope of its own.

    nnx modules get subclasses of their classes that open the scope; linen's calls are intercepted; a plain function has
    the scopes that its author gave it.
    """
    called: dict[str, Called] = {}
    if isinstance(model, NnxModel):
        module = model.module()
        for path, node in list(nnx.iter_modules(module)):
            if callable(node):
                node.__class__ = _scoped(type(node), ".".join(map(str, path)), called)
        graphdef = nnx.split(module, nnx.Param, ...)[0]
        return Marked(dataclasses.replace(model, original=type(module), graphdef=graphdef), called)
    if isinstance(model, LinenModel):
        return Marked(model.then(lambda function: _intercepted(function, called)), called)
    return Marked(model, called)


def place(op_name: str, trains: bool, scopes: frozenset[str] = frozenset(), *, alone: bool = False) -> Place:
    """Where an operation stands, by its name.

    Args:
        op_name: "jit(step)/jvp({fc1})/dot_general".
        trains: whether the program is a training step; else all of it is forward.
        scopes: names of the author's own scopes, which count as modules where there are no marks.
        alone: whether the program is no more than one function of JAX's library: "jit(relu)/max".
    """
    marks = _MARK.findall(op_name)
    modules = [name for phase, name in marks if not phase]
    phases = [name for phase, name in marks if phase]
    *within, primitive = op_name.split("/")
    if modules:
        module = modules[-1]
    else:
        module = ".".join(name for part in within if (name := _TRANSFORMED.sub(r"\1", part)) in scopes)
    if not trains:
        phase = "forward"
    elif "optimizer" in phases:
        phase = "optimizer"
    elif "transpose(" in op_name:
        phase = "backward"
    elif phases:
        phase = phases[-1]
    else:
        phase = "forward" if modules or "jvp(" in op_name else "other"
    function = _INNER_FUNCTION.search(op_name) or (_FUNCTION.search(op_name) if alone else None)
    if function and primitive not in PRODUCTS:
        primitive = function[1].lstrip("_")
    return Place(module, phase, _MARK.sub("", primitive))


@contextmanager
def _open(path: str):
    name = f"{{{path}}}"
    with jax.named_scope(name), jax.profiler.TraceAnnotation(name):
        yield


def _scoped(base: type, path: str, called: dict[str, Called]) -> type:
    def __call__(self, *args, **kwargs):
        with _open(path):
            outputs = base.__call__(self, *args, **kwargs)
        _note(called, path, base.__name__, outputs)
        return outputs

    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (base,), {**names, "__call__": __call__})


def _intercepted(function: Function, called: dict[str, Called]) -> Function:
    def intercept(method: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        if context.method_name != "__call__":
            return method(*args, **kwargs)
        path = ".".join(context.module.path)
        with _open(path):
            outputs = method(*args, **kwargs)
        _note(called, path, type(context.module).__name__, outputs)
        return outputs

    def run(params, rest, *args, **kwargs):
        with linen.intercept_methods(intercept):
            return function(params, rest, *args, **kwargs)

    return run


def _note(called: dict[str, Called], path: str, kind: str, outputs: Any) -> None:
    item = called.setdefault(path, Called(kind))
    item.calls += 1
    leaves = jax.tree.leaves(outputs)
    item.output_bytes = float(sum(leaf.size * leaf.dtype.itemsize for leaf in leaves if hasattr(leaf, "dtype")))
