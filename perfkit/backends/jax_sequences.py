"""Which dimensions of a JAX model's inputs are time and batch: loops over time tell, else what depends on what."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from perfkit._batch import Mixing, axis_of
from perfkit._workload import Workload
from perfkit.backends.jax_autocast_rules import equations, scan_sizes
from perfkit.backends.jax_keys import is_key


def sequences_seen(work: Workload) -> set[tuple[int, int]]:
    """(steps, rows) of what the model's loops over time read; none of a model that cannot be traced."""
    model, inputs = work.model, work.inputs
    try:
        traced = jax.make_jaxpr(model.function())(model.params, model.rest, *inputs.args, **inputs.kwargs)
    except Exception:  # whatever code raises that needs the value of something it is not told
        return set()
    return set(_loops(traced))


def _loops(jaxpr: Any) -> Iterator[tuple[int, int]]:
    """Of each loop that reads rows step by step and carries as many from step to step; or reads a sequence alone."""
    for eqn in equations(jaxpr):
        if eqn.primitive.name == "scan":
            fixed, carried = scan_sizes(eqn.params)
            shapes = [atom.aval.shape for atom in eqn.invars[fixed:]]
            rows = {shape[0] for shape in shapes[:carried] if shape}
            read = shapes[carried:]
            batches = [shape[:2] for shape in read if len(shape) > 1 and shape[1] in rows]
            yield from batches
            if carried and not batches and all(len(shape) < 3 for shape in read):  # layers' weights have three
                yield eqn.params["length"], 0


def mixing_seen(work: Workload, outputs: Any) -> Callable[[int, int], Mixing | None]:
    """Tells what becomes of the entries of an input along a dimension: the first and last ones are replaced by others.

    Args:
        outputs: of the model as it was bound, on its own inputs.
    """
    leaves, structure = jax.tree.flatten((work.inputs.args, dict(work.inputs.kwargs)))
    arrays = [at for at, leaf in enumerate(leaves) if isinstance(leaf, (jax.Array, np.ndarray))]
    before = _numbers(outputs)

    def mixing(number: int, dim: int) -> Mixing | None:
        at = arrays[number]
        last = leaves[at].shape[dim] - 1

        def stays(*ends: int) -> bool:
            """Whether outputs change in the entries alone that the input was changed in."""
            taken = np.arange(last + 1)
            taken[list(ends)] = [others[end] for end in ends]
            given = [*leaves[:at], jnp.take(leaves[at], taken, axis=dim), *leaves[at + 1 :]]
            args, kwargs = jax.tree.unflatten(structure, given)
            after = _numbers(work.model.called_once(*args, **kwargs)[0])
            return all(_changed(*pair, last + 1, dim) <= set(ends) for pair in zip(before, after, strict=True))

        try:
            others = {end: _unlike(leaves[at], end, dim) for end in (0, last)}
            if last == 0 or None in others.values():
                return None
            if stays(0, last):
                return Mixing.APART
            return Mixing.IN_ORDER if stays(0) != stays(last) else Mixing.ANY
        except Exception:  # whatever code raises on other inputs, or that needs numbers which lie elsewhere
            return None

    return mixing


def _numbers(outputs: Any) -> list[np.ndarray]:
    arrays = [leaf for leaf in jax.tree.leaves(outputs) if isinstance(leaf, (jax.Array, np.ndarray))]
    return [np.asarray(leaf) for leaf in arrays if not is_key(leaf)]


def _unlike(leaf: Any, index: int, dim: int) -> int | None:
    """An entry that differs from the one at `index`; None where all are the same."""
    entries = np.moveaxis(np.asarray(leaf), dim, 0)
    unlike = np.flatnonzero((entries != entries[index]).reshape(len(entries), -1).any(axis=1))
    return int(unlike[0]) if len(unlike) else None


def _changed(before: np.ndarray, after: np.ndarray, count: int, dim: int) -> set[int]:
    """In which of `count` entries two outputs differ by more than rounding; -1 stands for all that are not along `dim`.

    A scalar, such as a loss, says nothing.
    """
    if before.ndim == 0:
        return set()
    first, second = (
        array.astype(np.complex128 if array.dtype.kind == "c" else np.float64) for array in (before, after)
    )
    size = float(np.abs(first[np.isfinite(first)]).max(initial=0))
    differs = ~np.isclose(first, second, rtol=1e-5, atol=1e-6 * size, equal_nan=True)
    axis = axis_of(before.shape, count, dim)
    if axis is None:
        return {-1} if differs.any() else set()
    return set(np.flatnonzero(np.moveaxis(differs, axis, 0).reshape(count, -1).any(axis=1)).tolist())
