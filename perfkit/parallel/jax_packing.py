"""The parameters of stages that differ, packed into arrays with one row for each stage."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from perfkit.parallel.jax_inlined import Part


@dataclass(frozen=True)
class Packing:
    """Where everything is.

    Args:
        whole: the parameters' tree, without numbers.
        parts: what its leaves were taken apart into: number of the leaf, and row where it is a stack of blocks.
        owned: numbers of the parts that each stage has.
        shares: into how many equal shares a row can be cut.
    """

    whole: Any
    parts: tuple[Part, ...]
    owned: tuple[tuple[int, ...], ...]
    shares: int = 1

    @cached_property
    def forms(self) -> list[jax.ShapeDtypeStruct]:
        """Of each part."""
        leaves = jax.tree.leaves(self.whole)
        return [
            jax.ShapeDtypeStruct(leaves[index].shape[row is not None :], leaves[index].dtype)
            for index, row in self.parts
        ]

    @property
    def dtypes(self) -> list[str]:
        return list(dict.fromkeys(str(form.dtype) for form in self.forms))

    def slices(self, stage: int) -> dict[int, tuple[str, int, int]]:
        """Where in its row each parameter of a stage is: dtype, start and end."""
        found, ends = {}, dict.fromkeys(self.dtypes, 0)
        for index in self.owned[stage]:
            name, size = str(self.forms[index].dtype), math.prod(self.forms[index].shape)
            found[index] = name, ends[name], ends[name] + size
            ends[name] += size
        return found

    def width(self, dtype: str) -> int:
        """Numbers in a row of a dtype: those of the stage that has most, and more where that cannot be shared."""
        ends = (
            end for stage in range(len(self.owned)) for name, _, end in self.slices(stage).values() if name == dtype
        )
        return -(-max(ends) // self.shares) * self.shares

    def rows(self, params: Any) -> dict[str, np.ndarray]:
        """Parameters, or what is shaped like them, packed: by dtype one row for each stage."""
        whole = [np.asarray(leaf) for leaf in jax.tree.leaves(params)]
        parts = [whole[index] if row is None else whole[index][row] for index, row in self.parts]
        where = [self.slices(stage) for stage in range(len(self.owned))]
        packed = {}
        for dtype in self.dtypes:
            rows = np.zeros((len(where), self.width(dtype)), jnp.dtype(dtype))
            for stage, each in enumerate(where):
                for index, (name, start, end) in each.items():
                    if name == dtype:
                        rows[stage, start:end] = parts[index].ravel()
            packed[dtype] = rows
        return packed

    def unpacked(self, packed: dict[str, jax.Array]) -> Any:
        """The parameters' tree again."""
        parts: dict[int, Any] = {}
        for stage in range(len(self.owned)):
            parts |= self.weights(stage, {dtype: rows[stage] for dtype, rows in packed.items()})
        leaves: dict[int, Any] = {}
        for number, (index, row) in enumerate(self.parts):
            if row is None:
                leaves[index] = parts[number]
            else:
                leaves.setdefault(index, []).append(parts[number])
        whole = [jnp.stack(leaf) if isinstance(leaf, list) else leaf for leaf in leaves.values()]
        return jax.tree.unflatten(jax.tree.structure(self.whole), whole)

    def weights(self, stage: int, row: dict[str, Any]) -> dict[int, Any]:
        """A stage's parts by their numbers, of its row by dtype.

        Cut in one operation: its derivative puts the parts' gradients side by side once, where those of slices are each
        filled up to the whole row and added.
        """
        found = {}
        for dtype in self.dtypes:
            mine = [index for index in self.owned[stage] if str(self.forms[index].dtype) == dtype]
            sizes = [math.prod(self.forms[index].shape) for index in mine]
            pieces = lax.split(row[dtype], [*sizes, row[dtype].size - sum(sizes)])
            found |= {index: piece.reshape(self.forms[index].shape) for index, piece in zip(mine, pieces, strict=False)}
        return found

    @cached_property
    def slots(self) -> tuple[tuple[str, int], ...]:
        """Dtype and size of arrays that hold any stage's parts: the largest in the first, the next in the second."""
        found = []
        for dtype in self.dtypes:
            sizes = [[self._size(index) for index in self._sorted(stage, dtype)] for stage in range(len(self.owned))]
            found += [(dtype, max(each)) for each in itertools.zip_longest(*sizes, fillvalue=0)]
        return tuple(found)

    def _sorted(self, stage: int, dtype: str) -> list[int]:
        """A stage's parts of a dtype, the largest first."""
        mine = [index for index in self.owned[stage] if str(self.forms[index].dtype) == dtype]
        return sorted(mine, key=self._size, reverse=True)

    def _size(self, index: int) -> int:
        return math.prod(self.forms[index].shape)

    def bytes_of(self, index: int) -> int:
        """Bytes of a part."""
        return self._size(index) * self.forms[index].dtype.itemsize

    def _filled(self, stage: int) -> list[int | None]:
        """Of each slot the part that a stage has there."""
        parts = {dtype: iter(self._sorted(stage, dtype)) for dtype in self.dtypes}
        return [next(parts[dtype], None) for dtype, _ in self.slots]

    def spread(self, stage: int, row: dict[str, jax.Array]) -> list[jax.Array]:
        """A stage's row in slots."""
        weights, found = self.weights(stage, row), []
        for index, (dtype, size) in zip(self._filled(stage), self.slots, strict=True):
            flat = jnp.zeros(0, dtype) if index is None else weights[index].ravel()
            found.append(jnp.pad(flat, (0, size - flat.size)))
        return found

    def in_slots(self, stage: int, slots: Sequence[jax.Array]) -> dict[int, jax.Array]:
        """A stage's parts by their numbers: one that is as large as its slot is taken as it lies there."""
        return {
            index: slot[: self._size(index)].reshape(self.forms[index].shape)
            for index, slot in zip(self._filled(stage), slots, strict=True)
            if index is not None
        }

    def added(self, stage: int, slots: Sequence[jax.Array], parts: Mapping[int, jax.Array]) -> list[jax.Array]:
        """Slots with a stage's parts, by number, added to what they hold."""
        return [
            slot if index is None else _added_in_front(slot, parts[index].ravel())
            for index, slot in zip(self._filled(stage), slots, strict=True)
        ]


def _added_in_front(slot: jax.Array, part: jax.Array) -> jax.Array:
    if slot.size == part.size:
        return slot + part
    return lax.dynamic_update_slice(slot, slot[: part.size] + part, (0,))
