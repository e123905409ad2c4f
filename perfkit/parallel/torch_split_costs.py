"""What one process' part of a layer that `tensor_parallel` splits takes and sends, measured for `planning`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from perfkit._errors import UnsupportedError
from perfkit._workload import Inputs
from perfkit.backends.torch_surgery import map_tensors, tensors_in
from perfkit.parallel.planning_parts import Split
from perfkit.parallel.planning_timing import seconds_of
from perfkit.parallel.torch_attention import part_alone
from perfkit.parallel.torch_by_heads import ThreeParallel

if TYPE_CHECKING:
    from perfkit.parallel.torch_costs import Step

BLOCK, REPEATS = 3, 5
"""Passes of a layer that are timed together, and how often."""


def splits_of(step: Step, layers: Mapping[str, tuple[float, int, int]], parts: int) -> tuple[Split, ...]:
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
            learning += bytes_of(bias)
        if learning and split.told != "rows":  # each process has a part of what these learn
            sends.append(("all_reduce", learning))
        left = part_of(layer, inputs[name], parts, rows=split.told == "rows")
        found.append(Split(name, seconds, left, sum(map(bytes_of, layer.parameters())), tuple(sends)))
    return tuple(found)


def _whole_bias(layer: Any, style: Any) -> torch.Tensor | None:
    """What each process holds the whole of beside its part of a layer, and learns from a part of its outputs."""
    if isinstance(layer, nn.MultiheadAttention):
        return layer.in_proj_bias
    return layer.bias if isinstance(style, ThreeParallel) else None


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
    for _ in range(REPEATS):
        for (side, inputs), found in zip(sides, times, strict=True):
            found.append(seconds_of(partial(_both_passes, side, inputs), BLOCK))
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


def bytes_of(tensor: torch.Tensor) -> int:
    """Of its numbers."""
    return tensor.numel() * tensor.element_size()
