"""One adapter per framework behind the few verbs in which they differ.

The framework is chosen from the object's type, and only its adapter is imported: an object of a framework cannot exist
before that framework is loaded. The adapters are the only core modules that import torch or jax.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from perfkit._errors import InvalidInputError, missing, nearest
from perfkit.backends.adapter import Backend

FRAMEWORKS = {"torch": "perfkit.backends.torch_backend", "jax": "perfkit.backends.jax_backend"}
REQUIRED = {"torch": ("torch",), "jax": ("jax", "flax", "optax")}


def backend(name: str) -> Backend:
    """The adapter of that framework, imported at first use.

    Raises:
        InvalidInputError: no such framework.
        MissingDependencyError: the framework is not installed.
    """
    if name not in FRAMEWORKS:
        raise InvalidInputError(f"framework {name!r} is not known; {nearest(name, FRAMEWORKS)}")
    for package in REQUIRED[name]:
        if find_spec(package) is None:
            raise missing(package, f"framework {name!r}", extra=name)
    return importlib.import_module(FRAMEWORKS[name]).BACKEND


def of(model: Any, example_inputs: Any = None) -> Backend:
    """The adapter of the framework that `model` belongs to, or for a plain function its inputs.

    Raises:
        InvalidInputError: it belongs to none.
    """
    if isinstance(model, type):
        raise InvalidInputError(f"model is the class {model.__qualname__}: pass an instance of it")
    for kind in type(model).__mro__:
        if (name := _framework(kind)) and kind.__name__ == "Module":
            return backend(name)
    if not callable(model):
        name = next((name for name in ("apply", "apply_fn") if callable(getattr(model, name, None))), "")
        raise InvalidInputError(
            f"model is a {type(model).__module__}.{type(model).__qualname__}: expected a torch.nn.Module, "
            "a flax nnx.Module, a flax linen Module with params=variables, or a JAX function with params=its parameters"
            + (f", such as its .{name}" if name else "")
        )
    frameworks = {_framework(type(model)), *(_framework(type(leaf)) for leaf in leaves_in(example_inputs))} - {None}
    if "torch" in frameworks:
        raise InvalidInputError(
            f"model is a {type(model).__name__} and torch is among its inputs: pass the torch.nn.Module itself, "
            "or put the function into a torch.nn.Module's forward"
        )
    return backend("jax")


def _framework(kind: type) -> str | None:
    return {"torch": "torch", "jax": "jax", "jaxlib": "jax", "flax": "jax"}.get(kind.__module__.partition(".")[0])


def leaves_in(tree: Any) -> Iterator[Any]:
    """What nested lists, tuples and dicts hold; no framework is asked."""
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    if isinstance(tree, (list, tuple)):
        for item in tree:
            yield from leaves_in(item)
    else:
        yield tree
