"""What a training step of a torch model costs on one device, measured for `planning`."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn

from perfkit._errors import InvalidInputError, UnsupportedError
from perfkit._workload import Inputs, Workload
from perfkit.backends.torch_surgery import map_tensors, tensors_in
from perfkit.parallel.batch import length, sliced
from perfkit.parallel.layout import Layout
from perfkit.parallel.planning import MICRO_BATCHES
from perfkit.parallel.planning_parts import Costs, Split, Stages, Unit
from perfkit.parallel.torch_attention import part_alone
from perfkit.parallel.torch_by_heads import ThreeParallel
from perfkit.parallel.torch_data import units_of
from perfkit.parallel.world import ALONE

BLOCK, WATCHED = 3, 5
"""Passes that are timed together, and passes in which layers are."""


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
            raise InvalidInputError(f"the first input has no dimension {batch_dim} to share out")
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


def needed_passes(rows: int, devices: int) -> dict[int, int]:
    """The batch sizes on one device that layouts of so many devices lead to, and how many passes it makes in a row.

    One over the data axis; in a pipeline its micro-batches, which find in the caches what the last one left there.
    """
    found = {}
    for pipeline in (parts for parts in range(2, devices + 1) if devices % parts == 0):
        micro_batches = pipeline * MICRO_BATCHES
        if rows % micro_batches == 0:
            found[rows // micro_batches] = micro_batches
    found |= {rows // parts: 1 for parts in range(1, devices + 1) if devices % parts == 0 and rows % parts == 0}
    return dict(sorted(found.items()))


def costs(
    step: Step,
    devices: int,
    passes: Mapping[int, float],
    update_s: float,
) -> Costs:
    """All that `planning` asks, from times of passes by rows and of the optimizer's step."""
    units, layers, forward_s = _called(step)
    trained = [parameter for parameter in step.model.parameters() if parameter.requires_grad]
    splits = {parts: _splits(step, layers, parts) for parts in range(2, devices + 1) if devices % parts == 0}
    return Costs(
        rows=step.rows,
        pass_s=dict(passes),
        update_s=update_s,
        forward_s=forward_s,
        units=units,
        splits=splits,
        bytes=sum(map(_bytes, trained)),
        tensors=len(trained),
        stages={parts: found for parts in splits if (found := _stages(step, parts)) is not None},
    )


def measured(step: Step, devices: int, budget_s: float) -> Costs:
    """The same, timed here in one process, all batch sizes in turn."""
    calls = timed_calls(step, devices)
    times: dict[Any, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()  # the first one is another's: it allocates, and compiles
    began = time.perf_counter()
    while time.perf_counter() - began < budget_s or len(times["update"]) < 3:
        for name, call in calls.items():
            times[name].append(seconds_of(call))
    medians = {name: median(found) for name, found in times.items()}
    update_s = medians.pop("update")
    return costs(step, devices, medians, update_s)


def timed_calls(step: Step, devices: int) -> dict[Any, Callable[[], None]]:
    """What must be timed: passes by their rows, and "update"."""

    def of(rows: int) -> Callable[[], None]:
        inputs, targets = step.batch(rows)
        return lambda: step.both_passes(inputs, targets)

    rows = needed_passes(step.rows, devices)
    return {**{count: of(count) for count in rows}, "update": step.update}  # an update uses the last pass' gradients


def seconds_of(call: Callable[[], None], times: int = BLOCK) -> float:
    """Of one of some calls."""
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times


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
        sizes[id(module)] = sum(map(_bytes, learning.values())), sum(map(_bytes, tensors_in(outputs)))

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
            sum(map(_bytes, module.parameters())),
            len(list(module.parameters())),
            sizes[id(module)][1],
        )
        for module in order
    )
    layers = {names[key]: (seconds[key], *sizes[key]) for key in times}
    return found, layers, seconds[id(step.model)]


def _splits(step: Step, layers: Mapping[str, tuple[float, int, int]], parts: int) -> tuple[Split, ...]:
    """The layers that `tensor_parallel` would split in so many parts, and what each sends in a step."""
    from perfkit.parallel.torch_plan import plan
    from perfkit.recipes.tensor_parallel import TensorParallel

    try:
        splits = plan(step.work, TensorParallel(), parts).splits
    except UnsupportedError:
        return ()
    inputs = _inputs(step, splits)
    found = []
    for name, split in splits.items():
        seconds, learning, given = layers[name]
        layer = step.model.get_submodule(name)
        sends = [("all_reduce", given)] if split.adds else [("gather_inside", given)] if split.gathers else []
        if (bias := _whole_bias(layer, split.style)) is not None:
            learning += _bytes(bias)
        if learning and split.told != "rows":  # each process has a part of what these learn
            sends.append(("all_reduce", learning))
        left = part_of(layer, inputs[name], parts, rows=split.told == "rows")
        found.append(Split(name, seconds, left, sum(map(_bytes, layer.parameters())), tuple(sends)))
    return tuple(found)


def _whole_bias(layer: Any, style: Any) -> torch.Tensor | None:
    """What each process holds the whole of beside its part of a layer, and learns from a part of its outputs."""
    if isinstance(layer, nn.MultiheadAttention):
        return layer.in_proj_bias
    return layer.bias if isinstance(style, ThreeParallel) else None


def _stages(step: Step, parts: int) -> Stages | None:
    """How `pipeline_parallel` would cut the model into so many stages."""
    from perfkit.parallel.torch_pipeline import expected
    from perfkit.recipes.pipeline_parallel import PipelineParallel

    recipe = PipelineParallel(size=parts, micro_batches=parts * MICRO_BATCHES, batch_dim=step.batch_dim)
    work = step.work.replace(layout=Layout(("pipeline",), (parts,)), world=ALONE)
    return None if recipe.refusal(work) else expected(work, recipe)


def part_of(layer: nn.Module, given: Inputs, parts: int, rows: bool) -> float:
    """The time of one device's part of a split layer as a share of the whole one's, forwards and backwards."""
    part: Any = copy.deepcopy(layer)
    mine = given
    if isinstance(layer, nn.MultiheadAttention):
        part = part_alone(part, parts)
    elif rows:  # of the weight as it is multiplied: each part takes some of the inputs
        part.weight = nn.Parameter(part.weight.detach().chunk(parts, 1)[0].contiguous())
        mine = Inputs((given.args[0].chunk(parts, -1)[0].contiguous(),))
    else:
        whole = {name: value.detach() for name, value in layer.named_parameters(recurse=False)}
        dim = 1 if isinstance(layer, nn.Embedding) else 0
        for name, value in whole.items():
            setattr(part, name, nn.Parameter(value.chunk(parts, dim)[0].contiguous()))
    sides = ((layer, given), (part, mine))
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(5):
        for (side, inputs), found in zip(sides, times, strict=True):
            found.append(seconds_of(partial(_both_passes, side, inputs)))
            side.zero_grad(set_to_none=True)
    return min(max(median(times[1]) / median(times[0]), 1 / parts), 1.0)


def _both_passes(layer: nn.Module, inputs: Inputs) -> None:
    next(tensors_in(layer(*inputs.args, **inputs.kwargs))).sum().backward()


def _inputs(step: Step, names: Iterable[str]) -> dict[str, Inputs]:
    """What those layers are given in a call; with gradients of their own where they had some."""
    found: dict[str, Inputs] = {}

    def keeping(name: str) -> Callable:
        def before(_module, args, kwargs):
            copies: dict[int, torch.Tensor] = {}  # what is given twice, as queries and as keys, stays one

            def alone(tensor: torch.Tensor) -> torch.Tensor:
                return copies.setdefault(id(tensor), tensor.detach().requires_grad_(tensor.requires_grad))

            found[name] = Inputs(*map_tensors(alone, (args, dict(kwargs))))

        return before

    handles = [
        step.model.get_submodule(name).register_forward_pre_hook(keeping(name), with_kwargs=True) for name in names
    ]
    try:
        step.both_passes(*step.batch(step.rows))
    finally:
        for handle in handles:
            handle.remove()
    return found


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    from perfkit.parallel.torch_plan import LAYERS

    return (module for module in model.modules() if isinstance(module, LAYERS))


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
