"""torch's mesh of a chain's layout, and what a model that is spread along it needs whatever the axis."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from perfkit._errors import UnsupportedError
from perfkit.backends.torch_surgery import local

if TYPE_CHECKING:
    from perfkit.parallel.layout import Layout


def mesh_of(layout: Layout, device: str) -> DeviceMesh:
    """torch's mesh of the chain's layout: one and the same for all recipes of a chain, which FSDP2 asks for."""
    return _mesh(layout, device, dist.group.WORLD)


@lru_cache(maxsize=4)
def _mesh(layout: Layout, device: str, _world: Any) -> DeviceMesh:
    """By the world as well: a process group that was left leaves its meshes behind."""
    return init_device_mesh(device, layout.sizes, mesh_dim_names=layout.axes)


def alike(model: nn.Module, group: Any) -> None:
    """The parameters and buffers of the group's rank 0 everywhere."""
    first = dist.get_global_rank(group, 0)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            dist.broadcast(local(tensor), first, group=group)


def cut_along(parameter: nn.Parameter) -> Shard | None:
    """The dimension that FSDP2 cuts, for its `shard_placement_fn`; None for its own choice, the first.

    Of rows that tensor_parallel took here and there, a part is no placement of torch's: it cuts columns instead.
    """
    placements = parameter.placements if isinstance(parameter, DTensor) else ()
    return Shard(1) if any(isinstance(placement, _StridedShard) for placement in placements) else None


def follow(optimizer: torch.optim.Optimizer, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Let an optimizer without state hold the parameters that took the place of its own.

    Distributed parameters get groups of their own: torch's optimizers update a group with one call for all of its
    parameters, which takes distributed ones or plain ones.

    Raises:
        UnsupportedError: it has state.
    """
    if optimizer.state:
        raise UnsupportedError(
            "the optimizer has taken steps already, and its state is of whole parameters: shard before training"
        )
    replaced = {id(parameter): new[name] for name, parameter in old.items()}
    for group in list(optimizer.param_groups):
        held = [replaced[id(parameter)] for parameter in group["params"]]
        spread = [parameter for parameter in held if isinstance(parameter, DTensor)]
        whole = [parameter for parameter in held if not isinstance(parameter, DTensor)]
        group["params"] = whole or spread
        if whole and spread:
            optimizer.param_groups.append({**group, "params": spread})
