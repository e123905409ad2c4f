"""A mesh of JAX devices, and arrays on it: one program for all of them, for which XLA finds what must be sent."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from perfkit._batch import axis_of, rows_of
from perfkit._errors import InvalidInputError
from perfkit.backends.jax_compile import Program
from perfkit.backends.jax_keys import is_key
from perfkit.backends.jax_placement import Placement
from perfkit.parallel.jax_loop_sums import summed_apart

if TYPE_CHECKING:
    from perfkit.backends.jax_model import Function
    from perfkit.parallel.layout import Layout


def mesh_of(layout: Layout) -> Mesh:
    """JAX's mesh of the chain's layout, over all devices of all processes; XLA decides how results lie on it."""
    return jax.make_mesh(layout.sizes, layout.axes, axis_types=(AxisType.Auto,) * len(layout.axes))


def put(leaf: Any, sharding: Sharding) -> jax.Array:
    """An array as the sharding says. Every process must hold the whole of it, or it lies on all devices already."""
    if isinstance(leaf, jax.Array):
        if leaf.sharding == sharding:
            return leaf
        if not leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding)
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if is_key(leaf):
        return jax.random.wrap_key_data(put(jax.random.key_data(leaf), sharding), impl=jax.random.key_impl(leaf))
    host = np.asarray(leaf)  # each process takes its parts: nothing is sent, as `device_put` would to compare them
    return jax.make_array_from_callback(host.shape, sharding, host.__getitem__)


def replicated(tree: Any, mesh: Mesh) -> Any:
    """The tree with every leaf on every device of the mesh; leaves that lie on the mesh already stay as they lie."""

    def whole(leaf: Any) -> jax.Array:
        sharding = getattr(leaf, "sharding", None)
        on_mesh = isinstance(sharding, NamedSharding) and sharding.mesh == mesh
        return leaf if on_mesh else put(leaf, NamedSharding(mesh, PartitionSpec()))

    return jax.tree.map(whole, tree)


def local(tree: Any) -> Any:
    """Whole arrays as the first device of this process holds them; a tree with sharded ones as it is."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    if not all(leaf.is_fully_replicated for leaf in leaves):
        return tree
    return jax.tree.map(lambda leaf: leaf.addressable_data(0) if isinstance(leaf, jax.Array) else leaf, tree)


def shared_rows(batch: Any, batch_dim: int, parts: int) -> int:
    """Rows of a batch, (args, kwargs) or (args, kwargs, targets): see `rows_of`.

    Raises:
        InvalidInputError: they cannot be shared out evenly.
    """
    rows = rows_of(jax.tree.leaves(batch[:2]), batch_dim, jax.tree.leaves(batch[2:]))
    if rows is None:
        raise InvalidInputError(f"no input has a dimension {batch_dim} to share out: set batch_dim=")
    if rows % parts:
        raise InvalidInputError(
            f"a batch of {rows} rows (dimension {batch_dim}) cannot be shared by {parts} devices evenly: "
            "drop the last batch of an epoch where it is smaller, or fill it up"
        )
    return rows


class OnMesh(Placement):
    """One program over the mesh, written as if for one device.

    Args:
        mesh: the devices.
        batch_dim: the dimension of the inputs that is shared out along "data"; None where every device takes the batch.
    """

    def __init__(self, mesh: Mesh, batch_dim: int | None = None):
        self.mesh, self.batch_dim = mesh, batch_dim

    def state(self, state: Any) -> Any:
        return replicated(state, self.mesh)

    def batch(self, batch: Any) -> Any:
        rows = self.batch_dim is not None and shared_rows(batch, self.batch_dim, self.mesh.shape["data"])

        def of(leaf: Any) -> Any:
            if not isinstance(leaf, (jax.Array, np.ndarray)) or isinstance(leaf, jax.core.Tracer):
                return leaf  # a program of the caller's decides where it lies
            dim = axis_of(leaf.shape, rows, self.batch_dim) if rows else None
            spec = PartitionSpec() if dim is None else PartitionSpec(*(None,) * dim, "data")
            return put(leaf, NamedSharding(self.mesh, spec))

        return jax.tree.map(of, batch)

    def function(self, function: Function) -> Function:
        return function

    def averaged(self, found: Any) -> Any:
        return found  # a loss over the whole batch has the gradients of the whole batch

    def program(self, step: Callable, donate: tuple[int, ...], state: Any) -> Program:
        if self.batch_dim is not None:
            step = self._summed_apart(step)
        lies = jax.tree.map(lambda leaf: leaf.sharding, state)
        whole = NamedSharding(self.mesh, PartitionSpec())
        return Program(step, donate, jit=partial(jax.jit, out_shardings=(lies, whole)))

    def _summed_apart(self, step: Callable) -> Callable:
        def apart(state: Any, *batch: Any) -> Any:
            rows = shared_rows(batch, self.batch_dim, self.mesh.shape["data"])
            return summed_apart(step, self.mesh, rows)(state, *batch)

        return apart

    def held(self, tree: Any) -> Any:
        return local(tree)
