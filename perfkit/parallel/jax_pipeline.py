"""Pipeline parallelism in JAX: where the model is cut, and the workload on a mesh with a pipeline axis."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from perfkit._batch import sliced
from perfkit._errors import UnsupportedError, nearest
from perfkit._report import Effect
from perfkit._workload import Workload
from perfkit.backends.jax_quantized import is_quantized
from perfkit.backends.jax_trees import layer_of, leaves_with_names
from perfkit.parallel.balance import Costs, balanced, spans
from perfkit.parallel.batch import length
from perfkit.parallel.jax_mesh import mesh_of
from perfkit.parallel.jax_piped import Piped, operations_of
from perfkit.parallel.jax_stages import Operations
from perfkit.parallel.jax_turns import Cuts
from perfkit.parallel.pipeline_plan import Plan, planned
from perfkit.parallel.spread import Spread

if TYPE_CHECKING:
    from perfkit.recipes.pipeline_parallel import PipelineParallel


def refusal(work: Workload, recipe: PipelineParallel) -> str | None:
    """Why it is not there for this workload; None where it is."""
    if work.layout is not None and work.layout.size("tensor") > 1:
        return (
            "in JAX the weights of a stage lie packed in one array, which cannot be split layer by layer: leave "
            "tensor_parallel out, or share the batch by data_parallel"
        )
    if recipe.schedule in ("1f1b", "interleaved"):
        return (
            f"schedule={recipe.schedule!r} is torch's: JAX differentiates the whole pipeline, so all forwards come "
            "before all backwards: use 'gpipe'"
        )
    if work.layout is not None and recipe.stages not in (None, work.layout.size("pipeline")):
        return "in JAX each device has one stage: leave stages out"
    return None


def pipeline_parallel(work: Workload, recipe: PipelineParallel) -> tuple[Workload, Effect]:
    """Each device holds the weights of its stage, packed, and micro-batches follow each other through the devices.

    Raises:
        UnsupportedError: the model cannot be cut into so many stages, or its state cannot go from one micro-batch to
            the next.
    """
    plan, model = planned(work, recipe), work.model
    if isinstance(plan, str):  # what the recipes before it made of the batch
        raise UnsupportedError(plan)
    if plan.devices == 1:
        return work, Effect(notes=("one device along the pipeline axis: nothing to cut",))
    if work.training and work.training.teacher is not None:
        raise UnsupportedError(
            "a recipe before it compares with the outputs of the whole original: train with it alone"
        )
    named, _ = leaves_with_names(model.params)
    if quantized := [name for name, leaf in named if is_quantized(leaf)]:
        raise UnsupportedError(f"{quantized[0]} is quantized: stages hold their weights as plain numbers")
    names = [name for name, _ in named]
    args, kwargs = jax.tree.map(
        sliced(length(work, recipe.batch_dim), plan.parts, 0, recipe.batch_dim),
        (work.inputs.args, dict(work.inputs.kwargs)),
    )
    function = model.function()
    operations = operations_of(function, model.params, model.rest, args, kwargs)
    names = [names[index] if row is None else f"{names[index]}[{row}]" for index, row in operations.parts]
    operations = replace(operations, layers=tuple(_layer(name) for name in names))
    places, costs = _cut(work, recipe, plan, operations, (args, kwargs))
    owned = [
        list(dict.fromkeys(each for eqn in operations.eqns[start:end] for each in sorted(operations.weights(eqn))))
        for start, end in spans(places, len(operations.eqns))
    ]
    owned[0] += sorted(set(range(len(names))) - set().union(*owned))  # what no stage reads is the first's
    cuts = Cuts(
        places,
        len(operations.eqns),
        operations.parts,
        tuple(map(tuple, owned)),
        plan.micro_batches,
        recipe.batch_dim,
        _batched(work, recipe.batch_dim),
        _output_dims(work, plan, (args, kwargs)),
    )
    placement = Piped(mesh_of(work.layout), model, cuts)
    if work.training:
        _check_optimizer(work, placement)
    layers = [list(dict.fromkeys(operations.layers[index] for index in each)) for each in owned]
    for stage, (start, end) in enumerate(spans(places, len(operations.eqns))):  # one without weights, by what it does
        layers[stage] = layers[stage] or [eqn.primitive.name for eqn in operations.eqns[start:end]]
    told = replace(plan, schedule="gpipe").told(layers, max(costs.sent_bytes[place] for place in places))
    spread = work.spread or Spread()
    spread = replace(spread, parts=(*spread.parts, told), balance=costs.shares(places), bubble=plan.bubble)
    apart = _about_numbers(work, operations)
    notes = _notes(work)
    work = work.replace(model=replace(model, placement=placement), spread=spread)
    return work, Effect(tuple(name for each in layers for name in each), (), (told, *notes, *apart), apart=tuple(apart))


def _notes(work: Workload) -> list[str]:
    """How it runs."""
    holds = "each device holds the weights of its stage"
    if work.trains:
        holds = "each device holds the weights and optimizer state of its stage; a backward computes activations again"
    notes = [holds, f"one program by jax.shard_map over {work.layout}, on {work.world.size} process(es)"]
    if work.training and (passes := work.training.micro_batches) > 1:
        notes.append(f"accumulate's {passes} parts of a batch go through the stages one after the other")
    return notes


def _about_numbers(work: Workload, operations: Operations) -> list[str]:
    """In what losses may differ from those of the whole batch."""
    notes = []
    if operations.carried:
        names = [name for name, _ in leaves_with_names(work.model.rest)[0]]
        norms = ", ".join(
            dict.fromkeys(names[number].rpartition(".")[0] or names[number] for number in operations.carried)
        )
        notes.append(f"{norms}: statistics of each micro-batch, so losses differ from those of the whole batch")
    if operations.draws and operations.alone:
        notes.append("each micro-batch draws random numbers of its own, as if they came one after the other")
    if operations.draws and not operations.alone:
        notes.append(
            "random numbers come from a key among the inputs, and are the same in each micro-batch: with the key in "
            "the model (nnx.Rngs) each draws its own"
        )
    return notes


def _cut(
    work: Workload, recipe: PipelineParallel, plan: Plan, operations: Operations, batch: Any
) -> tuple[tuple[int, ...], Costs]:
    """Before which operations to cut; measured on rank 0, and the same on every process."""
    costs: Any = None
    if work.world.leads:
        whole = jax.tree.leaves(work.model.params)
        parts = [whole[index] if row is None else whole[index][row] for index, row in operations.parts]
        try:
            costs = operations.costs([*parts, *jax.tree.leaves((work.model.rest, batch))], work.trains)
        except Exception as error:  # whatever an operation may raise by itself; the others wait to be told
            costs = f"{type(error).__name__}: {error}"
    costs = work.world.agree(costs)
    if isinstance(costs, str):
        raise UnsupportedError(f"{work.model.name} does not run operation by operation: {costs}")
    if recipe.split_at:
        return tuple(sorted(_begins(operations, name) for name in recipe.split_at)), costs
    places = balanced(costs, plan.stages, math.inf)
    if places is None:
        raise UnsupportedError(
            f"{plan.stages} stages were asked for, and {work.model.name} cannot be cut into so many: it has "
            f"{len(costs.sent_bytes)} place(s) where nothing but floating-point arrays goes on, with no weight used on "
            f"both sides{_tied(operations)}. data_parallel(shard=True) divides weights and optimizer state too, and "
            "needs no cut"
        )
    return places, costs


def _tied(operations: Operations) -> str:
    """The layer that stands most in the way of cutting, where one is used over half of the operations or more."""
    reach = {layer: last - first for layer, (first, last) in operations.reach().items() if isinstance(layer, str)}
    widest = max(reach, key=lambda layer: reach[layer], default="")
    if not widest or 2 * reach[widest] < len(operations.eqns):
        return ""
    first, last = operations.reach()[widest]
    return f" ({widest} is used from operation {first + 1} to {last + 1} of {len(operations.eqns)})"


def _layer(name: str) -> str:
    """The layer of a part: "conv1" of "conv1.kernel"; "blocks[2]" of "blocks.kernel[2]", whose parts are one block."""
    whole, bracket, row = name.partition("[")
    return f"{whole.rpartition('.')[0] or whole}[{row}" if bracket else layer_of(whole)


def _begins(operations: Operations, name: str) -> int:
    layers = operations.layers
    if name not in layers:
        raise UnsupportedError(
            f"split_at={name!r}: no layer is called so; {nearest(name, list(dict.fromkeys(layers)))}"
        )
    first = next(
        (
            index
            for index, eqn in enumerate(operations.eqns)
            if any(layers[weight] == name for weight in operations.weights(eqn))
        ),
        None,
    )
    if first not in operations.places():
        raise UnsupportedError(f"split_at={name!r}: no cut is possible there")
    return first


def _batched(work: Workload, batch_dim: int) -> int:
    """The number of an input that is as long as the batch: a key of random numbers before it may not be."""
    shapes = map(jnp.shape, jax.tree.leaves((work.inputs.args, dict(work.inputs.kwargs))))
    rows = length(work, batch_dim)
    return next(number for number, shape in enumerate(shapes) if shape[batch_dim : batch_dim + 1] == (rows,))


def _output_dims(work: Workload, plan: Plan, batch: Any) -> tuple[int, ...]:
    """Of each output the dimension of the rows.

    Raises:
        UnsupportedError: one has none: what micro-batches give could not be put together.
    """
    function, model = work.model.function(), work.model
    whole_of = work.inputs.args, dict(work.inputs.kwargs)
    shapes = [
        [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(function, model.params, model.rest, *args, **kwargs)[0])]
        for args, kwargs in (batch, whole_of)
    ]
    dims = []
    for small, large in zip(*shapes, strict=True):
        grown = [dim for dim in range(len(small)) if small[dim] * plan.parts == large[dim] and plan.parts > 1]
        if len(grown) != 1 and plan.parts > 1:
            raise UnsupportedError(
                f"an output of shape {list(large)} has no dimension for the rows of the batch: what micro-batches give "
                "cannot be put together; use data_parallel"
            )
        dims.append(grown[0] if grown else 0)
    return tuple(dims)


def _check_optimizer(work: Workload, placement: Piped) -> None:
    """Refuse an optimizer that treats a parameter by more than its numbers one by one, or by the norm of all.

    Raises:
        UnsupportedError: its updates of packed parameters are others.
    """
    optimizer, random = work.training.optimizer, np.random.default_rng(work.seed)
    params = jax.tree.map(np.asarray, work.model.params)
    gradients = jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(leaf.dtype), params)
    try:
        expected = placement.packing.rows(_updates(optimizer, gradients, params))
        found = _updates(optimizer, placement.packing.rows(gradients), placement.packing.rows(params))
        off = max(
            float(np.abs(found[name] - wanted).max() / max(np.abs(wanted).max(), 1e-30))
            for name, wanted in expected.items()
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UnsupportedError(
            f"the optimizer does not take packed parameters: {type(error).__name__}: {error}"
        ) from error
    if not off <= 1e-4:
        raise UnsupportedError(
            "the optimizer looks at whole parameters, by their shape or name (as adafactor, lamb and masks do), and "
            "stages hold theirs packed: use one that updates number by number, such as adam or sgd"
        )


def _updates(optimizer: Any, gradients: Any, params: Any) -> Any:
    """In one program, as steps of training have them: each operation by itself would be compiled by itself."""

    def update(gradients: Any, params: Any) -> Any:
        return optimizer.update(gradients, optimizer.init(params), params)[0]

    return jax.tree.map(np.asarray, jax.jit(update)(gradients, params))
