"""Recurrent layers in torch models that stop at the last step that is read of each row (`torch_deferred.py`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from perfkit._errors import first_line
from perfkit._report import Effect, Skipped
from perfkit._workload import Workload
from perfkit.backends.fused_layers import LEFT
from perfkit.backends.torch_conv_forwards import written_forward
from perfkit.backends.torch_copies import copied
from perfkit.backends.torch_deferred import computed, settling
from perfkit.backends.torch_fused_rnn import FORWARDS
from perfkit.backends.torch_surgery import derive
from perfkit.backends.torch_waiting import Lookup, Recurrence, Seen, may_look_up_later, may_wait

if TYPE_CHECKING:
    from perfkit.recipes.skip_padding import SkipPadding

MOST = 0.95
"""The share of the steps up to which it is worth to compute these alone."""

NO_LAYER = "the model has no recurrent layer (nn.LSTM, nn.GRU or nn.RNN)"


@dataclass
class Reads:
    """What was read of a layer's output.

    Args:
        refused: why it computes all steps whatever is read; empty where it need not.
        read, taken, everything: steps that were read up to, that were computed, and all, over rows and calls.
        whole: what has all of it computed, by the function's name.
    """

    refused: str = ""
    read: int = 0
    taken: int = 0
    everything: int = 0
    whole: dict[str, None] = field(default_factory=dict)

    def __call__(self, why: str, read: int, taken: int, everything: int) -> None:
        self.read += read
        self.taken += taken
        self.everything += everything
        if why:
            self.whole[why] = None

    @property
    def why_not(self) -> str:
        """Why there is nothing to skip; empty where there is."""
        if self.refused:
            return self.refused
        if self.whole:
            return f"all of its output or its last state is read, by {', '.join(self.whole)}"
        if not self.everything:
            return "nothing of it is read on the example inputs, or its calls are too small, or of a kind, to wait"
        if self.read > MOST * self.everything:
            return f"the example inputs have hardly any padding: {self.read:,} of {self.everything:,} steps are read"
        return ""

    def __str__(self) -> str:
        told = f"{self.taken:,} of {self.everything:,} steps are computed for the example inputs"
        if self.taken == self.read:
            return f"{told}; nothing reads the rest (unless compiled)"
        return (
            f"{told}, and {self.read:,} are read: the library's layer runs all rows up to the longest one, those of "
            "fused_kernels and int8 do not"
        )


def skipping(work: Workload, recipe: SkipPadding) -> tuple[Workload, Effect]:
    """Have layers of which single steps are read wait until they are; in place.

    Raises:
        InvalidInputError: a pattern of include or exclude matches no layer.
    """
    layers = _layers(work.model)
    if not layers:
        return work, Effect(notes=(NO_LAYER,))
    wanted = recipe.selected(layers)
    reads = {name: Reads(LEFT if name not in wanted else _refusal(module)) for name, module in layers.items()}
    if work.inputs is None:
        touched = tuple(name for name, read in reads.items() if not read.refused)
        skipped = tuple(Skipped(name, read.refused) for name, read in reads.items() if read.refused)
        notes = ("without example_inputs each call shows what is read",) if touched else ()
    else:
        tables = _watched(work, reads)
        touched = tuple(name for name, read in reads.items() if not read.why_not)
        skipped = tuple(Skipped(name, read.why_not) for name, read in reads.items() if read.why_not)
        notes = tuple(f"{name}: {reads[name]}" for name in touched)
        for name, batch_first in tables.items() if touched else ():
            _look_up_later(work.model.get_submodule(name), batch_first)
    for name in touched:
        _let_wait(layers[name])
    if touched:
        _settle(work.model)
    return work, Effect(touched, skipped, notes)


def unsought(work: Workload) -> str | None:
    """Why there is nothing to skip in this model; None where there is, or it was not seen called."""
    reads = {name: Reads(_refusal(module)) for name, module in _layers(work.model).items()}
    if not reads:
        return NO_LAYER
    if work.inputs is None:
        return None
    _watched(work, reads)
    whys = {name: read.why_not for name, read in reads.items()}
    return "; ".join(f"{name}: {why}" for name, why in whys.items()) if all(whys.values()) else None


def _layers(model: nn.Module) -> dict[str, nn.RNNBase]:
    """The recurrent layers by name."""
    found = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.RNNBase)]
    return {name or type(part).__name__: part for name, part in found}


def _refusal(module: nn.RNNBase) -> str:
    """Why a layer computes all steps, whatever is read; empty where it need not."""
    if module.bidirectional:
        return "it is bidirectional: its way back begins in the padding, so that what is read depends on it"
    if written_forward(module) not in FORWARDS:
        return f"this {module._get_name()} has a forward of its own, which may take no packed sequence"
    return ""


def _watched(work: Workload, reads: dict[str, Reads]) -> dict[str, bool]:
    """Call a copy on the example inputs and note what is read of its recurrent layers.

    Returns:
        The embeddings of which such layers alone read, and only what they compute; with their `batch_first`.
    """
    twin = copied(work.model)
    layers = _layers(twin)
    for name, read in reads.items():
        if not read.refused:
            _let_wait(layers[name], read)
    layouts = {layers[name].batch_first for name, read in reads.items() if not read.refused}
    found = {}
    if len(layouts) == 1:
        found = {name: Reads() for name, part in twin.named_modules() if _may_be_late(part)}
        for name, read in found.items():
            _look_up_later(twin.get_submodule(name), *layouts, read)
    try:
        with torch.random.fork_rng(), torch.set_grad_enabled(work.trains):
            torch.manual_seed(work.seed)
            settling(twin, *work.inputs.args, **work.inputs.kwargs)
    except Exception as error:  # whatever the model's own code may raise at tensors without numbers
        for read in reads.values():
            read.refused = (
                read.refused or f"the model fails where layers wait: {type(error).__name__}: {first_line(error)}"
            )
        return {}
    return {name: batch_first for name, read in found.items() for batch_first in layouts if not read.why_not}


def _may_be_late(module: nn.Module) -> bool:
    """Whether an embedding gives the same for the indices that are left when others are not looked up."""
    plain = isinstance(module, nn.Embedding) and written_forward(module) is nn.Embedding.forward
    return plain and module.max_norm is None and not module.scale_grad_by_freq


def _let_wait(module: nn.RNNBase, seen: Seen | None = None) -> None:
    base = type(module)

    def forward(self, input, hx=None):
        if torch.compiler.is_compiling() or not may_wait(self, input, hx):
            return base.forward(self, *computed((input, hx), "another layer"))
        return Recurrence(self, base.forward, input, hx, seen).results()

    derive(module, forward=forward)


def _look_up_later(module: nn.Embedding, batch_first: bool, seen: Seen | None = None) -> None:
    base = type(module)

    def forward(self, input):
        if torch.compiler.is_compiling() or not may_look_up_later(input):
            return base.forward(self, input)
        return Lookup(self, base.forward, input, batch_first, seen).results()

    derive(module, forward=forward)


def _settle(model: nn.Module) -> None:
    """What still waits when a call of `model` ends is computed; nothing waits where the model is compiled."""
    base = type(model)

    def __call__(self, *args, **kwargs):
        if torch.compiler.is_compiling() or self._compiled_call_impl is not None:
            return base.__call__(self, *args, **kwargs)
        return settling(base.__call__, self, *args, **kwargs)

    derive(model, __call__=__call__)
