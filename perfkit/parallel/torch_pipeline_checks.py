"""Whether a torch model in stages is what it was: its outputs, what they are along the batch, and its loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from perfkit._batch import sliced
from perfkit._errors import UnsupportedError
from perfkit._workload import Inputs, Workload
from perfkit.backends.torch_copies import copied
from perfkit.backends.torch_surgery import map_tensors, tensors_in, unwrapped
from perfkit.parallel.batch import length
from perfkit.parallel.pipeline_plan import Plan
from perfkit.parallel.torch_pipe import StageModule, micro_batches
from perfkit.parallel.torch_split import random_state
from perfkit.parallel.torch_stages import Operations, stage_graphs
from perfkit.parallel.torch_trace import named, tensors_of

if TYPE_CHECKING:
    from perfkit.recipes.pipeline_parallel import PipelineParallel

ROUNDING = 2.0**-24 * 1000
"""Of numbers added up in another order: some hundreds of them, through a few layers."""


def checked(work: Workload, inputs: Inputs, operations: Operations, cuts: Sequence[int], mode: bool | None) -> bool:
    """Whether the model draws random numbers; after making sure that its stages compute what it does.

    Where it draws some, stages are compared in the other mode: what is sent lies in memory as it is read, and torch
    draws numbers in the order in which things lie.

    Raises:
        UnsupportedError: they compute something else.
    """
    work.backend.seed(work.seed)
    before = random_state(work.device)
    with torch.no_grad():
        copied(work.model)(*inputs.args, **inputs.kwargs)
    draws = not torch.equal(before, random_state(work.device))
    reason = _off(work, inputs, operations, (), work.model.training)
    if reason is None and not (draws and mode is not None):
        reason = _off(work, inputs, operations, cuts, work.model.training and not draws)
    if reason := work.world.agree(reason):
        raise UnsupportedError(
            f"the stages of {work.backend.model_name(work)} do not compute what its forward does ({reason}): it "
            "depends on more than what goes from layer to layer; split_at= other layers, or use data_parallel"
        )
    return draws


def _off(work: Workload, inputs: Inputs, operations: Operations, cuts: Sequence[int], trains: bool) -> str | None:
    """How far outputs of stages are from the model's; None where that is no more than rounding."""
    whole, one = (copied(work.model).train(trains) for _ in range(2))
    with torch.no_grad():
        work.backend.seed(work.seed)
        expected = list(tensors_in(whole(*inputs.args, **inputs.kwargs)))
        work.backend.seed(work.seed)
        received: tuple[torch.Tensor, ...] = ()
        try:
            for graph in stage_graphs(operations, cuts):
                received = StageModule(fx.GraphModule(one, graph), operations.wraps).compute(
                    received, operations.inputs
                )
                received = tuple(tensor.clone() for tensor in received)  # as what is sent: of its own
        except Exception as error:  # whatever a model may raise that is called in parts
            return f"{type(error).__name__}: {error}"
    return _differs(received, expected)


def first_part(work: Workload, recipe: PipelineParallel, plan: Plan) -> Inputs:
    """The inputs of the first micro-batch."""
    parts = sliced(length(work, recipe.batch_dim), plan.parts, 0, recipe.batch_dim)
    args, kwargs = map_tensors(parts, (work.inputs.args, dict(work.inputs.kwargs)))
    return Inputs(args, kwargs)


def _differs(found: Sequence[torch.Tensor], expected: list[torch.Tensor]) -> str | None:
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in expected]:
        return "outputs of other shapes"
    for mine, wanted in zip(found, expected, strict=True):
        off = (mine.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp_min(1e-30)
        if not off <= ROUNDING:
            return f"outputs are off by {float(off):.2g} of the largest"
    return None


def output_dims(operations: Operations, work: Workload, plan: Plan) -> tuple[int | None, ...]:
    """Of each output tensor the dimension that grows with the rows; None where there is none."""
    if plan.parts == 1:
        return tuple(0 for leaf in operations.outputs[0] if isinstance(leaf, fx.Node))
    whole = replace(operations, inputs=tensors_of(named(unwrapped(work.model)[0], work.inputs)))
    dims: list[int | None] = []
    for leaf in operations.outputs[0]:
        if isinstance(leaf, fx.Node):
            small, large = operations.values[leaf].shape, whole.values[leaf].shape
            grown = [dim for dim in range(len(small)) if small[dim] * plan.parts == large[dim]]
            dims.append(grown[0] if len(grown) == 1 and len(small) == len(large) else None)
    return tuple(dims)


def reduction(
    work: Workload, recipe: PipelineParallel, plan: Plan, dims: tuple[int | None, ...]
) -> tuple[bool, torch.dtype | None]:
    """Whether the loss of a batch is the mean of those of its parts, False where it is their sum; and its dtype.

    Raises:
        UnsupportedError: it is neither, so micro-batches have other gradients.
    """
    if work.training is None:
        return True, None
    twin, count, loss = copied(work.model), plan.parts, work.training.loss
    with torch.no_grad():
        work.backend.seed(work.seed)
        outputs = twin(*work.inputs.args, **work.inputs.kwargs)
        value = loss(outputs, work.training.targets)
        targets = micro_batches(work.training.targets, length(work, recipe.batch_dim), count, recipe.batch_dim)
        losses = [float(loss(_rows_of(outputs, dims, count, index), part)) for index, part in enumerate(targets)]
    whole, total = float(value), sum(losses)
    found = work.world.agree([abs(each - whole) <= ROUNDING * abs(whole) for each in (total / count, total)])
    if not any(found):
        raise UnsupportedError(
            f"the loss is no mean over the batch, and no sum: {whole:.6g} of the whole example batch, and of its "
            f"{count} parts {total / count:.6g} on average; so micro-batches would have other gradients. Use a mean "
            "over rows, or micro_batches=1"
        )
    return found[0], value.dtype


def _rows_of(outputs: Any, dims: tuple[int | None, ...], count: int, index: int) -> Any:
    """Part number `index` of outputs of a whole batch."""
    along = iter(dims)

    def part(tensor: torch.Tensor) -> torch.Tensor:
        dim = next(along)
        return tensor if dim is None else tensor.chunk(count, dim)[index]

    return map_tensors(part, outputs)
