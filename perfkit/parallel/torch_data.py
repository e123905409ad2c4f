"""Data parallelism in torch: DistributedDataParallel, or FSDP2, inside of a module that stays what it is."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.nn.modules.batchnorm import _BatchNorm

from perfkit._errors import UnsupportedError
from perfkit._report import Effect, Skipped
from perfkit._workload import Workload
from perfkit.backends.torch_copies import copied
from perfkit.backends.torch_hooks import gradient_hooks
from perfkit.backends.torch_surgery import map_tensors
from perfkit.parallel.batch import part
from perfkit.parallel.spread import Spread
from perfkit.parallel.torch_mesh import alike, cut_along, follow, mesh_of
from perfkit.parallel.torch_pipe import pipelined, shard_stages

if TYPE_CHECKING:
    from perfkit.recipes.data_parallel import DataParallel


def data_parallel(work: Workload, recipe: DataParallel) -> tuple[Workload, Effect]:
    """Each process trains on its part of the batch; gradients are averaged.

    Raises:
        UnsupportedError: the optimizer holds state that cannot be sharded, or hooks need whole gradients.
    """
    hooked = [name for name, parameter in work.model.named_parameters() if any(gradient_hooks(parameter))]
    if recipe.shard and hooked:
        raise UnsupportedError(
            f"shard=True cuts parameters into parts, and hooks of {', '.join(hooked)} take gradients of whole ones: "
            "leave it out"
        )
    mesh = mesh_of(work.layout, work.device)["data"]
    group = mesh.get_group()
    work = part(work, recipe.batch_dim, mesh.get_local_rank(), map_tensors)
    model = work.model
    alike(model, group)
    pipe = pipelined(model)
    idle = [] if pipe else unused(work)
    norms = _about_norms(model, work.device, group)
    apart = norms if pipe or work.device != "cuda" else []
    notes = [*norms, *_about_unused(idle)]
    if recipe.shard and pipe:
        before = dict(model.named_parameters())
        shard_stages(model, pipe, mesh)
        follow(work.training.optimizer, before, dict(model.named_parameters()))
        notes.append(
            "FSDP2: each stage gathers its weights for the step, adds up the gradients of its micro-batches, and sends "
            "them after the last one"
        )
    elif recipe.shard:
        policy = CPUOffloadPolicy() if recipe.offload and work.device == "cuda" else OffloadPolicy()
        before = dict(model.named_parameters())
        units = units_of(model)
        for unit in units:
            precision = _precision(recipe, whole=unit is model)
            fully_shard(unit, mesh=mesh, shard_placement_fn=cut_along, offload_policy=policy, mp_policy=precision)
        follow(work.training.optimizer, before, dict(model.named_parameters()))
        names = {id(module): name or type(model).__name__ for name, module in model.named_modules()}
        if recipe.precision:
            notes.append("weights and activations in bfloat16, gradients added up and parameters kept in float32")
        notes.append(f"FSDP2 in {len(units)} units: {', '.join(names[id(unit)] for unit in units)}")
    elif pipe:
        pipe.replicated, pipe.hook = True, _in_bfloat16 if recipe.compress else None
        notes.append("gradients of each stage are averaged after its last micro-batch")
    else:
        replicated: Any = replicate(  # the model itself, of a class of torch's
            model, process_group=group, gradient_as_bucket_view=True, find_unused_parameters=bool(idle)
        )
        if recipe.compress:
            replicated.register_comm_hook(group, _in_bfloat16)
    if recipe.compress:
        notes.append("gradients are sent in bfloat16")

    def averaged(loss: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(loss, group=group)
        return loss / mesh.size()

    what = "parameters, gradients and optimizer state in parts" if recipe.shard else "gradients averaged"
    told = f"data: the batch in {mesh.size()} parts, {what}"
    spread = work.spread or Spread()
    spread = replace(spread, parts=(*spread.parts, told))
    exchanging: Any = getattr(model, "set_requires_gradient_sync", None)  # of the class that torch gave it, if it did
    if work.training.micro_batches > 1:
        notes.append(f"gradients are sent with the last of {work.training.micro_batches} micro-batches")
    training = replace(work.training, averaged=averaged, exchanging=exchanging)
    work = work.replace(training=training, spread=spread)
    touched = tuple(name for name, _ in model.named_parameters() if name not in idle)
    skipped = tuple(Skipped(name, "no gradient reaches it on the example inputs") for name in idle)
    return work, Effect(touched, skipped, tuple(notes), apart=tuple(apart))


def _precision(recipe: DataParallel, whole: bool) -> MixedPrecisionPolicy:
    """In what FSDP2 computes and adds up; the whole model's outputs are what they were."""
    if recipe.precision is None:
        return MixedPrecisionPolicy()
    outputs = torch.float32 if whole else None
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=outputs)


def _in_bfloat16(group, bucket):  # torch takes no annotations that are text
    """Average gradients in bfloat16. torch's own hook does the same, and refuses to on CPU, where gloo can as well."""
    gradients = bucket.buffer()
    low = gradients.to(torch.bfloat16).div_(group.size())
    sent = dist.all_reduce(low, group=group, async_op=True).get_future()
    return sent.then(lambda done: gradients.copy_(done.value()[0]))


def unused(work: Workload) -> list[str]:
    """The parameters that no gradient reaches on the example inputs; told by one step of a copy without optimizing."""
    twin = copied(work.model)
    work.backend.seed(work.seed)
    outputs = twin(*work.inputs.args, **work.inputs.kwargs)
    work.training.loss(outputs, work.training.targets).backward()
    return [name for name, parameter in twin.named_parameters() if parameter.requires_grad and parameter.grad is None]


def _about_unused(unused: list[str]) -> list[str]:
    if not unused:
        return []
    return [f"{len(unused)} parameter(s) are used by no loss ({', '.join(unused[:3])}): each step looks for such"]


def _about_norms(model: nn.Module, device: str, group: Any) -> list[str]:
    """Batch norms take their statistics over the whole batch, where there is a kernel for it."""
    norms = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    if not norms:
        return []
    if pipelined(model):
        return [f"{', '.join(norms)}: statistics of each device's micro-batches, so losses differ from one process'"]
    if device != "cuda":
        return [
            f"{', '.join(norms)}: statistics of each device's part of the batch, so losses differ from one process' "
            "(torch synchronizes batch norms on GPUs alone)"
        ]
    for name in norms:
        owner, _, leaf = name.rpartition(".")
        synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(model.get_submodule(name), group)
        setattr(model.get_submodule(owner), leaf, synchronized)
    return [f"{', '.join(norms)}: synchronized, statistics of the whole batch"]


def units_of(model: nn.Module) -> list[nn.Module]:
    """What is gathered and freed as one, innermost first: the model's children, or those of its lists; then the rest.

    Parameters that two of them share must be in one unit: then the model is one.
    """
    children = []
    for child in model.children():
        children += list(child.children()) if isinstance(child, (nn.ModuleList, nn.Sequential)) else [child]
    units = [child for child in children if next(child.parameters(), None) is not None]
    held = [id(parameter) for unit in units for parameter in unit.parameters()]
    return [model] if len(held) != len(set(held)) else [*units, model]
