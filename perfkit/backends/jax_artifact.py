"""What a file holds of a JAX model: the arrays of its state by their paths, and those of its inputs, as safetensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.flax import load_file, save_file

from perfkit._errors import InvalidInputError
from perfkit.backends.jax_inputs import NUMBERS
from perfkit.backends.jax_keys import is_key
from perfkit.backends.jax_trees import distinct

KEY = "key "


def weights(model: Any, params: Any) -> dict[str, Any]:
    """The arrays and numbers of a model's state, or of its parameters, by their paths; of random keys their numbers.

    Raises:
        InvalidInputError: something in it is neither.
    """
    pairs = jax.tree_util.tree_leaves_with_path(_state(model, params))
    names = distinct(jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in pairs)
    return {name: _array(name, leaf) for name, (_, leaf) in zip(names, pairs, strict=True)}


def _array(name: str, leaf: Any) -> Any:
    if is_key(leaf):
        return jax.random.key_data(leaf) if isinstance(leaf, jax.Array) else jax.eval_shape(jax.random.key_data, leaf)
    if not (hasattr(leaf, "dtype") or isinstance(leaf, NUMBERS)):
        raise InvalidInputError(f"params hold a {type(leaf).__name__} at {name}: only arrays and numbers can be saved")
    return jnp.asarray(leaf) if isinstance(leaf, NUMBERS) else leaf


def with_weights(model: Any, params: Any, held: Mapping[str, jax.Array]) -> tuple[Any, Any]:
    """The model and its parameters with these arrays; an nnx module is copied."""
    leaves, structure = jax.tree.flatten(_state(model, params))
    state = jax.tree.unflatten(structure, list(map(_as, leaves, held.values())))
    if not isinstance(model, nnx.Module):
        return model, state
    model = nnx.clone(model)
    nnx.update(model, state)
    return model, params


def _as(leaf: Any, array: jax.Array) -> Any:
    """An array in the place of a leaf: Python numbers, and arrays of one, leave the dtype to what they meet."""
    if is_key(leaf):
        return jax.random.wrap_key_data(array, impl=leaf.dtype._impl)  # a shape without numbers tells it nowhere else
    if isinstance(leaf, NUMBERS):
        return array.item()
    return jnp.asarray(array.item()) if leaf.ndim == 0 and getattr(leaf, "weak_type", False) else array


def _state(model: Any, params: Any) -> Any:
    return nnx.state(model) if isinstance(model, nnx.Module) else params


def identity(array: Any) -> Any:
    """Equal for arrays that are the same one, as tied weights are."""
    return id(array)


def form(array: Any) -> str:
    return f"{array.dtype}{list(array.shape)}"


def one(leaf: Any) -> jax.Array | None:
    """A leaf of the inputs as an array of a file; None for what is none."""
    return jnp.asarray(leaf) if isinstance(leaf, (jax.Array, np.ndarray, np.generic)) and not is_key(leaf) else None


def parts(value: Any) -> tuple[str, Iterable] | None:
    return (f"{KEY}{jax.random.key_impl(value)}", [jax.random.key_data(value)]) if is_key(value) else None


def made(kind: str, items: list) -> jax.Array:
    return jax.random.wrap_key_data(*items, impl=kind.removeprefix(KEY))


def beside(_model: Any, leaf: jax.Array) -> jax.Array:
    return leaf


def tensor(array: np.ndarray) -> np.ndarray:
    return np.asarray(array)


def array(tensor: jax.Array) -> np.ndarray:
    return np.asarray(tensor)


def write(path: Path, tensors: Mapping[str, Any], metadata: dict[str, str]) -> None:
    arrays = {name: np.asarray(array) for name, array in tensors.items()}
    for name, array in arrays.items():
        if array.dtype.isbuiltin != 1 and array.dtype != jnp.bfloat16:
            raise InvalidInputError(
                f"{path} cannot be written: {name} is {array.dtype}, which safetensors does not read"
            )
    save_file(arrays, path, metadata)


def read(path: Path) -> dict[str, jax.Array]:
    return load_file(path)
