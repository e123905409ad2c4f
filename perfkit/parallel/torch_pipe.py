"""A torch model in stages: what each process holds of it, and how it is called. Plain data for `torch_schedule.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from perfkit._batch import sliced
from perfkit.backends.torch_surgery import compile_in_place, map_tensors, wrapped
from perfkit.parallel.torch_mesh import cut_along, mesh_of

if TYPE_CHECKING:
    from perfkit.parallel.layout import Layout

PIPELINE = "_perfkit_pipeline"
"""The attribute of a model that holds its `Pipeline`."""


class StageModule(nn.Module):
    """One stage as torch's schedules call it: `stage(*received, micro_batch)`.

    Args:
        body: what it computes of what it receives and of the model's inputs.
        wraps: what `around_forward` put around the whole model, outermost first; goes around each stage.
        compiles: what torch.compile is told for it; None where it is not compiled.
    """

    def __init__(
        self,
        body: fx.GraphModule,
        wraps: tuple[Callable[[Callable], Callable], ...],
        compiles: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.body, self.wraps, self.compiles = body, wraps, compiles
        self.rows: list[dict[str, torch.Tensor]] = []
        self.made: list[Any] | None = None

    def forward(self, *received: torch.Tensor, micro_batch: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = self.compute(received, self.rows[int(micro_batch)])
        if self.made is not None:
            self.made.append(outputs)
        return outputs

    def compute(self, received: tuple, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """What the stage sends on, of one micro-batch's inputs."""

        if self.compiles is not None and self.body._compiled_call_impl is None:  # a copy is not compiled
            compile_in_place(self.body, **self.compiles)
        run = wrapped(lambda body, *args, **kwargs: body(*args, **kwargs), self.wraps)
        return run(self.body, *received, **inputs)


class Running(dict):
    """What was set up for torch's schedules, by what it is for; of a copied model nothing is."""

    def __deepcopy__(self, memo: dict) -> Running:
        return Running()


@dataclass
class Pipeline:
    """What a model's class does instead of its forward, and how.

    Args:
        stages: those of this process, by their numbers.
        count: how many there are.
        kind: the model's class, whose forward tells the names of its inputs.
        names: of the model's inputs that are tensors.
        fixed: inputs that are none: they must stay as they were.
        outputs: how the model holds its outputs: None for each that the last stage makes.
        output_dims: of these the dimension of the rows; None without.
        mode: True or False where the model computes something else in training and in inference, and was read in one.
        draws: whether it draws random numbers.
        mean: whether the loss is a mean over the batch; else it is a sum.
        loss_dtype: of the loss; None for inference.
        replicated: whether stages average their gradients along "data".
        hook: a communication hook of torch's for those gradients.
    """

    stages: dict[int, StageModule]
    count: int
    layout: Layout
    device: str
    schedule: str
    micro_batches: int
    batch_dim: int
    kind: type[nn.Module]
    names: tuple[str, ...]
    fixed: dict[str, Any]
    outputs: tuple[list[Any], pytree.TreeSpec]
    output_dims: tuple[int | None, ...]
    mode: bool | None
    draws: bool
    mean: bool
    loss_dtype: torch.dtype | None
    replicated: bool = False
    hook: Callable | None = None
    running: Running = field(default_factory=Running)

    @property
    def group(self) -> Any:
        return group_of(self.layout, self.device)

    @property
    def last(self) -> int:
        return self.count - 1

    def owner(self, stage: int) -> int:
        """The global rank that has a stage."""
        return dist.get_global_rank(self.group, stage % dist.get_world_size(self.group))


def group_of(layout: Layout, device: str) -> Any:
    """The processes of one pipeline."""
    return mesh_of(layout, device)["pipeline"].get_group()


def pipeline_of(model: nn.Module) -> Pipeline:
    """The pipeline of a model that has one."""
    found = pipelined(model)
    assert found is not None
    return found


def pipelined(model: nn.Module) -> Pipeline | None:
    """A model's pipeline; None where it is whole."""
    return getattr(model, PIPELINE, None)


def shard_stages(model: nn.Module, pipe: Pipeline, mesh: DeviceMesh) -> None:
    """Let each process along the mesh hold a part of the stages' parameters; what no stage reads stays whole.

    A stage is one unit of FSDP2, which gathers its weights with the first micro-batch and frees them after the last.
    """
    replaced: dict[int, nn.Parameter] = {}
    for stage in pipe.stages.values():
        before = dict(stage.named_parameters())
        if before:
            fully_shard(stage, mesh=mesh, shard_placement_fn=cut_along, reshard_after_forward=False)
            replaced |= {id(before[name]): parameter for name, parameter in stage.named_parameters()}
    for module in model.modules():  # weights that a stage reads without calling their layer are held there and here
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in replaced:
                setattr(module, name, replaced[id(parameter)])


@contextmanager
def gathered(stages: Iterable[nn.Module]) -> Iterator[None]:
    """Within it stages that are sharded have their weights, and after it their parts."""
    sharded = [stage for stage in stages if isinstance(stage, FSDPModule)]
    for stage in sharded:
        stage.unshard()
    try:
        yield
    finally:
        for stage in sharded:
            stage.reshard()


def unflattened(pipe: Pipeline, outputs: tuple[torch.Tensor, ...]) -> Any:
    """What the last stage makes, as the model returns it."""
    leaves, structure = pipe.outputs
    made = iter(outputs)
    return pytree.tree_unflatten([next(made) if leaf is None else leaf for leaf in leaves], structure)


def micro_batches(tree: Any, rows: int, count: int, batch_dim: int) -> list[Any]:
    """The parts of a batch."""
    return [map_tensors(sliced(rows, count, index, batch_dim), tree) for index in range(count)]
