"""A model's stages under the schedules of torch.distributed.pipelining: batches in, losses or outputs out.

Every process of a pipeline makes the same calls with the same batch. Stages are sent what the one before makes, and
read the inputs of the model themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.nn.parallel import DistributedDataParallel

from perfkit._errors import InvalidInputError, UnsupportedError
from perfkit._workload import Inputs
from perfkit.parallel.torch_mesh import mesh_of
from perfkit.parallel.torch_pipe import Pipeline, StageModule, gathered, micro_batches, pipeline_of, unflattened
from perfkit.parallel.torch_trace import named, tensors_of

SCHEDULES = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe, "interleaved": ScheduleInterleaved1F1B}


def infer(model: nn.Module, inputs: Inputs) -> Any:
    """The outputs for a whole batch, without gradients, on every process of the pipeline."""
    pipe = pipeline_of(model)
    missing = [index for index, dim in enumerate(pipe.output_dims) if dim is None]
    if missing:
        raise UnsupportedError(
            f"output {missing[0]} of {type(model).__name__} has no dimension for the rows of the batch: what "
            "micro-batches give cannot be put together"
        )
    with torch.no_grad(), _drawing(pipe):
        rows = _rows(model, inputs)
        run = _run(pipe, rows[0], trains=False)
        with gathered(pipe.stages.values()):
            made = _step(pipe, run, rows)
        return _shared(pipe, run, made)


def gradients(model: nn.Module, inputs: Inputs, targets: Any, loss: Callable[[Any, Any], Any]) -> torch.Tensor:
    """Add the gradients of the loss to the parameters of this process' stages; returns the loss of the whole batch."""
    pipe = pipeline_of(model)
    with _drawing(pipe):
        rows = _rows(model, inputs)
        run = _run(pipe, rows[0], trains=True)
        run.targets[:] = micro_batches(targets, _count(pipe, inputs), pipe.micro_batches, pipe.batch_dim)
        run.loss = loss
        losses: list[torch.Tensor] = []
        _step(pipe, run, rows, losses)
    found = torch.zeros((), dtype=pipe.loss_dtype, device=pipe.device)
    if pipe.last in pipe.stages:
        told = torch.stack([each.detach() for each in losses])
        found = told.mean() if pipe.mean else told.sum()
    dist.broadcast(found, pipe.owner(pipe.last), group=pipe.group)
    return found


@dataclass
class Run:
    """torch's schedule for micro-batches of one shape.

    Args:
        shapes: of what each stage makes of a micro-batch, as tensors without numbers.
    """

    schedule: Any
    shapes: list[tuple[torch.Tensor, ...]]
    targets: list[Any]
    loss: Callable[[Any, Any], Any] | None = None


def _step(pipe: Pipeline, run: Run, rows: list[dict], losses: list | None = None) -> list[Any]:
    """Run torch's schedule over the micro-batches; returns the outputs of the last stage, where it is here."""
    last = pipe.stages.get(pipe.last)
    numbers = torch.arange(pipe.micro_batches)
    try:
        for stage in pipe.stages.values():
            stage.rows = rows
        if last is not None and losses is None:
            last.made = []
        about = {} if losses is None else {"target": numbers, "losses": losses}
        run.schedule.step(micro_batch=numbers, return_outputs=False, **about)
        return [] if last is None or last.made is None else last.made
    finally:
        for stage in pipe.stages.values():
            stage.rows, stage.made = [], None


def _rows(model: nn.Module, inputs: Inputs) -> list[dict[str, torch.Tensor]]:
    """The tensors among the inputs, of each micro-batch.

    Raises:
        InvalidInputError: they cannot be shared out evenly, or others than those that the model was read with.
    """
    pipe = pipeline_of(model)
    if pipe.mode is not None and pipe.mode != model.training:
        how = "training" if pipe.mode else "inference"
        raise UnsupportedError(
            f"{type(model).__name__} computes something else in training and in inference by looking at self.training, "
            f"and was taken apart in {how}: use modules such as nn.Dropout, whose mode can be changed"
        )
    given = named(pipe.kind, inputs)
    tensors = tensors_of(given)
    fixed = {name: value for name, value in given.items() if name not in tensors}
    if tuple(tensors) != pipe.names or fixed != pipe.fixed:
        raise InvalidInputError(
            f"the stages were made for the inputs {', '.join(pipe.names)} and {pipe.fixed}, and are given "
            f"{', '.join(tensors)} and {fixed}: pass the same, or call optimize with these"
        )
    count = _count(pipe, inputs)
    if count % pipe.micro_batches:
        raise InvalidInputError(
            f"a batch of {count} rows (dimension {pipe.batch_dim}) cannot be shared by {pipe.micro_batches} "
            "micro-batches evenly: drop the last batch of an epoch where it is smaller, or fill it up"
        )
    return micro_batches(tensors, count, pipe.micro_batches, pipe.batch_dim)


def _count(pipe: Pipeline, inputs: Inputs) -> int:
    """Rows of a batch."""
    return next(iter(tensors_of(named(pipe.kind, inputs)).values())).shape[pipe.batch_dim]


def _run(pipe: Pipeline, rows: dict[str, torch.Tensor], trains: bool) -> Run:
    """What was set up for such micro-batches, or is now; every process does it together."""
    key = trains, *((name, tuple(tensor.shape), tensor.dtype) for name, tensor in rows.items())
    if key not in pipe.running:
        pipe.running[key] = _set_up(pipe, rows, trains)
    return pipe.running[key]


def _set_up(pipe: Pipeline, rows: dict[str, torch.Tensor], trains: bool) -> Run:
    shapes = _shapes(pipe, rows, trains)
    modules = _replicas(pipe) if trains and pipe.replicated else pipe.stages
    device = torch.device(pipe.device)
    stages: list[Any] = [
        PipelineStage(
            module,
            number,
            pipe.count,
            device,
            input_args=shapes[number - 1] if number else (),
            output_args=shapes[number],
            group=pipe.group,
        )
        for number, module in modules.items()
    ]
    run = Run(None, shapes, [None] * pipe.micro_batches)

    def loss(outputs: tuple, number: torch.Tensor) -> torch.Tensor:
        assert run.loss is not None
        return run.loss(unflattened(pipe, outputs), run.targets[int(number)])

    about: dict[str, Any] = {
        "n_microbatches": pipe.micro_batches,
        "loss_fn": loss if trains else None,
        "scale_grads": pipe.mean,
    }
    if len(stages) > 1:
        run.schedule = ScheduleInterleaved1F1B(stages, **about)
    else:
        kind = SCHEDULES[pipe.schedule] if trains else ScheduleGPipe  # without gradients all are alike
        run.schedule = kind(stages[0], **about)
    return run


def _shapes(pipe: Pipeline, rows: dict[str, torch.Tensor], trains: bool) -> list[tuple[torch.Tensor, ...]]:
    """What each stage makes of such a micro-batch, without the numbers: found by running it once through all."""
    found: list[tuple[torch.Tensor, ...]] = []
    received: tuple[torch.Tensor, ...] = ()
    with torch.random.fork_rng(), _buffers_kept(pipe), gathered(pipe.stages.values()), torch.set_grad_enabled(trains):
        for number in range(pipe.count):
            made: tuple[torch.Tensor, ...] = ()
            if number in pipe.stages:
                made = pipe.stages[number].compute(received, rows)
            told = [list(map(_form, made))]
            dist.broadcast_object_list(told, pipe.owner(number), group=pipe.group)
            found.append(tuple(map(_empty, told[0])))
            sent = made or tuple(_empty(form, pipe.device) for form in told[0])
            received = tuple(tensor.detach().contiguous() for tensor in sent)
            for tensor, form in zip(received, told[0], strict=True):
                dist.broadcast(tensor, pipe.owner(number), group=pipe.group)
                tensor.requires_grad_(form["requires_grad"])
    return found


@contextmanager
def _buffers_kept(pipe: Pipeline) -> Iterator[None]:
    """After it running statistics and the like are as before."""
    held = [(buffer, buffer.clone()) for stage in pipe.stages.values() for buffer in stage.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in held:
                buffer.copy_(before)


def _form(tensor: torch.Tensor) -> dict[str, Any]:
    return {"size": tuple(tensor.shape), "dtype": tensor.dtype, "requires_grad": tensor.requires_grad}


def _empty(form: dict[str, Any], device: str = "meta") -> torch.Tensor:
    return torch.empty(**form, device=device)


def _replicas(pipe: Pipeline) -> dict[int, nn.Module]:
    """The stages with gradients averaged along "data" after the last micro-batch."""
    if "replicas" not in pipe.running:
        group = mesh_of(pipe.layout, pipe.device)["data"].get_group()
        pipe.running["replicas"] = {number: _replica(pipe, stage, group) for number, stage in pipe.stages.items()}
    return pipe.running["replicas"]


def _replica(pipe: Pipeline, stage: StageModule, group: Any) -> nn.Module:
    if not any(parameter.requires_grad for parameter in stage.parameters()):
        return stage
    replica = DistributedDataParallel(stage, process_group=group, broadcast_buffers=False, gradient_as_bucket_view=True)
    if pipe.hook is not None:
        replica.register_comm_hook(group, pipe.hook)
    return replica


def _shared(pipe: Pipeline, run: Run, made: list[tuple[torch.Tensor, ...]]) -> Any:
    """The outputs of all micro-batches as one batch, on every process."""
    whole = []
    for index, (dim, like) in enumerate(zip(pipe.output_dims, run.shapes[-1], strict=True)):
        shape = list(like.shape)
        shape[dim] *= pipe.micro_batches
        if made:
            tensor = torch.cat([outputs[index] for outputs in made], dim).contiguous()
        else:
            tensor = torch.empty(shape, dtype=like.dtype, device=pipe.device)
        dist.broadcast(tensor, pipe.owner(pipe.last), group=pipe.group)
        whole.append(tensor)
    return unflattened(pipe, tuple(whole))


@contextmanager
def _drawing(pipe: Pipeline) -> Iterator[None]:
    """Each process draws random numbers of its own, by what the common random state gives.

    Those that hold parts of the same layers draw the same: what is not split is the same on each.
    """
    if not pipe.draws:
        yield
        return
    seed = torch.randint(2**31, (1,), device="cpu").to(pipe.device)
    parts = pipe.layout.size("tensor")
    if parts > 1:
        group = mesh_of(pipe.layout, pipe.device)["tensor"].get_group()
        dist.broadcast(seed, dist.get_global_rank(group, 0), group=group)
    with torch.random.fork_rng():
        torch.manual_seed(int(seed) + dist.get_rank() // parts)  # "tensor" is the innermost axis
        yield
