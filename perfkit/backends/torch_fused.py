"""perfkit's kernels in torch models: which layers get them, found by running the model once.

A layer is swapped where, on the example inputs, a kernel of ours is picked for it; the others are told with the reason.
Without example inputs every layer that could be is swapped, and each call picks its own implementation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from perfkit._report import Effect
from perfkit._workload import Workload
from perfkit.backends import torch_conv_forwards as forwards
from perfkit.backends import torch_fused_conv as convolutions
from perfkit.backends import torch_fused_group as grouped
from perfkit.backends import torch_fused_int8 as integers
from perfkit.backends import torch_fused_linear as linears
from perfkit.backends import torch_fused_rnn as recurrent
from perfkit.backends.fused_layers import LEFT, UNKNOWN, Layer, effect
from perfkit.backends.torch_copies import copied
from perfkit.backends.torch_source import Unreadable
from perfkit.backends.torch_surgery import WHOLE, derive, on_grid
from perfkit.kernels._op import trace

if TYPE_CHECKING:
    from perfkit.recipes.fused_kernels import FusedKernels

_LAYERS = (nn.Conv2d, nn.RNNBase)


@dataclass(kw_only=True)
class Part(Layer):
    """A layer, and the module that it is; whether it runs on integers, or would in floats."""

    name: str
    module: nn.Module
    on_integers: bool = False
    in_floats: bool = False


def fused(work: Workload, recipe: FusedKernels) -> tuple[Workload, Effect]:
    """Swap, in place, the layers for which a kernel of ours is picked.

    Raises:
        InvalidInputError: a pattern of include or exclude matches no layer.
    """
    kinds = _LAYERS if work.trains or work.device != "cpu" else (*_LAYERS, nn.Linear)
    layers = {
        name or type(module).__name__: Part(name=name, module=module)
        for name, module in work.model.named_modules()
        if isinstance(module, kinds)
    }
    if not layers:
        return work, effect(layers)
    wanted = recipe.selected(layers)
    for called, layer in layers.items():
        layer.refused = _refusal(layer.module) if called in wanted else LEFT
    owners = _watched(work, layers) if work.inputs is not None else _unwatched(work.model, layers)
    _swap(work.model, layers, owners)
    return work, effect(layers)


def _refusal(module: nn.Module) -> str:
    """Why a layer cannot be swapped, whatever it is called with; empty where it can."""
    if isinstance(module, nn.RNNBase):
        return recurrent.refusal(module) or ""
    if isinstance(module, nn.Linear):
        return "" if on_grid(module) else linears.refusal(module) or ""
    if not convolutions.may_begin(module):
        return f"this {module._get_name()} has a forward of its own, which would be lost"
    return ""


def _watched(work: Workload, layers: dict[str, Part]) -> set[str]:
    """Run a copy as it would be and note what runs where. Returns the modules whose groups run together."""
    twin = copied(work.model)
    parts = dict(twin.named_modules())
    layer_of = {id(parts[layer.name]): layer for layer in layers.values() if not layer.refused}
    owners: set[str] = set()

    def watching(owner: str) -> Callable[[tuple, Any], Any]:
        def run(links: tuple, x: Any) -> Any:
            ran = False
            for part in grouped.parts(links):
                x, ran = one(part, x, ran)
            return x

        def one(links: tuple, x: Any, after: bool) -> tuple[Any, bool]:
            """What a layer and what follows it make of x, and whether a kernel takes it; as before it if `after`."""
            layer = layer_of.get(id(links[-1]))
            if layer is None:
                return grouped.apart(links, x), False
            found = one_on_integers(layer, links, x, after) if on_grid(links[-1]) else None
            if found is not None:
                owners.add(owner)
                return found, True
            if isinstance(layer.module, nn.RNNBase):
                return grouped.apart(links, x), bool(layer.runs)
            if isinstance(layer.module, nn.Linear):
                y = grouped.apart(links, x)
                if on_grid(links[-1]):
                    return y, False
                if after and not layer.runs and grouped.linear_problem(links, x) is not None:
                    layer.runs["Linear on 'cpu', by one call with the layer before it (unless compiled)"] = None
                if layer.runs and (after or grouped.rectified(links)):
                    owners.add(owner)
                return y, bool(layer.runs)
            read = convolutions.reading(links, x)
            if isinstance(read, str):
                layer.misses[read] = None
                return grouped.apart(links, x), False
            with trace() as choices:
                y = convolutions.together(links[-1], read, x)
            if took := layer.saw(str(read), choices):
                owners.add(owner)
                layer.in_floats = True
            return grouped.apart(links[: read.rest], y), took

        def one_on_integers(layer: Part, links: tuple, x: Any, after: bool) -> Any:
            """What one on integers makes of x; None where no kernel takes it."""
            read = integers.reading(links, x)
            if read is None:
                layer.misses["the kernels for integers do not take what it is called with"] = None
                return None
            with trace() as choices:
                pays = integers.pays(read.problem, recorded=True)
            unless = "" if getattr(type(links[-1]), WHOLE) else " (unless compiled)"
            if not pays and after and read.problem.work <= grouped.LEAST_WORK:
                layer.runs[f"{read} on 'cpu', by one call with the layer before it{unless}"] = None
            elif not layer.saw(f"{read}{unless}", choices):
                return None
            layer.on_integers = (y := integers.together(links[-1], read, x)) is not None
            return grouped.apart(links[: read.rest], y) if layer.on_integers else None

        return run

    for name, (forward, _) in _rewritten(twin, layers, watching).items():
        derive(twin.get_submodule(name), forward=forward)
    for layer in layers.values():
        if isinstance(layer.module, nn.RNNBase) and not layer.refused:
            _watch(recurrent.fuse, parts[layer.name], layer)
        elif isinstance(layer.module, nn.Linear) and not layer.refused and not on_grid(layer.module):
            _watch(linears.fuse, parts[layer.name], layer, " (unless compiled)")
    with torch.random.fork_rng(), torch.set_grad_enabled(work.trains):
        torch.manual_seed(work.seed)
        twin(*work.inputs.args, **work.inputs.kwargs)
    return owners


def _watch(fuse: Callable[[Any], None], module: nn.Module, layer: Part, unless: str = "") -> None:
    """Let the kernels have a layer whose module is all of it, and note what takes its calls, and when it does not."""
    fuse(module)
    forward = type(module).forward

    def watched(self, *args, **kwargs):
        with trace() as choices:
            results = forward(self, *args, **kwargs)
        if not choices:
            layer.misses["the kernels do not take what it is called with"] = None
        layer.saw(module._get_name() + unless, choices)
        return results

    derive(module, forward=watched)


def _unwatched(model: nn.Module, layers: dict[str, Part]) -> set[str]:
    """Without inputs: everything that could be swapped is. Returns the modules whose groups run together."""
    layer_of = {id(layer.module): layer for layer in layers.values() if not layer.refused}
    rewritten = _rewritten(model, layers, lambda _: grouped.group)
    begun = [conv for _, convs in rewritten.values() for conv in convs]
    for layer in layer_of.values():
        if not isinstance(layer.module, nn.Conv2d) or any(layer.module is conv for conv in begun):
            layer.runs[UNKNOWN] = None
    return set(rewritten)


def _rewritten(
    model: nn.Module, layers: dict[str, Part], run: Callable[[str], Callable[[tuple, Any], Any]]
) -> dict[str, tuple[Callable, list[nn.Module]]]:
    """By each module that calls convolutions in groups: its forward with those handed to `run(its name)`."""
    callers: dict[str, list[Part]] = {}
    for layer in layers.values():
        if isinstance(layer.module, (nn.Conv2d, nn.Linear)) and not layer.refused:
            name = layer.name
            while name:
                name = name.rpartition(".")[0]
                callers.setdefault(name, [])
                if not isinstance(model.get_submodule(name), (nn.ModuleList, nn.ModuleDict)):
                    break
            callers.setdefault(name, []).append(layer)
    found = {}
    for name, called in callers.items():
        module = model.get_submodule(name)
        kind = f"{type(module).__name__}.forward"
        reason = f"nothing that could run together with it directly follows it in {kind}, or it is not called there"
        try:
            if rewritten := forwards.rewritten(module, run(name)):
                found[name] = rewritten
        except Unreadable as error:
            reason = f"{kind}: {error}"
        for layer in called:
            if isinstance(layer.module, nn.Conv2d):
                layer.unseen = reason
            elif on_grid(layer.module):
                layer.unseen = f"it runs on integers by itself, as before: {reason}"
    return found


def _swap(model: nn.Module, layers: dict[str, Part], owners: set[str]) -> None:
    for layer in layers.values():
        if layer.why_not:
            continue
        if isinstance(layer.module, nn.RNNBase):
            recurrent.fuse(layer.module)
        elif on_grid(layer.module):
            if layer.on_integers or UNKNOWN in layer.runs:
                integers.fuse(layer.module)
            if layer.in_floats:
                convolutions.fuse(layer.module)
        elif isinstance(layer.module, nn.Linear):
            linears.fuse(layer.module)
        else:
            convolutions.fuse(layer.module)
    for name, (forward, _) in _rewritten(model, layers, lambda _: grouped.group).items():
        if name in owners:
            derive(model.get_submodule(name), forward=forward)
    recurrent.let_compile(model)
