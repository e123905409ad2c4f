"""Where the layers of a torch model hold their units, and what they read of others'."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import _disable_current_modes

from perfkit._workload import Inputs, Workload
from perfkit.backends.torch_hooks import gradient_hooks
from perfkit.backends.torch_surgery import copied, is_composed, tensors_in
from perfkit.pruning.torch_trace import Following, Labels, Unpacking
from perfkit.pruning.torch_units import NONE, Structure, Units, spread

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
RECURRENT = (nn.LSTM, nn.GRU, nn.RNN)
OWNERS = (*CONVOLUTIONS, nn.Linear, *RECURRENT)
"""The layers whose units can be removed."""

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PER_CHANNEL = (nn.modules.batchnorm._NormBase,)  # batch and instance norms
_OPAQUE = (
    nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.MultiheadAttention, nn.RNNCellBase, nn.Bilinear,
    nn.Embedding, nn.EmbeddingBag,
)  # fmt: skip
_UNCALLED = (
    "it was not called as a layer when the model ran on the example inputs; where other inputs lead to it, exclude "
    "what it reads"
)
_NORMALIZING = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.LocalResponseNorm)


@dataclass(frozen=True)
class _Call:
    """One call of a layer."""

    name: str
    module: Any
    labels: Labels
    args: tuple
    kwargs: dict[str, Any]
    outputs: Any

    @property
    def called(self) -> str:
        return self.name or type(self.module).__name__

    @property
    def given(self) -> torch.Tensor:
        """The input, of a packed sequence its data."""
        given = self.args[0] if self.args else self.kwargs["input"]
        return given.data if isinstance(given, PackedSequence) else given

    def reads(self, dim: int) -> torch.Tensor | None:
        """The units along one dimension of the input, None where there are none."""
        return self.labels.along(self.given, dim, self.called)

    def slice(self, tensor: str, dim: int, units: torch.Tensor | None, produced: bool = False) -> None:
        self.labels.units.slice(self.name, tensor, dim, units, produced)

    def passes(self, units: torch.Tensor | None, dim: int) -> None:
        """The output has these units along one dimension."""
        self.labels.set(self.outputs, None if units is None else spread(units, self.outputs.shape, dim))

    def produces(self, units: torch.Tensor, weight_dim: int, dim: int) -> None:
        """Weight and bias make these units, along one dimension of the output."""
        self.slice("weight", weight_dim, units, produced=True)
        if self.module.bias is not None:
            self.slice("bias", 0, units, produced=True)
        if len(units) > 1:
            self.passes(units, dim)
        else:  # it stays, so whatever it meets need not be followed
            self.labels.units.fix(units, "has one unit, which stays")


Rule = Callable[[_Call], None]


def owners(model: nn.Module) -> list[str]:
    """The names of the layers whose units can be removed; the model itself is called by its class's name."""
    return [label(model, name) for name, module in model.named_modules() if isinstance(module, OWNERS)]


def label(model: nn.Module, name: str) -> str:
    """What reports call a module."""
    return name or type(model).__name__


def structure(work: Workload, wanted: set[str]) -> Structure:
    """Follow the units of `work.model` through a run on the example inputs, for training also one as it trains.

    Args:
        wanted: the layers that may lose units, as `owners` calls them.
    """
    model = copied(work.model)
    labels = Labels(Units())
    modules = dict(model.named_modules())
    shared = bound_parameters(work.model)
    for name, module in modules.items():
        if (rule := _rule(module)) is not None:
            module.forward = _looked_at(name, module, shared.get(name), rule, labels)
    for training in (False, True) if work.trains else (False,):
        outputs = _run(model.train(training), work.inputs, labels, work.seed)
        labels.fix(list(tensors_in(outputs)), "is an output of the model")
    units = labels.units
    for name in owners(model):
        if name in units.axes and name not in wanted:
            for part in units.axes[name]:
                units.fix(part, f"is tied to {name}, which include/exclude leave alone")
        elif name not in wanted:
            units.skipped[name] = "include/exclude leave it alone"
        elif name not in units.axes:
            units.skipped.setdefault(name, _UNCALLED)
    return units.structure()


def _run(model: nn.Module, inputs: Inputs, labels: Labels, seed: int) -> Any:
    with torch.random.fork_rng(), torch.no_grad(), _without_fast_path(), Unpacking(labels), Following(labels):
        torch.manual_seed(seed)
        return model(*inputs.args, **inputs.kwargs)


@contextmanager
def _without_fast_path():
    """nn.TransformerEncoderLayer calls its linears, in place of one operation that takes their weights."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def bound_parameters(model: nn.Module) -> dict[str, str]:
    """Modules that share a parameter, or whose parameters have hooks -> why they are left alone."""
    holders: dict[int, list[str]] = {}
    shared = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(name)
            if any(gradient_hooks(parameter)):
                shared[name] = "has a parameter with a hook, which would be given other gradients"
    for names in holders.values():
        for name in names:
            if len(names) > 1:
                others = ", ".join(label(model, other) for other in names if other != name) or "itself"
                shared[name] = f"shares a weight with {others}"
    return shared


def _looked_at(name: str, module: nn.Module, shared: str | None, rule: Rule, labels: Labels) -> Callable:
    """The module's forward, as one operation under its rule."""
    forward, held = module.forward, list(module.parameters(recurse=False))

    @functools.wraps(forward)
    def look(*args, **kwargs):
        with _disable_current_modes():
            outputs = forward(*args, **kwargs)
            call = _Call(name, module, labels, args, kwargs, outputs)
            lent = any(one is not own for one, own in zip(module.parameters(recurse=False), held, strict=True))
            if why := shared or ("is called with weights that are not its own, as by functional_call" if lent else ""):
                labels.fix([args, kwargs], f"feeds {call.called}, which {why}")
                labels.units.skipped[call.called] = f"it {why}"
            else:
                rule(call)
        return outputs

    return look


def _rule(module: nn.Module) -> Rule | None:
    """How units pass through a module as a whole; None where what it calls is looked at in its place."""
    for kinds, rule in ((CONVOLUTIONS, _convolution), ((nn.Linear,), _linear), (RECURRENT, _recurrent)):
        for kind in kinds:
            if isinstance(module, kind):
                return rule if is_plain(module, kind) else _opaque
    if isinstance(module, _PER_CHANNEL):
        return _per_channel
    if isinstance(module, nn.PReLU):
        return _prelu
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return _unchanged
    return _opaque if isinstance(module, _OPAQUE) else None


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether it computes what its class does, with plain weights of its own: weight_norm makes them of others."""
    needed = {"weight_ih_l0", "weight_hh_l0"} if issubclass(kind, RECURRENT) else {"weight"}
    own = type(module).forward is kind.forward and module._parameters.keys() >= needed
    return own and not any(map(is_composed, module.parameters(recurse=False)))


def _opaque(call: _Call) -> None:
    kind = type(call.module).__name__
    why = f"feeds {call.called} ({kind}), which normalizes over all units together"
    if not isinstance(call.module, _NORMALIZING):
        why = f"feeds {call.called} ({kind}), through which units are not followed"
    call.labels.fix([call.args, call.kwargs], why)
    for name in owners(call.module):
        inside = f"it belongs to {call.called} ({kind}), through which units are not followed"
        call.labels.units.skipped[f"{call.called}.{name}"] = inside
    if isinstance(call.module, OWNERS):
        why = f"this {kind} is not a plain one: its forward or its weights are made elsewhere"
        call.labels.units.skipped[call.called] = why


def _convolution(call: _Call) -> None:
    module, units, called = call.module, call.labels.units, call.called
    channel = call.outputs.ndim - len(module.kernel_size) - 1
    read = call.reads(channel)
    transposed = isinstance(module, _TRANSPOSED)
    made, reading = (1, 0) if transposed else (0, 1)
    if module.groups == 1:
        call.slice("weight", reading, read)
        (produced,) = units.axis(called, module.out_channels)
    elif module.groups == module.in_channels and not transposed and read is not None and bool((read != NONE).all()):
        produced = read.repeat_interleave(module.out_channels // module.in_channels)
        units.axes.setdefault(called, (produced,))
    else:
        why = "is a grouped convolution whose groups must stay equal"
        if read is not None:
            units.fix(read, f"feeds {called}, which {why}")
        units.skipped[called] = f"it {why}"
        return
    call.produces(produced, made, channel)


def _linear(call: _Call) -> None:
    call.slice("weight", 1, call.reads(-1))
    (produced,) = call.labels.units.axis(call.called, call.module.out_features)
    call.produces(produced, 0, call.outputs.ndim - 1)


def _per_channel(call: _Call) -> None:
    batched = isinstance(call.module, nn.modules.batchnorm._BatchNorm)
    channel = 1 if batched or call.given.ndim > call.module._get_no_batch_dim() else 0
    read = call.reads(channel)
    for tensor in ("weight", "bias", "running_mean", "running_var"):
        if getattr(call.module, tensor) is not None:
            call.slice(tensor, 0, read, produced=tensor != "running_var")
    call.passes(read, channel)


def _unchanged(call: _Call) -> None:
    call.labels.set(call.outputs, call.labels.of(call.given))


def _prelu(call: _Call) -> None:
    if call.module.num_parameters == 1:
        _unchanged(call)
    else:
        read = call.reads(1)
        call.slice("weight", 0, read)
        call.passes(read, 1)


def _recurrent(call: _Call) -> None:
    """Hidden unit h is row h of every gate of weight_ih, weight_hh and the biases, and column h of weight_hh.

    Above it, the columns of the next layer's weight_ih read it, forward units first, backward units after them.
    """
    module, labels, called = call.module, call.labels, call.called
    units, directions = labels.units, ("", "_reverse")[: 1 + module.bidirectional]
    read = call.reads(-1)
    if module.proj_size:
        for direction in directions:
            call.slice(f"weight_ih_l0{direction}", 1, read)
        units.skipped[called] = "its hidden state is projected (proj_size), through which units are not followed"
        return
    hidden = units.axis(called, module.hidden_size, module.num_layers * len(directions))
    for layer in range(module.num_layers):
        here = hidden[layer * len(directions) :][: len(directions)]
        for direction, own in zip(directions, here, strict=True):
            end = f"_l{layer}{direction}"
            call.slice(f"weight_ih{end}", 1, read)
            call.slice(f"weight_hh{end}", 1, own)
            gates = own.repeat(getattr(module, f"weight_hh{end}").shape[0] // module.hidden_size)
            for tensor in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if module.bias else 2]:
                call.slice(f"{tensor}{end}", 0, gates, produced=True)
        read = torch.cat(here)
    if (call.args[1] if len(call.args) > 1 else call.kwargs.get("hx")) is not None:
        labels.fix([call.args[1:], call.kwargs.get("hx")], f"is an initial state of {called}")
        for own in hidden:
            units.fix(own, "starts from an initial state that the model or the caller gives")
        return
    sequence, states = call.outputs
    sequence = sequence.data if isinstance(sequence, PackedSequence) else sequence
    labels.set(sequence, spread(read, sequence.shape, sequence.ndim - 1))
    for state in states if isinstance(states, tuple) else (states,):
        last = torch.stack(hidden)
        labels.set(state, (last if state.ndim == 2 else last[:, None]).expand(state.shape))
