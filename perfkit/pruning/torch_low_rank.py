"""Low-rank factorization of linear and recurrent layers of torch models."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from perfkit._errors import UnsupportedError
from perfkit._report import Effect, Skipped
from perfkit._workload import Workload
from perfkit.backends.torch_copies import copied
from perfkit.backends.torch_surgery import widened
from perfkit.backends.torch_training import teacher
from perfkit.pruning.torch_layers import RECURRENT, bound_parameters, is_plain, label
from perfkit.pruning.torch_low_rank_recurrent import input_weights, reduced

if TYPE_CHECKING:
    from perfkit.recipes.low_rank import LowRank

_LAYERS = (nn.Linear, nn.RNNBase)
_READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
_READ = "its weight is read by the layer that holds it, which does not call it"


def factorized(work: Workload, recipe: LowRank) -> tuple[Workload, Effect]:
    """Replace linear layers, and what recurrent ones do to their inputs, by thin ones, in place, where that is smaller.

    Raises:
        UnsupportedError: the optimizer already keeps a state of a weight that would be replaced.
        InvalidInputError: a pattern of include or exclude matches no layer.
    """
    if recipe.distill and work.training.teacher is None:  # a teacher that is there knew the model before
        work = work.replace(training=dataclasses.replace(work.training, teacher=teacher(work)))
    model = work.model
    layers = {label(model, name): (name, each) for name, each in model.named_modules() if isinstance(each, _LAYERS)}
    wanted, reasons = recipe.selected(layers), _reasons(work)
    notes, skipped = {}, []
    optimizer = work.training.optimizer if work.trains else None
    for called, (name, layer) in layers.items():
        reason = reasons.get(name) if called in wanted else "include/exclude leave it alone"
        if reason is None:
            recurrent = isinstance(layer, nn.RNNBase)
            weight = torch.cat(input_weights(layer)) if recurrent else layer.weight
            rows, columns = weight.shape
            left, right = factors(weight, recipe.energy)
            rank = left.shape[1]
            if rank * (rows + columns) < rows * columns:
                (_reduce if recurrent else _split)(model, layer, left, right, optimizer, called)
                kind = "input weights " if recurrent else ""
                notes[called] = f"{called}: {kind}{rows}×{columns} → rank {rank}"
                continue
            needed = f"{rank * (rows + columns)} numbers, and {rows}×{columns} has {rows * columns}"
            reason = f"rank {rank} would need more: {needed}"
            if recurrent:
                reason = f"its input weights: {reason}; its recurrent weights stay in a kernel that takes them whole"
        skipped.append(Skipped(called, reason))
    return work, Effect(tuple(notes), tuple(skipped), tuple(notes.values()))


def factors(weight: torch.Tensor, energy: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A (m×r) and B (r×n) with `‖weight − AB‖² ≤ (1 − energy)·‖weight‖²` (Frobenius) and the smallest such r.

    Computed in float64; returned in the weight's dtype, each with the square roots of the singular values.
    """
    left, values, right = torch.linalg.svd(widened(weight.detach()), full_matrices=False)
    lost = values.square().flip(0).cumsum(0).flip(0)  # lost[r]: what rank r leaves out
    rank = max(1, int((lost > (1 - energy) * lost[0]).sum()))
    root = values[:rank].sqrt()
    return (left[:, :rank] * root).to(weight.dtype), (root[:, None] * right[:rank]).to(weight.dtype)


def _reasons(work: Workload) -> dict[str, str]:
    """Layers that cannot be replaced -> why."""
    model = work.model
    reasons = {name: f"it {why}" for name, why in bound_parameters(model).items()}
    uncalled = _uncalled(work)
    for name, layer in model.named_modules():
        kind = next((kind for kind in (nn.Linear, *RECURRENT) if isinstance(layer, kind)), None)
        if kind is None or name in reasons:
            continue
        if not name:
            reasons[name] = "it is the model itself, which stays what it is"
        elif not is_plain(layer, kind):
            reasons[name] = f"this {type(layer).__name__} is not a plain one"
        elif layer._forward_hooks or layer._forward_pre_hooks:
            reasons[name] = "it has hooks, which the two layers in its place would not call as they are"
        elif isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
            reasons[name] = _READ
        elif name in uncalled:
            reasons[name] = uncalled[name]
    return reasons


def _uncalled(work: Workload) -> dict[str, str]:
    """The layers that do not run when the model does, in evaluation, where layers may take shorter ways."""
    model = copied(work.model).eval()
    if work.inputs is None:
        holders = [name for name, each in model.named_modules() if isinstance(each, _READERS)]
        names = [name for name, each in model.named_modules() if isinstance(each, nn.Linear)]
        return {name: _READ for name in names for holder in holders if name.startswith(f"{holder}.")}
    called: set[str] = set()
    layers = {name: each for name, each in model.named_modules() if isinstance(each, _LAYERS)}
    for name, layer in layers.items():
        layer.forward = _noting(layer.forward, name, called)  # not a hook: with hooks no layer takes a shorter way
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(work.seed)
        model(*work.inputs.args, **work.inputs.kwargs)
    why = "it is not called as a layer on the example inputs: it does not run, or its weight is read in its place"
    return dict.fromkeys(layers.keys() - called, why)


def _noting(forward: Callable, name: str, called: set[str]) -> Callable:
    @functools.wraps(forward)
    def noted(*args: Any, **kwargs: Any) -> Any:
        called.add(name)
        return forward(*args, **kwargs)

    return noted


def _split(
    model: nn.Module, layer: nn.Linear, left: torch.Tensor, right: torch.Tensor, optimizer: Any, called: str
) -> None:
    """Two linear layers in place of one."""
    rank = left.shape[1]
    options = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    pair = nn.Sequential(
        nn.Linear(layer.in_features, rank, bias=False, **options),
        nn.Linear(rank, layer.out_features, bias=layer.bias is not None, **options),
    )
    for each, factor in zip(pair, (right, left), strict=True):
        each.weight.data = factor
        each.weight.requires_grad_(layer.weight.requires_grad)
    if layer.bias is not None:
        pair[1].bias = layer.bias
    _in_optimizer(optimizer, layer.weight, [each.weight for each in pair], called)
    _put(model, layer, pair.train(layer.training))


def _reduce(
    model: nn.Module, layer: nn.RNNBase, left: torch.Tensor, right: torch.Tensor, optimizer: Any, called: str
) -> None:
    """A projection and a recurrent layer of smaller inputs in place of one."""
    first, *others = input_weights(layer)
    for weight in others:
        _in_optimizer(optimizer, weight, [weight], called)
    small = reduced(layer, left, right)
    _in_optimizer(optimizer, first, [first, small.reduce.weight], called)
    _put(model, layer, small)


def _put(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """`new` wherever `old` is."""
    for parent in list(model.modules()):
        for key, child in list(parent.named_children()):
            if child is old and parent is not new:
                setattr(parent, key, new)


def _in_optimizer(
    optimizer: torch.optim.Optimizer | None, old: nn.Parameter, new: list[nn.Parameter], called: str
) -> None:
    """The factors take the weight's place among the parameters."""
    if optimizer is None:
        return
    if optimizer.state.get(old):
        raise UnsupportedError(
            f"{type(optimizer).__name__} already keeps {', '.join(map(repr, optimizer.state[old]))} of {called}, which "
            "two factors do not have: factorize before training, or pass a new optimizer"
        )
    for group in optimizer.param_groups:
        group["params"] = [each for one in group["params"] for each in (new if one is old else [one])]
