"""Distributed tensors of which a process holds several pieces, in checkpoints.

torch.distributed.checkpoint takes what a process holds of a DTensor for one piece. Rows taken here and there it would
refuse to write, and others it would read, or send, into their place. `taught` lets it write and read each piece, and
refuse to send them; tensors in one piece go torch's own way.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch.distributed import _state_dict_utils
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor, Shard, _dtensor_spec
from torch.distributed.tensor.placement_types import _StridedShard

from perfkit._errors import UnsupportedError


@lru_cache(maxsize=1)
def taught() -> None:
    """From now on torch's checkpoints of this process know of pieces; nothing else changes."""
    own: Any = DTensor
    handing_out: Any = _state_dict_utils
    write_items, chunk_list = own.__create_write_items__, own.__create_chunk_list__
    tensor_shard, place = own.__get_tensor_shard__, handing_out.compute_local_shape_and_global_offset

    def written(self: DTensor, name: str, given: Any) -> list[WriteItem]:
        return _write_items(self, name) if _in_pieces(self) else write_items(self, name, given)

    def chunks(self: DTensor) -> list[ChunkStorageMetadata]:
        return [chunk for chunk, _ in _pieces(self).values()] if _in_pieces(self) else chunk_list(self)

    def shard(self: DTensor, index: MetadataIndex) -> torch.Tensor:
        if not _in_pieces(self):
            return tensor_shard(self, index)
        assert index.offset is not None, "every piece is asked for by its place"
        return self.to_local()[_pieces(self)[tuple(index.offset)][1]]

    def placed(shape: Any, mesh: Any, placements: Any, *more: Any) -> Any:
        if any(len(_runs(held)) > 1 for held in _held(tuple(shape), mesh, placements)):
            raise UnsupportedError(
                "rank 0's state cannot be handed out to weights that lie in several pieces (queries, keys, values of "
                "one weight): give every process the whole state, and leave broadcast_from_rank0 out"
            )
        return place(shape, mesh, placements, *more)

    own.__create_write_items__, own.__create_chunk_list__, own.__get_tensor_shard__ = written, chunks, shard
    handing_out.compute_local_shape_and_global_offset = placed
    if not hasattr(_dtensor_spec, "_StridedShardNotDecodableError"):  # torch 2.11
        _rows_are_no_order()


def _rows_are_no_order() -> None:
    """torch 2.11 reads every `_StridedShard` as an order of the mesh's dimensions, and raises where it is none.

    From now on it takes such a part for rows here and there, as torch does since 2.12.
    """
    spec: Any = _dtensor_spec.DTensorSpec
    initialized = spec.__post_init__

    def __post_init__(self) -> None:
        if self.use_strided_shard_as_shard_order is None and self.shard_order is None:
            order = self._maybe_convert_StridedShard_to_shard_order(tuple(self.placements), self.mesh)
            self.use_strided_shard_as_shard_order = None if order else False
        initialized(self)

    spec.__post_init__ = __post_init__


def _in_pieces(tensor: DTensor) -> bool:
    return any(len(_runs(held)) > 1 for held in _held(tensor.shape, tensor.device_mesh, tensor.placements))


def _write_items(tensor: DTensor, name: str) -> list[WriteItem]:
    properties = TensorProperties.create_from_tensor(tensor.to_local())
    return [
        WriteItem(
            index=MetadataIndex(name, chunk.offsets),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=tensor.size()),
        )
        for chunk, _ in _pieces(tensor).values()
    ]


def _pieces(tensor: DTensor) -> dict[tuple[int, ...], tuple[ChunkStorageMetadata, tuple[slice, ...]]]:
    """By its place in the whole: each piece, and where it lies in what this process holds."""
    found = {}
    for runs in itertools.product(*map(_runs, _held(tensor.shape, tensor.device_mesh, tensor.placements))):
        offsets, sizes = torch.Size(run[0] for run in runs), torch.Size(run[2] for run in runs)
        found[tuple(offsets)] = ChunkStorageMetadata(offsets, sizes), tuple(slice(at, at + n) for _, at, n in runs)
    return found


def _held(shape: tuple[int, ...], mesh: Any, placements: Any) -> Iterator[torch.Tensor]:
    """By dimension the whole one's indices that this process holds, in its order."""
    found = [torch.arange(length) for length in shape]
    for dim, placement in enumerate(placements):
        if isinstance(placement, (Shard, _StridedShard)):
            parts, mine, held = mesh.size(dim), mesh.get_local_rank(dim), found[placement.dim]
            blocks = int(placement.split_factor) if isinstance(placement, _StridedShard) else 1
            pieces = [block.chunk(parts)[mine : mine + 1] for block in held.chunk(blocks)]
            found[placement.dim] = torch.cat([held[:0], *itertools.chain.from_iterable(pieces)])
    return iter(found)


def _runs(held: torch.Tensor) -> list[tuple[int, int, int]]:
    """Indices that follow each other, as (the first of them, its place among all, how many)."""
    if not len(held):
        return []
    starts = [0, *((held.diff() != 1).nonzero().flatten() + 1).tolist()]
    ends = [*starts[1:], len(held)]
    return [(int(held[start]), start, end - start) for start, end in zip(starts, ends, strict=True)]
