"""What a caller passes to a JAX model: arrays, and settings that Python code reads. What cannot be used is refused."""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from perfkit._errors import InvalidInputError, UnsupportedError
from perfkit._workload import Inputs

if TYPE_CHECKING:
    from perfkit.backends.jax_model import JaxModel

NUMBERS = (int, float, complex)
_ARRAYS = (jax.Array, jax.ShapeDtypeStruct, np.ndarray, np.generic)
READS_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)
"""What tracing raises where Python reads a value."""
_SETTINGS = (bool, str, bytes, enum.Enum, np.dtype, type, range, slice)


TAKE_APART = (
    "whose arrays and settings are one tree: take them apart, arrays, rest = equinox.partition(model, "
    "equinox.is_inexact_array), and pass the function lambda arrays, *inputs: equinox.combine(arrays, rest)(*inputs) "
    "with params=arrays"
)


@jax.tree_util.register_static
@dataclass(frozen=True)
class Setting:
    """One argument that Python code reads, such as `train=True`: part of a program, and no input of it.

    A tree holds it as a node without leaves, so that whatever maps over, traces or cuts the arrays of a call passes it
    by. Its type is compared as well: True equals 1, but is another setting.
    """

    kind: type
    value: Any


def with_settings(tree: Any, numbers: bool = False) -> Any:
    """`tree` with what is no array as a `Setting`.

    Args:
        numbers: Python numbers too, where the model's own code reads them; else they are traced like arrays.
    """

    def is_setting(leaf: Any) -> bool:
        if isinstance(leaf, _SETTINGS) or (numbers and isinstance(leaf, NUMBERS)):
            return True
        return callable(leaf) and not isinstance(leaf, _ARRAYS)

    if not any(map(is_setting, jax.tree.leaves(tree))):
        return tree
    return jax.tree.map(lambda leaf: Setting(type(leaf), leaf) if is_setting(leaf) else leaf, tree)


def as_written(tree: Any) -> Any:
    """`tree` with the settings as the caller wrote them: what the model's own code is called with."""
    return jax.tree.map(_value, tree, is_leaf=_is_setting)


def _is_setting(node: Any) -> bool:
    return isinstance(node, Setting)


def _value(node: Any) -> Any:
    return node.value if isinstance(node, Setting) else node


def as_inputs(model: JaxModel, example_inputs: Any) -> Inputs:
    """A tuple as positional arguments, a dict as keywords if its keys are the model's parameters, else one argument.

    Settings are marked as such; numpy arrays stay as they are.
    """
    args, kwargs = _arguments(model, example_inputs)
    return Inputs(*with_settings((args, kwargs), model.reads_numbers))


def _arguments(model: JaxModel, example_inputs: Any) -> tuple[tuple, dict]:
    if isinstance(example_inputs, Inputs):
        return example_inputs.args, dict(example_inputs.kwargs)
    if isinstance(example_inputs, tuple) and not hasattr(example_inputs, "_fields"):
        return example_inputs, {}
    if isinstance(example_inputs, Mapping) and _are_keywords(model, example_inputs):
        return (), dict(example_inputs)
    return (example_inputs,), {}


def _are_keywords(model: JaxModel, names: Mapping) -> bool:
    function, leading = model.signature_of
    try:
        parameters = list(inspect.signature(function).parameters.values())[leading:]
    except (TypeError, ValueError):  # a callable that does not tell its parameters
        return False
    kinds = {parameter.kind for parameter in parameters}
    known = {parameter.name for parameter in parameters} | set(model.more_keywords)
    if inspect.Parameter.VAR_KEYWORD in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        needed = {p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD}
        return needed <= set(names)
    return set(names) <= known


@contextmanager
def tracing() -> Iterator[None]:
    """Within it, code that reads the value of what it is traced with gets an error that says what to do.

    Raises:
        UnsupportedError: it does so.
    """
    try:
        yield
    except READS_VALUES as error:
        told = str(error).strip().splitlines()[0]
        raise UnsupportedError(
            "the model's Python code reads the value of an array, which is not known when it is compiled or rewritten "
            f"({type(error).__name__}: {told}): write jax.lax.cond or jnp.where in place of `if`, jax.lax.scan or "
            "while_loop in place of a loop, and bind what never changes with functools.partial"
        ) from error


def called_with_settings(model: JaxModel, run: Callable[[tuple, dict], Any], args: tuple, kwargs: dict) -> Any:
    """`run(args, kwargs)` with what code reads as settings: numbers too, where that shows at a call unlike the first.

    Raises:
        UnsupportedError: it reads the value of an array.
    """
    try:
        return run(*model.placement.batch(with_settings((args, kwargs), model.reads_numbers)))
    except (*READS_VALUES, UnsupportedError) as error:
        reads = isinstance(error.__cause__ or error, READS_VALUES)
        numbers = any(isinstance(leaf, NUMBERS) for leaf in jax.tree.leaves((args, kwargs)))
        with tracing():
            if not (reads and numbers) or model.reads_numbers:
                raise
            return run(*model.placement.batch(with_settings((args, kwargs), True)))


def by_operation(run: Callable, *given: Any) -> Any:
    """`run(*given)` of a model that is not compiled, whose constants `jax.transfer_guard("disallow")` does not refuse.

    They are part of the model, as they are of a compiled program, which the guard does not ask about. What of the
    arguments lies on the host is refused as before.
    """
    if jax.config.jax_transfer_guard_host_to_device != "disallow":
        return run(*given)
    as_arrays(given, (np.ndarray, np.generic, *NUMBERS))
    with jax.transfer_guard_host_to_device("allow"):
        return run(*given)


def checked(inputs: Inputs) -> Inputs:
    """Inputs with numpy arrays as JAX arrays.

    Raises:
        InvalidInputError: an array is empty, or there is something among them that JAX cannot see into.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path((inputs.args, dict(inputs.kwargs))):
        if not isinstance(leaf, (*_ARRAYS, *NUMBERS)) or _is_text(leaf):
            kind = type(leaf).__name__
            if type(leaf).__module__ == "torch":
                raise InvalidInputError(
                    f"example_inputs hold a torch.{kind} ({place_of(path)}): pass JAX or numpy arrays"
                )
            raise InvalidInputError(
                f"example_inputs hold a {kind} ({place_of(path)}), and JAX does not know what arrays are in it: "
                "register the class as a pytree (jax.tree_util.register_dataclass), or pass its arrays"
            )
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise InvalidInputError(f"example_inputs hold a shape without numbers ({place_of(path)}): pass an array")
        if getattr(leaf, "size", 1) == 0:
            raise InvalidInputError(f"example_inputs hold an empty array of shape {list(leaf.shape)}")
    args, kwargs = as_arrays((inputs.args, dict(inputs.kwargs)))
    return Inputs(args, kwargs)


def as_arrays(tree: Any, kinds: tuple[type, ...] = (np.ndarray,)) -> Any:
    """`tree` with what is of these kinds as JAX arrays."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf) if isinstance(leaf, kinds) else leaf, tree)


def checked_params(params: Any) -> Any:
    """Parameters as JAX arrays.

    Raises:
        InvalidInputError: a parameter is no array, has no numbers in it, or some of them are not finite.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if is_equinox(params) and not isinstance(leaf, (*_ARRAYS, *NUMBERS)):
            raise InvalidInputError(f"params is {type(params).__name__}, an equinox module, {TAKE_APART}")
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise InvalidInputError(
                f"parameter {name!r} is a shape without numbers (of jax.eval_shape?): pass initialized parameters"
            )
        if not isinstance(leaf, (*_ARRAYS, *NUMBERS)):
            raise InvalidInputError(
                f"parameter {name!r} is a {type(leaf).__name__}: expected arrays and numbers in params; what the "
                "function needs beside them can be bound to it with functools.partial"
            )
        if jnp.issubdtype(getattr(leaf, "dtype", None), jnp.floating) and (bad := _not_finite(leaf)):
            raise InvalidInputError(
                f"parameter {name!r} holds {bad} NaN or infinite of {leaf.size} values: repair them first"
            )
    return as_arrays(params, (np.ndarray, np.generic, *NUMBERS))


def _not_finite(leaf: Any) -> int:
    """How many; of what lies in this machine's memory by NumPy, which compiles nothing for each shape."""
    if isinstance(leaf, jax.Array) and not (
        leaf.is_fully_addressable and {d.platform for d in leaf.devices()} == {"cpu"}
    ):
        return int(jnp.sum(~jnp.isfinite(leaf)))
    return int(np.sum(~np.isfinite(leaf)))


def is_equinox(value: Any) -> bool:
    return any(
        kind.__module__.partition(".")[0] == "equinox" and kind.__name__ == "Module" for kind in type(value).__mro__
    )


def checked_rest(rest: Any) -> Any:
    """State beside the parameters, as it is.

    Raises:
        InvalidInputError: something in it cannot be traced.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(rest):
        if not isinstance(leaf, (*_ARRAYS, *NUMBERS)) or _is_text(leaf):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            kind = f"array of {leaf.dtype}" if hasattr(leaf, "dtype") else type(leaf).__name__
            raise InvalidInputError(
                f"the model's state holds a {kind} ({name}), which JAX cannot trace: hold it as plain "
                "Python values, a tuple of texts for instance"
            )
    return rest


def _is_text(leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray) and leaf.dtype.kind in "OSU"


def place_of(path: tuple) -> str:
    """Where in (args, kwargs) a leaf is: "argument 0.mask", "mask.left"."""
    where = jax.tree_util.keystr(path[1:], simple=True, separator=".")
    return f"argument {where}" if path[0].idx == 0 else where
