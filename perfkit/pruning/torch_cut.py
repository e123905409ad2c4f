"""Removing units: from weights, buffers and optimizer state, and the proof that nothing else changed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from perfkit._errors import UnsupportedError
from perfkit._workload import Workload
from perfkit.backends.torch_copies import copied
from perfkit.backends.torch_surgery import in_float64, tensors_in, widened
from perfkit.pruning.torch_layers import label
from perfkit.pruning.torch_units import NONE, Slice, Structure

SAME = 1e-5
"""Relative difference of two float64 runs that is rounding, also where a model does single steps in float32."""

SAME_AS_IT_IS = 1e-3
"""The same, of a model that does not run in float64. What is wrong with a unit shows as far more than either."""


def cut(model: nn.Module, structure: Structure, removed: torch.Tensor, optimizer: Any = None) -> None:
    """Remove these units in place: parameters stay the objects they are, so that their optimizer goes on with them.

    Args:
        removed: bool, (structure.count,).

    Raises:
        UnsupportedError: the optimizer has a state that cannot be cut; nothing was changed then.
    """
    cuts = defaultdict(list)
    for part in structure.slices:
        stays = _stays(part, removed)
        if not bool(stays.all()):
            cuts[part.module, part.tensor].append((part.dim, stays.nonzero().flatten()))
    tensors = {key: getattr(model.get_submodule(key[0]), key[1]) for key in cuts}
    states = _states(model, optimizer, {key: tensors[key] for key in cuts}) if optimizer is not None else []
    for key, tensor in tensors.items():
        smaller = _cut(tensor.detach(), cuts[key])
        if isinstance(tensor, nn.Parameter):
            tensor.data, tensor.grad = smaller, None
        else:
            setattr(model.get_submodule(key[0]), key[1], smaller)
    for state, name, key in states:
        state[name] = _cut(state[name], cuts[key])
    for name in {module for module, _ in cuts}:
        _correct(model.get_submodule(name))


def mask(model: nn.Module, structure: Structure, removed: torch.Tensor) -> None:
    """Set to zero in place what makes these units."""
    with torch.no_grad():
        for part in structure.slices:
            if part.produced:
                tensor = getattr(model.get_submodule(part.module), part.tensor)
                gone = ~_stays(part, removed).to(tensor.device)
                tensor.masked_fill_(gone.reshape([-1 if dim == part.dim else 1 for dim in range(tensor.ndim)]), 0)


def verified(work: Workload, structure: Structure, removed: torch.Tensor) -> tuple[torch.Tensor, dict[str, str]]:
    """Those of the units that can go, and for the layers whose units cannot, why.

    Removing must do what setting to zero does. Where a model does not run without some units, because its forward has
    sizes written in it, or comes to something else, because it regroups them, those stay.
    """
    check = _Check(work, structure)
    if check.failure(removed) is None:
        return removed, {}
    good, refused = torch.zeros_like(removed), {}
    for layers, part in _independent(structure, removed):
        why = check.failure(part)
        if why is None:
            good |= part
        else:
            refused |= dict.fromkeys(layers, why)
    why = check.failure(good)
    if why is not None:
        return torch.zeros_like(removed), dict.fromkeys(structure.axes, why)
    return good, refused


class _Check:
    """Runs the model on the example inputs with units set to zero, and without them."""

    def __init__(self, work: Workload, structure: Structure):
        self.work, self.structure = work, structure
        self.wide, self.same = True, SAME
        try:
            self._outputs(nn.Module.eval)
        except Exception:  # whatever a model may raise in a precision it was not written for
            self.wide, self.same = False, SAME_AS_IT_IS

    def failure(self, removed: torch.Tensor) -> str | None:
        """What goes wrong without these units; None where nothing does."""
        masked = self._outputs(lambda model: mask(model, self.structure, removed))
        try:
            outputs = self._outputs(lambda model: cut(model, self.structure, removed))
        except Exception as error:
            line = (str(error).strip() or type(error).__name__).splitlines()[0]
            return f"the model does not run without its units, as where sizes stand in its forward ({line[:120]})"
        if [each.shape for each in outputs] != [each.shape for each in masked]:
            return "without its units the outputs change their shape"
        for new, old in zip(outputs, masked, strict=True):
            new, old = (widened(each.detach()).nan_to_num() for each in (new, old))
            if float((new - old).norm()) > self.same * float(old.norm()):
                return "removing its units is not what setting them to zero is: they are regrouped, or do not stay zero"
        return None

    def _outputs(self, change: Callable[[nn.Module], None]) -> list[torch.Tensor]:
        model, args, kwargs = copied(self.work.model).eval(), self.work.inputs.args, self.work.inputs.kwargs
        change(model)
        if self.wide:
            model, args, kwargs = in_float64(model, args, kwargs)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(self.work.seed)
            return list(tensors_in(model(*args, **kwargs)))


def _independent(structure: Structure, removed: torch.Tensor) -> Iterable[tuple[list[str], torch.Tensor]]:
    """Sets of layers that share no units with each other, and the units to be removed from them."""
    sets: list[tuple[list[str], set[int]]] = []
    for layer, parts in structure.axes.items():
        units = {unit for part in parts for unit in part[removed[part]].tolist()}
        layers = [layer]
        for other in [each for each in sets if each[1] & units]:
            sets.remove(other)
            layers, units = other[0] + layers, other[1] | units
        if units:
            sets.append((layers, units))
    for layers, units in sets:
        part = torch.zeros_like(removed)
        part[list(units)] = True
        yield layers, part


def _stays(part: Slice, removed: torch.Tensor) -> torch.Tensor:
    padded = torch.cat([removed, removed.new_zeros(1)])  # the last entry is that of NONE
    return ~padded[part.units.to(removed.device)]


assert NONE == -1, "indexes the last entry"


def _cut(tensor: torch.Tensor, cuts: list[tuple[int, torch.Tensor]]) -> torch.Tensor:
    for dim, stays in cuts:
        tensor = tensor.index_select(dim, stays.to(tensor.device))
    return tensor


def _states(model: nn.Module, optimizer: torch.optim.Optimizer, cuts: dict) -> list[tuple[dict, str, tuple]]:
    """The entries of the optimizer's state that have the shape of a parameter that is cut."""
    found, kind = [], type(optimizer).__name__
    for key, tensor in cuts.items():
        state = optimizer.state.get(tensor, {})
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == tensor.shape:
                found.append((state, name, key))
            elif not (value is None or isinstance(value, (bool, int, float)) or getattr(value, "ndim", 1) == 0):
                where = ".".join(filter(None, (label(model, key[0]), key[1])))
                shape = f"shape {list(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
                raise UnsupportedError(
                    f"the state {name!r} that {kind} keeps for {where} ({shape}) cannot be cut with the weight of "
                    f"shape {list(tensor.shape)}: prune before training, or with a new optimizer"
                )
    return found


def _correct(module: nn.Module) -> None:
    """The sizes that a layer says it has, read off its weights."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.conv._ConvNd):
        first, second = module.weight.shape[:2]
        if module.transposed:
            module.in_channels, module.out_channels = first, second * module.groups
        elif module.groups > 1:  # depthwise: one group for each input channel
            module.groups = module.in_channels = module.in_channels * first // module.out_channels
            module.out_channels = first
        else:
            module.out_channels, module.in_channels = first, second
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        held = module.weight if module.weight is not None else module.running_mean
        module.num_features = len(held)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)
    elif isinstance(module, nn.RNNBase):
        module.hidden_size, module.input_size = module.weight_hh_l0.shape[1], module.weight_ih_l0.shape[1]
        module.flatten_parameters()
