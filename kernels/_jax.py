"""What the ops share in JAX: where a call runs, and how vmap and sharded programs see a kernel.

JAX knows nothing of a kernel, which is a black box to it. But rows of a batch are independent of each other: vmap of
such a function is the function with more rows, and each device of a sharded program can have some of them.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning

from perfkit._errors import UnsupportedError

Axes = tuple[int | None, ...]
"""The axis of the rows in each argument or result, or in all arrays of it; None where it has no rows, as weights."""


def device_of(x: Array) -> str:
    """Where a call runs: "cpu", "cuda", "rocm" or "tpu". An array inside of a traced program does not know: there it is
    the default device."""
    return default_device() if isinstance(x, jax.core.Tracer) else _named(next(iter(x.devices())))


def default_device() -> str:
    """The same, of the device where programs run unless something else is said."""
    chosen = jax.config.jax_default_device  # None, a device, or the name of a platform
    return _named(jax.devices(chosen)[0] if chosen is None or isinstance(chosen, str) else chosen)


def _named(device: jax.Device) -> str:
    if device.platform != "gpu":
        return device.platform
    return "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"


def processors() -> int:
    """How many processors this process may use: as many threads work in a kernel for CPU."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def alike(arrays: Any) -> Any:
    """All arrays as different on the devices of a shard_map as any of them is; JAX adds up what gradients get of it."""
    axes = frozenset().union(*(_varying(leaf) for leaf in jax.tree.leaves(arrays)))

    def cast(x):
        more = tuple(axes - _varying(x))
        return jax.lax.pcast(x, more, to="varying") if more else x

    return jax.tree.map(cast, arrays) if axes else arrays


def shaped_like(x: Array, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """An array that is as different on the devices of a shard_map as x is."""
    of = jax.typeof(x)
    name = "manual_axis_type" if hasattr(of, "manual_axis_type") else "vma"  # of JAX 0.10.2 and later; before
    return jax.ShapeDtypeStruct(shape, dtype, **{name: getattr(of, name)})


def _varying(x: Array) -> frozenset[str]:
    """The axes of a shard_map along which x differs."""
    of = jax.typeof(x)
    return of.manual_axis_type.varying if hasattr(of, "manual_axis_type") else of.vma


def by_rows(function: Callable[..., tuple], axes: Axes, result_axes: Axes) -> Callable[..., tuple]:
    """`function`, of which vmap maps more rows at once, and a sharded program some rows on each device.

    Args:
        function: takes and returns tuples of arrays, tuples of such, and None. It has no derivative, and no arrays but
            its arguments.
        axes, result_axes: of the rows. A result without is a sum over all rows: devices add theirs up, and vmap, which
            wants a sum for each of what it maps, calls `function` one after the other.
    """
    split = _partitioned(function, axes, result_axes)

    @custom_vmap
    def call(*arguments):
        return split(*arguments)

    @call.def_vmap
    def rule(size, mapped, *arguments):
        rowless = [flags for flags, axis in zip(mapped, axes, strict=True) if axis is None]
        if any(jax.tree.leaves(rowless)) or None in result_axes:
            out = _one_by_one(call, mapped, arguments)
        else:
            folded = [
                argument if axis is None else jax.tree.map(functools.partial(_fold, size, axis), argument, flags)
                for argument, flags, axis in zip(arguments, mapped, axes, strict=True)
            ]
            out = tuple(
                jax.tree.map(functools.partial(_unfold, size, axis), result)
                for result, axis in zip(call(*folded), result_axes, strict=True)
            )
        return out, jax.tree.map(lambda _: True, out)

    @jax.custom_jvp
    def once(*arguments):
        return call(*arguments)

    @once.defjvp
    def _(_arguments, _tangents):
        raise UnsupportedError(
            "a kernel of perfkit.kernels has first derivatives, by jax.grad and jax.vjp, and no others: "
            "implementation='reference' has all of them"
        )

    return once


def _fold(size: int, axis: int, x: Array, mapped: bool) -> Array:
    """The mapped axis, which is axis 0, as part of the rows."""
    x = jnp.moveaxis(x, 0, axis) if mapped else jnp.broadcast_to(jnp.expand_dims(x, axis), _with(x.shape, axis, size))
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _unfold(size: int, axis: int, x: Array) -> Array:
    return jnp.moveaxis(x.reshape(*x.shape[:axis], size, -1, *x.shape[axis + 1 :]), axis, 0)


def _with(shape: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
    return (*shape[:axis], size, *shape[axis:])


def _one_by_one(call: Callable[..., tuple], mapped: Any, arguments: tuple) -> tuple:
    """One call after the other."""
    leaves, structure = jax.tree.flatten(arguments)
    flags = jax.tree.leaves(mapped)

    def one(now):
        now = iter(now)
        given = [next(now) if flag else leaf for leaf, flag in zip(leaves, flags, strict=True)]
        return call(*jax.tree.unflatten(structure, given))

    return jax.lax.map(one, [leaf for leaf, flag in zip(leaves, flags, strict=True) if flag])


def _partitioned(function: Callable[..., tuple], axes: Axes, result_axes: Axes) -> Callable[..., tuple]:
    """`function`, of which a sharded program's partitioner may split the rows and nothing else.

    Without the Shardy partitioner, which JAX can be told not to use, each device computes everything.
    """

    def call(*arguments):
        if not getattr(jax.config, "jax_use_shardy_partitioner", True):
            return function(*arguments)
        leaves, structure = jax.tree.flatten(arguments)
        results = jax.eval_shape(function, *arguments)
        given, wanted = _ranks(arguments, axes), _ranks(results, result_axes)

        def flat(*leaves):
            return tuple(jax.tree.leaves(function(*jax.tree.unflatten(structure, leaves))))

        def partition(mesh, arguments, results):
            shardings = [tuple(each.sharding for each in side) for side in (arguments, results)]
            over = _mesh_axes(shardings[0], given)

            def of_some_rows(*leaves):
                found = zip(flat(*leaves), wanted, strict=True)
                return tuple(jax.lax.psum(x, over) if over and rows is None else x for x, (_, rows) in found)

            return mesh, of_some_rows, shardings[1], shardings[0]

        split = custom_partitioning(flat)
        rule, whole = _sharding_rule(given, wanted)
        split.def_partition(partition, sharding_rule=rule, need_replication_factors=whole)
        return jax.tree.unflatten(jax.tree.structure(results), split(*leaves))

    return call


def _mesh_axes(shardings: tuple[jax.sharding.NamedSharding, ...], ranks: list[tuple[int, int | None]]) -> Any:
    """The axes of the mesh that the rows are split over: a name, several, or none."""
    for sharding, (_, rows) in zip(shardings, ranks, strict=True):
        if rows is not None:
            return sharding.spec[rows] if rows < len(sharding.spec) else None
    return None


def _ranks(arrays: Any, axes: Axes) -> list[tuple[int, int | None]]:
    """How many dimensions each array has, and which one is the rows'."""
    return [
        (len(leaf.shape), axis)
        for argument, axis in zip(arrays, axes, strict=True)
        for leaf in jax.tree.leaves(argument)
    ]


def _sharding_rule(
    arguments: list[tuple[int, int | None]], results: list[tuple[int, int | None]]
) -> tuple[str, tuple[str, ...]]:
    """The rule of `custom_partitioning` in words, and the names in it of what must not be split: all but "rows"."""
    whole: list[str] = []

    def named(rank: int, rows: int | None) -> str:
        names = []
        for axis in range(rank):
            if axis != rows:
                whole.append(f"whole{len(whole)}")
            names.append("rows" if axis == rows else whole[-1])
        return " ".join(names)

    left, right = (", ".join(named(*each) for each in side) for side in (arguments, results))
    return f"{left} -> {right}", tuple(whole)
