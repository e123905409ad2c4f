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
from perfkit.backends.jax_keys import is_key

KEY = "key "


def weights(model: Any, params: Any) -> dict[str, Any]:
    """The arrays of a model's state, or of its parameters, by their paths; of random keys their numbers.

    Raises:
        InvalidInputError: something in it is no array.
    """
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(_state(model, params)):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if not hasattr(leaf, "dtype"):
            raise InvalidInputError(f"params hold a {type(leaf).__name__} at {name}: only arrays can be saved")
        found[name] = jax.random.key_data(leaf) if is_key(leaf) and isinstance(leaf, jax.Array) else leaf
    return found


def with_weights(model: Any, params: Any, held: Mapping[str, jax.Array]) -> tuple[Any, Any]:
    """The model and its parameters with these arrays; an nnx module is copied."""
    leaves, structure = jax.tree.flatten(_state(model, params))
    filled = [
        jax.random.wrap_key_data(array, impl=jax.random.key_impl(leaf)) if is_key(leaf) else array
        for leaf, array in zip(leaves, held.values(), strict=True)
    ]
    state = jax.tree.unflatten(structure, filled)
    if not isinstance(model, nnx.Module):
        return model, state
    model = nnx.clone(model)
    nnx.update(model, state)
    return model, params


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
    save_file({name: np.asarray(array) for name, array in tensors.items()}, path, metadata)


def read(path: Path) -> dict[str, jax.Array]:
    return load_file(path)
