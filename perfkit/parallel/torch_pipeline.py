"""Pipeline parallelism in torch: each process holds the stages that are its own, and the model runs all of them.

Everything that rests on a clock is rank 0's: it times the operations of one micro-batch and says where to cut.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from perfkit._errors import UnsupportedError, nearest
from perfkit._report import Effect
from perfkit._workload import Inputs, Workload
from perfkit.backends.torch_compile import uncompiled
from perfkit.backends.torch_copies import copied
from perfkit.backends.torch_surgery import derive, unwrapped
from perfkit.parallel.balance import Costs, balanced, spans
from perfkit.parallel.pipeline_plan import Plan, planned
from perfkit.parallel.planning_parts import Stages
from perfkit.parallel.spread import Spread
from perfkit.parallel.torch_mesh import alike, mesh_of
from perfkit.parallel.torch_part import held_alone, norms_of_all
from perfkit.parallel.torch_pipe import PIPELINE, Pipeline, StageModule
from perfkit.parallel.torch_pipeline_checks import checked, first_part, output_dims, reduction
from perfkit.parallel.torch_schedule import gradients, infer
from perfkit.parallel.torch_stages import Operations, stage_graphs
from perfkit.parallel.torch_trace import label, named, tensors_of, traced

if TYPE_CHECKING:
    from perfkit.recipes.pipeline_parallel import PipelineParallel


def too_old() -> str | None:
    """Why this torch cannot train a pipeline; None where it can.

    Up to 2.12 a stage raises where a value before it gets no gradient, while the processes beside it wait for one.
    """
    if torch.__version__ < "2.13":  # compared as versions, not as text
        return f"training in stages needs torch 2.13 or newer, and this is {torch.__version__}: pip install -U torch"
    return None


def pipeline_parallel(work: Workload, recipe: PipelineParallel) -> tuple[Workload, Effect]:
    """Each process keeps its stages of the model, and the optimizer's part of them.

    Raises:
        UnsupportedError: the model cannot be taken apart, or not into so many; or the loss is no mean and no sum.
    """
    _refuse(work)
    plan = planned(work, recipe)
    if isinstance(plan, str):  # what the recipes before it made of the batch
        raise UnsupportedError(plan)
    if plan.devices == 1:
        return work, Effect(notes=("one device along the pipeline axis: nothing to cut",))
    mesh = mesh_of(work.layout, work.device)["pipeline"]
    model = work.model
    compiles = _compiles(model)
    alike(model, mesh.get_group())
    operations, mode = _operations(work, recipe, plan)
    cuts, costs = _cut(work, recipe, plan, operations)
    graphs = stage_graphs(operations, cuts)
    kind, wraps = unwrapped(model)
    bodies = [StageModule(fx.GraphModule(model, graph), wraps, compiles) for graph in graphs]
    draws = checked(work, first_part(work, recipe, plan), operations, cuts, mode)
    dims = output_dims(operations, work, plan)
    mean, loss_dtype = reduction(work, recipe, plan, dims)
    given = named(kind, work.inputs)
    pipe = Pipeline(
        stages={number: bodies[number] for number in range(mesh.get_local_rank(), plan.stages, plan.devices)},
        count=plan.stages,
        layout=work.layout,
        device=work.device,
        schedule=plan.schedule,
        micro_batches=plan.micro_batches,
        batch_dim=recipe.batch_dim,
        kind=kind,
        names=tuple(operations.inputs),
        fixed={name: value for name, value in given.items() if name not in operations.inputs},
        outputs=_outputs(operations),
        output_dims=dims,
        mode=mode,
        draws=draws,
        mean=mean,
        loss_dtype=loss_dtype,
    )
    layers = _layers(operations, cuts)
    apart = _about_numbers(work, model, pipe)
    notes = [*apart, *_notes(work, pipe)]
    if compiles is not None:
        notes.append("each stage is compiled by itself, its weights not frozen into the program")
    held_alone(model, work.training.optimizer if work.training else None, pipe.stages, bodies)
    _attach(model, pipe)
    work = _training(work, pipe)
    told = plan.told(layers, max(costs.sent_bytes[cut] for cut in cuts))
    spread = work.spread or Spread()
    spread = replace(spread, parts=(*spread.parts, told), balance=costs.shares(cuts), bubble=plan.bubble)
    sizes = ", ".join(f"{size / 1e6:.3g} MB" for size in costs.held(cuts))
    notes.append(f"expected to hold with gradients, optimizer state and activations, by stage: {sizes}")
    return work.replace(spread=spread), Effect(
        tuple(name for names in layers for name in names), (), (told, *notes), apart=tuple(apart)
    )


def _refuse(work: Workload) -> None:
    if work.training is None:
        return
    if work.training.loss_scaling:
        raise UnsupportedError(
            "scaling a float16 loss looks at the gradients of all stages: use 'bf16', whose gradients need no scaling"
        )
    if work.training.teacher is not None:
        raise UnsupportedError(
            "a recipe before it compares with the outputs of the whole original: train with it alone"
        )


def _compiles(model: nn.Module) -> dict[str, Any] | None:
    """Take off the model what `compile` put around it: each stage is compiled by these settings in its place.

    Raises:
        UnsupportedError: they ask for CUDA graphs.
    """
    compiles = uncompiled(model)
    if compiles is not None and compiles["options"].get("triton.cudagraphs"):
        raise UnsupportedError(
            "compile's mode asks for CUDA graphs, which write over what a stage made of one micro-batch with the next, "
            "before its backward: use mode='default' or 'max-autotune-no-cudagraphs'"
        )
    return compiles


def _operations(work: Workload, recipe: PipelineParallel, plan: Plan) -> tuple[Operations, bool | None]:
    """What the model calls for a micro-batch; and its mode, if it calls something else in the other one."""
    model, inputs = work.model, first_part(work, recipe, plan)
    graph = traced(model, inputs)
    model.train(not work.trains)
    other = traced(model, inputs)
    model.train(work.trains)
    mode = None if _text(graph) == _text(other) else work.trains
    kind, wraps = unwrapped(model)
    return Operations(graph, model, tensors_of(named(kind, inputs)), wraps), mode


def _text(graph: fx.Graph) -> list[str]:
    return [node.format_node() or str(node.args) for node in graph.nodes]


def _cut(work: Workload, recipe: PipelineParallel, plan: Plan, operations: Operations) -> tuple[tuple[int, ...], Costs]:
    """Where to cut, and what the operations cost: measured on rank 0, and the same on every process."""
    places, reason = operations.places()
    in_flight = plan.micro_batches if plan.schedule == "gpipe" else min(plan.devices, plan.micro_batches)
    costs: Any = None
    if work.world.leads:
        work.backend.seed(work.seed)
        twin = replace(operations, model=copied(work.model))
        try:
            costs = twin.costs(work.trains, work.backend.synchronize, in_flight)
        except Exception as error:  # whatever a model may raise that is called in parts; the others wait to be told
            costs = f"{type(error).__name__}: {error}"
    costs = work.world.agree(costs)
    if isinstance(costs, str):
        raise UnsupportedError(f"{work.backend.model_name(work)} does not run operation by operation: {costs}")
    if recipe.split_at:
        cuts: tuple[int, ...] | None = tuple(sorted(_begins(operations, name, places) for name in recipe.split_at))
        if len(set(cuts)) < len(cuts):
            raise UnsupportedError(f"split_at={recipe.split_at!r}: two of them begin at the same place")
    else:
        cuts = balanced(costs, plan.stages, _capacity(work))
    if cuts is None:
        raise UnsupportedError(
            f"{plan.stages} stages were asked for, and {work.backend.model_name(work)} cannot be cut into so many that "
            f"fit: it has {len(places)} place(s) for a cut ({reason or 'one after each operation'})"
        )
    return cuts, costs


def expected(work: Workload, recipe: PipelineParallel) -> Stages | None:
    """The stages that the model would be cut into, measured in this process alone; None where it cannot be cut so.

    Args:
        work: with a layout along "pipeline"; nothing of it is changed.
    """
    plan = planned(work, recipe)
    if not isinstance(plan, Plan):
        return None
    try:
        operations, _ = _operations(work, recipe, plan)
        cuts, costs = _cut(work, recipe, plan, operations)
    except UnsupportedError:
        return None
    sizes = []
    for start, end in spans(cuts, len(operations.nodes)):
        held = {id(tensor): tensor for node in operations.nodes[start:end] for tensor in operations.tensors(node)}
        sizes.append(sum(tensor.numel() * tensor.element_size() for tensor in held.values()))
    cut_bytes = max(costs.sent_bytes[cut] for cut in cuts) * plan.parts
    return Stages(max(costs.shares(cuts)), max(sizes), cut_bytes)


def _begins(operations: Operations, name: str, places: Mapping[int, int]) -> int:
    """The place before the first operation of a layer.

    Raises:
        UnsupportedError: there is no such layer, or it cannot be cut there.
    """
    labels = [label(node) for node in operations.nodes]
    known = list(dict.fromkeys(each for each in labels))
    for place, each in enumerate(labels):
        if each == name or each.startswith((f"{name}.", f"{name}[")):
            if place in places:
                return place
            raise UnsupportedError(
                f"split_at={name!r}: {'it comes first' if not place else 'no cut is possible there'}"
            )
    raise UnsupportedError(f"split_at={name!r}: no layer is called so; {nearest(name, known)}")


def _capacity(work: Workload) -> float:
    """What one device can hold; a CPU's processes share their memory, and are not told."""
    return torch.cuda.mem_get_info()[1] if work.device == "cuda" else math.inf


def _layers(operations: Operations, cuts: tuple[int, ...]) -> list[list[str]]:
    """The layers with weights of each stage; where it has none, what it calls."""
    nodes, found = operations.nodes, []
    for start, end in spans(cuts, len(nodes)):
        weighted = [label(node) for node in nodes[start:end] if next(operations.tensors(node), None) is not None]
        found.append(list(dict.fromkeys(weighted or [label(node) for node in nodes[start:end]])))
    return found


def _outputs(operations: Operations) -> tuple[list[Any], Any]:
    leaves, structure = operations.outputs
    return [None if isinstance(leaf, fx.Node) else leaf for leaf in leaves], structure


def _about_numbers(work: Workload, model: nn.Module, pipe: Pipeline) -> list[str]:
    """In what losses may differ from those of the whole batch."""
    notes = []
    norms = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    if norms and work.trains:
        notes.append(
            f"{', '.join(norms)}: statistics of each micro-batch, so losses differ from those of the whole batch"
        )
    if pipe.draws:
        notes.append("each process draws random numbers of its own: dropout is other than in one process")
    return notes


def _notes(work: Workload, pipe: Pipeline) -> list[str]:
    notes = []
    if pipe.mode is not None:
        how = "training" if pipe.mode else "inference"
        notes.append(f"its forward looks at self.training: the result is for {how} alone")
    if work.training and _hooks(work.training.optimizer):
        notes.append(
            "in the optimizer's hooks torch's clip_grad_norm_ sees the norm over all stages; others see their own"
        )
    if work.training and (parts := work.training.micro_batches) > 1:
        notes.append(f"accumulate's {parts} parts of a batch are further micro-batches of the schedule")
    if work.training and not pipe.mean:
        notes.append("the loss is a sum over the batch: those of the micro-batches are added up")
    notes.append("all processes of a pipeline are given the same batch; each one's model holds its stage's parameters")
    return notes


def _hooks(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer._optimizer_step_pre_hooks)


def _attach(model: nn.Module, pipe: Pipeline) -> None:
    setattr(model, PIPELINE, pipe)

    def forward(self, *args, **kwargs):
        return infer(self, Inputs(args, kwargs))

    derive(model, forward=forward)


def _training(work: Workload, pipe: Pipeline) -> Workload:
    if work.training is None:
        return work
    training = replace(work.training, gradients=partial(gradients, loss=work.training.loss), micro_batches=1)
    if _hooks(training.optimizer):
        training = replace(training, around=(*training.around, partial(norms_of_all, pipe.layout, pipe.device)))
    return work.replace(training=training)
