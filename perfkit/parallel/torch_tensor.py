"""Tensor parallelism in torch: each process holds a part of the layers' weights, as DTensors.

A layer split by columns computes some of its outputs, and they are gathered. Where they reach one other linear layer
through elementwise functions alone, that one is split by rows: it takes them as they are, and its sums are added up. In
between they are DTensors, which compute what the whole would give, or raise: a forward that takes another way than on
the example inputs is not silently wrong. Attention is split by heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from torch.distributed.tensor.parallel import parallelize_module

from perfkit._errors import UnsupportedError
from perfkit._report import Effect
from perfkit._workload import Workload
from perfkit.backends.torch_encoder import leave_short_cuts
from perfkit.parallel.spread import Spread, split_in_words
from perfkit.parallel.torch_by_heads import by_heads
from perfkit.parallel.torch_mesh import alike, follow, mesh_of
from perfkit.parallel.torch_plan import Split, plan
from perfkit.parallel.torch_split import draw_alike, drop_alike

if TYPE_CHECKING:
    from perfkit.recipes.tensor_parallel import TensorParallel


def tensor_parallel(work: Workload, recipe: TensorParallel) -> tuple[Workload, Effect]:
    """Each process holds a part of the weights; inputs and outputs are whole on every one.

    Raises:
        UnsupportedError: the optimizer has state, or losses are scaled.
        InvalidInputError: a pattern of the recipe matches no layer.
    """
    if work.training is not None and work.training.loss_scaling:
        raise UnsupportedError(
            "scaling a float16 loss looks at whole gradients: use 'bf16', whose gradients need no scaling"
        )
    parts = work.layout.size("tensor")
    if parts == 1:
        return work, Effect(notes=("one device along the tensor axis: nothing to split",))
    mesh = mesh_of(work.layout, work.device)["tensor"]
    model = work.model
    found = plan(work, recipe, parts, work.layout.size("data"))
    splits, skipped, notes = found.splits, tuple(found.skipped), [*found.notes]
    if not splits:
        return work, Effect(skipped=skipped, notes=("no layer can be split: the model stays whole",))
    alike(model, mesh.get_group())
    before = dict(model.named_parameters())
    for name, split in splits.items():
        parallelize_module(model.get_submodule(name), mesh, split.style, src_data_rank=None)
    for dropout in frozenset().union(*(split.drops for split in splits.values())):
        drop_alike(model.get_submodule(dropout), mesh)
    leave_short_cuts(model)
    if found.written_out:
        by_heads(model, mesh)
    if found.draws:
        draw_alike(model, mesh, work.device)
        notes.append("each call begins with rank 0's random state: dropout is the same in all parts")
    if work.training is not None:
        follow(work.training.optimizer, before, dict(model.named_parameters()))
    told = _told(splits, parts)
    spread = work.spread or Spread()
    work = work.replace(spread=replace(spread, parts=(*spread.parts, told)))
    return work, Effect(tuple(splits), skipped, (told, *notes))


def _told(splits: Mapping[str, Split], parts: int) -> str:
    """One line: "tensor: 2 layers in 2 parts (fc1 by columns, fc2 by rows), 1 all-reduce a call"."""
    ways: dict[str, list[str]] = {}
    for name, split in splits.items():
        ways.setdefault(split.told, []).append(name)
    adds, gathers = (sum(getattr(split, kind) for split in splits.values()) for kind in ("adds", "gathers"))
    sends = " and ".join(
        f"{number} {what}{'s' if number > 1 else ''}"
        for number, what in ((adds, "all-reduce"), (gathers, "all-gather"))
        if number
    )
    return f"{split_in_words(ways, parts)}, {sends} a call"
