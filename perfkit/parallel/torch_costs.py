"""What a training step of a torch model costs on one device, measured for `planning`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from statistics import median
from typing import Any

from torch import nn

from perfkit._errors import InvalidInputError
from perfkit._workload import Inputs, Workload
from perfkit.backends.torch_surgery import map_tensors, tensors_in
from perfkit.parallel.batch import length, sliced
from perfkit.parallel.layout import Layout
from perfkit.parallel.pipeline_plan import MICRO_BATCHES
from perfkit.parallel.planning_parts import Costs, Stages, Unit
from perfkit.parallel.planning_timing import in_turn, needed_passes, within
from perfkit.parallel.torch_data import units_of
from perfkit.parallel.torch_split_costs import bytes_of, splits_of
from perfkit.parallel.world import ALONE

WATCHED = 5
"""Passes in which layers are timed."""


class Step:
    """The parts of a training step, each callable by itself, on a copy of the workload's model.

    Args:
        work: a training workload.
        batch_dim: the dimension of the inputs that is the batch.
    """

    def __init__(self, work: Workload, batch_dim: int):
        self.work = work = work.backend.copy(work)
        rows = length(work, batch_dim)
        if rows is None:
            raise InvalidInputError(f"no input has a dimension {batch_dim} to share out")
        self.model, self.rows, self.batch_dim = work.model, rows, batch_dim

    def batch(self, rows: int) -> tuple[Inputs, Any]:
        """The first rows of the example batch."""
        of = sliced(self.rows, self.rows // rows, 0, self.batch_dim) if rows < self.rows else lambda tensor: tensor
        inputs, targets = self.work.inputs, self.work.training.targets
        return Inputs(*map_tensors(of, (inputs.args, dict(inputs.kwargs)))), map_tensors(of, targets)

    def both_passes(self, inputs: Inputs, targets: Any) -> None:
        """Forward and backward."""
        training = self.work.training
        with ExitStack() as contexts:
            for context in training.around:
                contexts.enter_context(context())
            training.optimizer.zero_grad(set_to_none=True)
            training.loss(self.model(*inputs.args, **inputs.kwargs), targets).backward()
        self.work.backend.synchronize(None)

    def update(self) -> None:
        self.work.training.optimizer.step()
        self.work.backend.synchronize(None)


def costs(
    step: Step,
    devices: int,
    passes: Mapping[int, float],
    update_s: float,
) -> Costs:
    """All that `planning` asks, from times of passes by rows and of the optimizer's step."""
    units, layers, forward_s = _called(step)
    trained = [parameter for parameter in step.model.parameters() if parameter.requires_grad]
    splits = {parts: splits_of(step, layers, parts) for parts in range(2, devices + 1) if devices % parts == 0}
    return Costs(
        rows=step.rows,
        pass_s=dict(passes),
        update_s=update_s,
        forward_s=forward_s,
        units=units,
        splits=splits,
        gradients=tuple(map(bytes_of, reversed(trained))),
        stages={parts: found for parts in splits if (found := _stages(step, parts)) is not None},
    )


def measured(step: Step, devices: int, budget_s: float) -> Costs:
    """The same, timed here in one process, all batch sizes in turn."""
    times = {name: median(found) for name, found in in_turn(timed_calls(step, devices), within(budget_s)).items()}
    update_s = times.pop("update")
    return costs(step, devices, times, update_s)


def timed_calls(step: Step, devices: int) -> dict[Any, Callable[[], None]]:
    """What must be timed: passes by their rows, and "update"."""

    def of(rows: int) -> Callable[[], None]:
        inputs, targets = step.batch(rows)
        return lambda: step.both_passes(inputs, targets)

    rows = needed_passes(step.rows, devices)
    return {**{count: of(count) for count in rows}, "update": step.update}  # an update uses the last pass' gradients


def _called(step: Step) -> tuple[tuple[Unit, ...], dict[str, tuple[float, int, int]], float]:
    """The units in the order of their calls; of each layer its seconds, bytes of inputs that learn, and of outputs.

    And the seconds of the model's forward call.
    """
    names = {id(module): name for name, module in step.model.named_modules()}
    modules = [unit for unit in units_of(step.model) if unit is not step.model] or [step.model]
    watched = {id(module): module for module in [*modules, *_layers(step.model), step.model]}
    times: dict[int, list[float]] = {}
    sizes: dict[int, tuple[int, int]] = {}
    started: list[float] = []

    def before(_module, _args):
        step.work.backend.synchronize(None)
        started.append(time.perf_counter())

    def after(module, args, kwargs, outputs):
        step.work.backend.synchronize(None)
        times.setdefault(id(module), []).append(time.perf_counter() - started.pop())
        learning = {id(tensor): tensor for tensor in tensors_in((args, kwargs)) if tensor.requires_grad}
        sizes[id(module)] = sum(map(bytes_of, learning.values())), sum(map(bytes_of, tensors_in(outputs)))

    handles = []
    for module in watched.values():
        handles.append(module.register_forward_pre_hook(before))
        handles.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        for _ in range(WATCHED):
            step.both_passes(*step.batch(step.rows))
    finally:
        for handle in handles:
            handle.remove()
    # A module that is called several times in a pass takes that many times its median.
    seconds = {key: median(found) * len(found) / WATCHED for key, found in times.items()}
    order = [module for module in (watched[key] for key in times) if any(module is unit for unit in modules)]
    found = tuple(
        Unit(
            names[id(module)],
            seconds[id(module)],
            sum(map(bytes_of, module.parameters())),
            len(list(module.parameters())),
            sizes[id(module)][1],
        )
        for module in order
    )
    layers = {names[key]: (seconds[key], *sizes[key]) for key in times}
    return found, layers, seconds[id(step.model)]


def _stages(step: Step, parts: int) -> Stages | None:
    """How `pipeline_parallel` would cut the model into so many stages."""
    from perfkit.parallel.torch_pipeline import expected
    from perfkit.recipes.pipeline_parallel import PipelineParallel

    recipe = PipelineParallel(size=parts, micro_batches=parts * MICRO_BATCHES, batch_dim=step.batch_dim)
    work = step.work.replace(layout=Layout(("pipeline",), (parts,)), world=ALONE)
    return None if recipe.refusal(work) else expected(work, recipe)


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    from perfkit.parallel.torch_plan import LAYERS

    return (module for module in model.modules() if isinstance(module, LAYERS))
