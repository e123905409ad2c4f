"""Distributed tensors of which a process holds several pieces: torch's checkpoints take them for one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard


class InChunks(torch.Tensor):
    """What a process holds of a distributed tensor, as torch.distributed.checkpoint asks for its pieces.

    It is written from where it lies, and read into there.

    Attributes:
        whole: the distributed tensor.
        chunks: by its place in the whole one: each piece, and where it lies in what this process holds.
    """

    whole: DTensor
    chunks: dict[tuple[int, ...], tuple[ChunkStorageMetadata, tuple[slice, ...]]]

    @staticmethod
    def of(tensor: DTensor) -> InChunks:
        found = tensor.to_local().detach().as_subclass(InChunks)
        found.whole, found.chunks = tensor, dict(_chunks(tensor))
        return found

    def size(self) -> torch.Size:  # type: ignore[override]
        """The whole one's, with which torch compares what was written."""
        return self.whole.size()

    def __create_write_items__(self, name: str, _object: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self._held())
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
            for chunk, _ in self.chunks.values()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [chunk for chunk, _ in self.chunks.values()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        assert index.offset is not None, "every piece is asked for by its place"
        return self._held()[self.chunks[tuple(index.offset)][1]]

    def _held(self) -> torch.Tensor:
        return self.whole.to_local().detach()


def in_chunks(state: Mapping[str, Any]) -> dict[str, Any]:
    """A flat state with those tensors that lie in several pieces as `InChunks`."""
    return {name: InChunks.of(value) if _in_pieces(value) else value for name, value in state.items()}


def as_tensors(state: Mapping[str, Any]) -> dict[str, Any]:
    """The reverse."""
    return {name: value.whole if isinstance(value, InChunks) else value for name, value in state.items()}


def _in_pieces(value: Any) -> bool:
    return isinstance(value, DTensor) and any(len(_runs(held)) > 1 for held in _held(value))


def _chunks(tensor: DTensor) -> Iterator[tuple[tuple[int, ...], tuple[ChunkStorageMetadata, tuple[slice, ...]]]]:
    """By its place in the whole: each piece, and where it lies in what this process holds."""
    for runs in itertools.product(*(_runs(held) for held in _held(tensor))):
        offsets, sizes = torch.Size(run[0] for run in runs), torch.Size(run[2] for run in runs)
        yield tuple(offsets), (ChunkStorageMetadata(offsets, sizes), tuple(slice(at, at + n) for _, at, n in runs))


def _held(tensor: DTensor) -> list[torch.Tensor]:
    """By dimension the whole one's indices that this process holds, in its order."""
    found = [torch.arange(length) for length in tensor.shape]
    for dim, placement in enumerate(tensor.placements):
        parts, mine = tensor.device_mesh.size(dim), tensor.device_mesh.get_local_rank(dim)
        if isinstance(placement, (Shard, _StridedShard)):
            blocks = int(placement.split_factor) if isinstance(placement, _StridedShard) else 1
            held = found[placement.dim]
            pieces = [block.chunk(parts)[mine : mine + 1] for block in held.chunk(blocks)]
            found[placement.dim] = torch.cat([held[:0], *itertools.chain.from_iterable(pieces)])
    return found


def _runs(held: torch.Tensor) -> list[tuple[int, int, int]]:
    """Indices that follow each other, as (the first of them, its place among all, how many)."""
    if not len(held):
        return []
    breaks = (held.diff() != 1).nonzero().flatten() + 1
    starts = [0, *breaks.tolist()]
    ends = [*starts[1:], len(held)]
    return [(int(held[start]), start, end - start) for start, end in zip(starts, ends, strict=True)]
