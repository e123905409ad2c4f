"""Which units to remove: how important each is, and how many may go."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from perfkit._errors import UnsupportedError
from perfkit._workload import Workload
from perfkit.backends.torch_copies import copied
from perfkit.backends.torch_surgery import tensors_in
from perfkit.pruning.amounts import kept
from perfkit.pruning.torch_layers import label
from perfkit.pruning.torch_units import NONE, Slice, Structure


def chosen(structure: Structure, scores: torch.Tensor, amount: float, round_to: int) -> torch.Tensor:
    """The units to remove, the least important of each set of layers that share theirs: bool, (structure.count,).

    Layers that share only some of their units (after a concatenation) are ranked within what they share, so that each
    loses its share.
    """
    removed = torch.zeros(structure.count, dtype=torch.bool)
    for alike in _alike(structure):
        order = sorted(alike, key=lambda unit: (float(scores[unit]), unit))
        removed[order[: len(order) - kept(len(order), amount, round_to)]] = True
    return removed


def balanced(structure: Structure) -> Structure:
    """The same, with recurrent layers fixed that could not lose as many units in each layer and direction.

    nn.LSTM and its like have one `hidden_size` for all of them.
    """
    while uneven := _uneven(structure):
        layer, reason = uneven
        fixed = dict(structure.fixed)
        for part in structure.axes[layer]:
            fixed |= {unit: fixed.get(unit, reason) for unit in part.tolist()}
        structure = dataclasses.replace(structure, fixed=fixed)
    return structure


def _uneven(structure: Structure) -> tuple[str, str] | None:
    alike = {unit: index for index, units in enumerate(_alike(structure)) for unit in units}
    for layer, parts in structure.axes.items():
        if len(parts) < 2 or not any(bool(structure.free(part).any()) for part in parts):
            continue
        reason = f"is one of the hidden units of {layer}, whose layers and directions must lose as many each"
        for part in parts:
            why = [structure.fixed[unit] for unit in part.tolist() if unit in structure.fixed]
            if why:
                return layer, why[0]
            if len({alike[unit] for unit in part.tolist()}) > 1 or len(set(part.tolist())) < len(part):
                return layer, reason
    return None


def _alike(structure: Structure) -> list[list[int]]:
    """The free units, together where they occur in the same layers as often."""
    places: dict[int, Counter] = defaultdict(Counter)
    for layer, parts in structure.axes.items():
        for index, part in enumerate(parts):
            for unit in part[structure.free(part)].tolist():
                places[unit][layer, index] += 1
    sets = defaultdict(list)
    for unit, where in places.items():
        sets[tuple(sorted(where.items()))].append(unit)
    return list(sets.values())


def scores(structure: Structure, work: Workload, criterion: str) -> torch.Tensor:
    """How important each unit is: (structure.count,), float64. Units that are zero already come before all others.

    "magnitude": the L2 norm of the weights that make the unit. "taylor": Σ |weight × gradient| over the same, of the
    loss on the example batch. "activation": the mean |output| of the unit, on the calibration data where there is some.

    Source: Molchanov et al., "Importance estimation for neural network pruning" (2019), for "taylor".
    """
    if criterion == "magnitude":
        return magnitudes(structure, work.model)
    found = _activations(structure, work) if criterion == "activation" else _taylor(structure, work)
    return torch.where(_dead(structure, work.model), -1.0, found)


def magnitudes(structure: Structure, model: nn.Module) -> torch.Tensor:
    """The L2 norms of the weights that make the units; -1 for units that are zero."""
    squares = torch.zeros(structure.count, dtype=torch.float64)
    for part, weight in _makers(structure, model):
        add(squares, part.units, _along(weight.detach().abs().double().square(), part.dim))
    return torch.where(_dead(structure, model), -1.0, squares.sqrt())


def _taylor(structure: Structure, work: Workload) -> torch.Tensor:
    found = torch.zeros(structure.count, dtype=torch.float64)
    for part, weight in _makers(structure, _with_gradients(work)):
        add(found, part.units, _along((weight.detach() * weight.grad).abs().double(), part.dim))
    return found


def add(scores: torch.Tensor, units: torch.Tensor, values: torch.Tensor) -> None:
    """`scores[units] += values`, where there is a unit."""
    there = units != NONE
    scores.index_add_(0, units[there], values[there].to(scores.dtype))


def _along(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Sums over all other dimensions."""
    return values.movedim(dim, 0).flatten(1).sum(1).cpu() if values.ndim > 1 else values.cpu()


def _makers(structure: Structure, model: nn.Module) -> Iterable[tuple[Slice, torch.Tensor]]:
    """The weight matrices that make units."""
    for part in structure.slices:
        tensor = getattr(model.get_submodule(part.module), part.tensor)
        if part.produced and tensor.ndim > 1:
            yield part, tensor


def _dead(structure: Structure, model: nn.Module) -> torch.Tensor:
    """The units that are zero whatever comes in."""
    weight = torch.zeros(structure.count, dtype=torch.float64)
    for part in structure.slices:
        tensor = getattr(model.get_submodule(part.module), part.tensor)
        if part.produced and isinstance(tensor, nn.Parameter):
            add(weight, part.units, _along(tensor.detach().abs().double(), part.dim))
    return weight == 0


def _with_gradients(work: Workload) -> nn.Module:
    model = copied(work.model)
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(work.seed)
        model.zero_grad()
        work.training.loss(model(*work.inputs.args, **work.inputs.kwargs), work.training.targets).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        elif not bool(torch.isfinite(parameter.grad).all()):
            raise UnsupportedError(f"criterion='taylor': the gradient of {name} is not finite on the example batch")
    return model


def _activations(structure: Structure, work: Workload) -> torch.Tensor:
    """Mean |output| of each unit. Of the lower layers of a recurrent stack only the last states can be seen."""
    model = copied(work.model).eval()
    sums, calls = torch.zeros(structure.count, dtype=torch.float64), torch.zeros(structure.count, dtype=torch.float64)

    def watch(parts: tuple[torch.Tensor, ...]):
        def see(module, _inputs, outputs):
            if isinstance(module, nn.RNNBase):
                sequence, states = outputs
                state = states[0] if isinstance(states, tuple) else states
                means = [each.abs().reshape(-1, each.shape[-1]).mean(0) for each in state]
                top = sequence.data if isinstance(sequence, PackedSequence) else sequence
                means[-len(means) // module.num_layers :] = (
                    top.abs().reshape(-1, top.shape[-1]).mean(0).split(module.hidden_size)
                )
            else:
                channel = outputs.ndim - 1 - len(getattr(module, "kernel_size", ()))
                means = [outputs.abs().movedim(channel, 0).flatten(1).mean(1)]
            for part, mean in zip(parts, means, strict=True):
                add(sums, part, mean.double().cpu())
                add(calls, part, torch.ones(len(part)))

        return see

    for name, module in model.named_modules():
        if (parts := structure.axes.get(label(model, name))) is not None:
            module.register_forward_hook(watch(parts))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(work.seed)
        for inputs in work.calibration or (work.inputs,):
            _ = list(tensors_in(model(*inputs.args, **inputs.kwargs)))
    return sums / calls.clamp_min(1)
