"""Which layers of a torch model tensor parallelism splits, and how: nothing is changed here, and nothing sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel
from torch.nn.utils.rnn import PackedSequence

from perfkit._report import Skipped
from perfkit._workload import Workload
from perfkit.backends.torch_copies import copied
from perfkit.backends.torch_encoder import leave_short_cuts
from perfkit.parallel import torch_attention
from perfkit.parallel.torch_by_heads import ThreeParallel
from perfkit.parallel.torch_flow import Flow
from perfkit.parallel.torch_heads import Attention, HeadFlow
from perfkit.parallel.torch_split import ChannelParallel, random_state
from perfkit.pruning.torch_layers import bound_parameters

if TYPE_CHECKING:
    from perfkit.recipes.tensor_parallel import TensorParallel

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
UNSPLIT = (nn.RNNBase, nn.RNNCellBase)
LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Embedding, *CONVS, nn.MultiheadAttention, *UNSPLIT)


@dataclass(frozen=True)
class Split:
    """How one layer is split.

    Args:
        told: in words, for the report.
        style: torch's plan for it.
        gathers, adds: how many all-gathers a call makes, and how many all-reduces.
        drops: dropouts that its outputs go through in parts.
    """

    told: str
    style: ParallelStyle
    gathers: int = 0
    adds: int = 0
    drops: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Followed:
    """What one call of a model shows.

    Args:
        flow: which linear layer takes what of which.
        attentions: those that are written out.
        draws: whether random numbers were drawn.
        steps: by recurrent layer how many it makes: in each of its layers, in each direction, for each time.
    """

    flow: Flow
    attentions: tuple[Attention, ...]
    draws: bool
    steps: Mapping[str, int]


@dataclass(frozen=True)
class Plan:
    """What is done with a model's layers.

    Args:
        splits: by layer, in the order of the calls.
        skipped: those left whole, with the reasons.
        notes: why attentions that are written out are not split by heads.
        written_out: whether some are.
        draws: whether a call draws random numbers.
    """

    splits: dict[str, Split]
    skipped: list[Skipped]
    notes: list[str]
    written_out: bool
    draws: bool


def plan(work: Workload, recipe: TensorParallel, parts: int, data: int = 1) -> Plan:
    """How a model would be split.

    Args:
        parts: devices that share the layers.
        data: devices that share the batch, and may shard what is left of the weights.

    Raises:
        InvalidInputError: a pattern of the recipe matches no layer.
    """
    chosen, whole = _layers(work.model, recipe)
    followed = _followed(work, chosen)
    splits, more, notes = _splits(followed, parts, data)
    skipped = [*(_counted(item, followed.steps) for item in whole), *more]
    written_out = any(split.told == "heads" and isinstance(chosen[name], nn.Linear) for name, split in splits.items())
    return Plan(splits, skipped, notes, written_out, followed.draws)


def _layers(model: nn.Module, recipe: TensorParallel) -> tuple[dict[str, nn.Module], list[Skipped]]:
    """The layers to split, and those that cannot be, by what they are."""
    inside = {
        id(part) for module in model.modules() if isinstance(module, nn.MultiheadAttention) for part in module.modules()
    }
    held = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LAYERS) and (id(module) not in inside or isinstance(module, nn.MultiheadAttention))
    }
    shared = bound_parameters(model)
    reasons = {name: _shares(shared, name, module) or _unsplit(module) for name, module in held.items()}
    chosen = recipe.selected(held)
    skipped = [
        Skipped(name, reason if name in chosen else "excluded")
        for name, reason in reasons.items()
        if reason or name not in chosen
    ]
    return {name: held[name] for name, reason in reasons.items() if name in chosen and not reason}, skipped


def _shares(shared: Mapping[str, str], name: str, module: nn.Module) -> str | None:
    """Why a layer is left alone for what its weights are shared with; an attention's are those of its output too."""
    return shared.get(name) or (shared.get(f"{name}.out_proj") if isinstance(module, nn.MultiheadAttention) else None)


def _unsplit(module: nn.Module) -> str | None:
    if isinstance(module, UNSPLIT):
        return "every step needs the whole hidden state: split, it would be gathered at each"
    if isinstance(module, nn.MultiheadAttention):
        return torch_attention.unsplit(module)
    own = next(kind for kind in (nn.Linear, nn.Embedding, *CONVS) if isinstance(module, kind))
    if type(module).forward is not own.forward:
        return f"its forward is not nn.{own.__name__}'s own"
    if "weight" not in module._parameters or set(module._parameters) - {"weight", "bias"}:
        return "its weight is computed from others, or it holds more than a weight and a bias"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "it has hooks, which would be given parts"
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse or module.scale_grad_by_freq):
        return "max_norm, sparse and scale_grad_by_freq look at whole rows"
    if isinstance(module, CONVS) and module.groups > 1:
        return "its channels are in groups"
    return None


def _followed(work: Workload, layers: dict[str, nn.Module]) -> Followed:
    """Calls of a copy, followed."""
    twin = copied(work.model)
    leave_short_cuts(twin)
    dropouts = {name: module for name, module in twin.named_modules() if type(module) is nn.Dropout}
    flow = Flow({name: twin.get_submodule(name) for name in layers}, dropouts)
    heads = HeadFlow({name: layer for name, layer in flow.layers.items() if isinstance(layer, nn.Linear)}, dropouts)
    work.backend.seed(work.seed)
    state = random_state(work.device)
    with _counting(twin) as steps:
        flow.call(twin, work.inputs.args, work.inputs.kwargs)
    draws = not torch.equal(state, random_state(work.device))
    return Followed(flow, heads.call(twin, work.inputs.args, work.inputs.kwargs), draws, steps)


@contextmanager
def _counting(model: nn.Module) -> Iterator[dict[str, int]]:
    """Within it the steps of recurrent layers are counted, by their names."""
    steps: dict[str, int] = {}

    def count(name: str) -> Callable:
        def before(module, args, kwargs):
            x = args[0] if args else kwargs["input"]
            times, runs = 1, 1
            if isinstance(module, nn.RNNBase):
                packed = isinstance(x, PackedSequence)
                times = len(x.batch_sizes) if packed else x.size(x.dim() - 2 if module.batch_first else 0)
                runs = module.num_layers * (1 + module.bidirectional)
            steps[name] = steps.get(name, 0) + times * runs

        return before

    recurrent = {name: module for name, module in model.named_modules() if isinstance(module, UNSPLIT)}
    handles = [module.register_forward_pre_hook(count(name), with_kwargs=True) for name, module in recurrent.items()]
    try:
        yield steps
    finally:
        for handle in handles:
            handle.remove()


def _counted(item: Skipped, steps: Mapping[str, int]) -> Skipped:
    """What is left whole; of a recurrent layer with the number of all-gathers that it would take."""
    if item.reason == "excluded" or item.name not in steps:
        return item
    return replace(item, reason=f"{item.reason}, {steps[item.name]} times in the example call")


def _splits(followed: Followed, parts: int, data: int) -> tuple[dict[str, Split], list[Skipped], list[str]]:
    """How each layer that was followed is split, in the order of the calls; why others are not; and notes.

    Args:
        data: how many devices share the batch, and may shard what is left of the weights.
    """
    flow = followed.flow
    splits: dict[str, Split] = {}
    skipped = [
        Skipped(name, flow.elsewhere.get(name, "the example inputs do not reach it"))
        for name in flow.layers
        if name in flow.elsewhere or name not in flow.called
    ]
    usable = [name for name in flow.called if name in flow.layers and name not in flow.elsewhere]
    pairs = {first: second for first, second in flow.pairs().items() if {first, second} <= set(usable)}
    written, notes = _written_out(followed, set(usable), parts, data)
    rows = {name for name, split in written.items() if split.told == "rows"}
    for name in usable:
        layer = flow.layers[name]
        if name in written:
            splits[name] = written[name]
            continue
        if isinstance(layer, nn.MultiheadAttention):
            found = _by_heads(layer, parts, data, *flow.weights[name])
            if isinstance(found, Split):
                splits[name] = found
            else:
                skipped.append(Skipped(name, found))
            continue
        outputs = _outputs(layer)
        if name in rows:
            splits[name] = Split("rows", RowwiseParallel(), adds=1)
        elif outputs % parts:
            skipped.append(Skipped(name, f"{outputs} output(s) cannot be shared by {parts} devices evenly"))
        elif name in pairs and pairs[name] not in rows:
            splits[name] = Split("columns", ColwiseParallel(use_local_output=False), drops=frozenset(flow.passed[name]))
            rows.add(pairs[name])
        elif isinstance(layer, CONVS):
            splits[name] = Split("channels", ChannelParallel(), gathers=1)
        else:
            told = "features" if isinstance(layer, nn.Embedding) else "columns, gathered"
            splits[name] = Split(told, ColwiseParallel(output_layouts=Replicate()), gathers=1)
    return splits, skipped, notes


def _written_out(followed: Followed, usable: set[str], parts: int, data: int) -> tuple[dict[str, Split], list[str]]:
    """The layers of attentions that a model writes out, by heads; and why others' outputs are gathered."""
    splits: dict[str, Split] = {}
    notes = []
    for attention in followed.attentions:
        layers: dict[str, Any] = {name: followed.flow.layers[name] for name in attention.blocks}
        uneven = sorted(count for count in attention.counts if count % parts)
        wide = [name for name, blocks in attention.blocks.items() if blocks > 1 and layers[name].in_features % data]
        if uneven:
            why = f"{uneven[0]} head(s) cannot be shared by {parts} devices evenly"
        elif wide:
            why = _uncut(layers[wide[0]].in_features, data)
        elif left := sorted({*layers, attention.out} - usable):
            why = f"{left[0]} stays whole"
        else:
            for name, blocks in attention.blocks.items():
                style = ThreeParallel() if blocks > 1 else ColwiseParallel(use_local_output=False)
                splits[name] = Split("heads", style, drops=attention.dropouts)
            splits[attention.out] = Split("rows", RowwiseParallel(), adds=1)
            continue
        notes.append(f"the attention of {', '.join([*layers, attention.out])} is not split by heads: {why}")
    return splits, notes


def _by_heads(layer: nn.MultiheadAttention, parts: int, data: int, weights: bool, averaged: bool) -> Split | str:
    """How an attention is split; or why it is not.

    Args:
        weights, averaged: whether its weights are asked for, and their mean over the heads.
    """
    if layer.num_heads % parts:
        return f"{layer.num_heads} head(s) cannot be shared by {parts} devices evenly"
    if layer._qkv_same_embed_dim and layer.embed_dim % data:
        return _uncut(layer.embed_dim, data)
    style = torch_attention.HeadParallel()
    return Split("heads", style, gathers=int(weights and not averaged), adds=1 + (weights and averaged))


def _uncut(inputs: int, data: int) -> str:
    return f"{inputs} inputs cannot be shared by the {data} devices along the data axis evenly"


def _outputs(layer: nn.Module) -> int:
    """Along what a layer is split."""
    if isinstance(layer, nn.Linear):
        return layer.out_features
    if isinstance(layer, nn.Embedding):
        return layer.embedding_dim
    assert isinstance(layer, CONVS)
    return layer.out_channels
