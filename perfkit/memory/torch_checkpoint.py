"""Activation checkpointing in torch: segments of a model are run again in the backward pass instead of remembered."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint as run_again

from perfkit._errors import PerfkitWarning
from perfkit._report import Effect, Skipped
from perfkit._workload import Workload
from perfkit.backends.torch_hooks import call_hooks
from perfkit.backends.torch_surgery import around_forward, derive
from perfkit.memory.segments import Segment, budget_bytes, choose
from perfkit.memory.torch_saved import MOST_CHUNKS, Record, records, time_dim

WORTH_SHARE = 0.98
"""Of what is saved: a choice that holds more than this is not worth running anything again."""


def checkpointed(work: Workload, budget: float) -> tuple[Workload, Effect]:
    """Choose segments from one measured training step, and run them again in the backward pass."""
    found = records(work)
    saved = found[""].saved_bytes
    if not saved:
        return work, Effect(notes=("it saves nothing for its backward pass",))
    limit = budget_bytes(budget, saved)
    choice = choose(saved, lambda most: _segments("", work.model, found, most), limit)
    fixed = tuple(Skipped(name, why) for name, why in _fixed(found).items())
    if choice is None or not choice.chosen or choice.peak_bytes > WORTH_SHARE * saved:
        return work, Effect(
            skipped=fixed, notes=(f"nothing in it can be run again for less than {saved / 1e6:.3g} MB",)
        )
    for segment in choice.chosen:
        _apply(work.model, segment)
    forward = found[""].seconds
    notes = [
        f"{len(choice.chosen)} of {len(choice.segments)} segments are run again: by their sizes "
        f"{choice.peak_bytes / 1e6:.3g} of {saved / 1e6:.3g} MB are held, for {choice.seconds / forward:.0%} of a "
        "forward pass more"
    ]
    if choice.peak_bytes > limit:
        notes.append(f"the budget of {limit / 1e6:.3g} MB cannot be kept: this is the least")
    if dropping := [segment.name for segment in choice.chosen if segment.chunks > 1 and _drops(work.model, segment)]:
        notes.append(f"{', '.join(dropping)}: dropout between layers is drawn for each piece of time, in another order")
    return work, Effect(tuple(segment.name for segment in choice.chosen), fixed, tuple(notes))


def _fixed(found: dict[str, Record]) -> dict[str, str]:
    """Modules that must not be run again, and why."""
    told = {}
    for name, record in found.items():
        if name and record.changes:
            told[name] = "its forward changes its buffers or attributes, and would change them twice"
        elif name and record.writes_input and any(key.startswith(f"{name}.") for key in found):
            told[name] = "it writes to what it is given, such as a cache, and would write to it twice"
    return told


def _segments(name: str, module: nn.Module, found: dict[str, Record], most: float) -> Iterator[Segment]:
    """The module in segments that save no more than `most`, in the order in which they run."""
    record = found[name]
    if not record.calls or not record.saved_bytes:
        return
    whole = _segment(name, found)
    if name and record.saved_bytes <= most and not whole.fixed and not _hooked(name, found):
        yield whole
    elif record.sequence > 1 and not whole.fixed:
        chunks = min(math.ceil(record.saved_bytes / most), record.sequence, MOST_CHUNKS)
        yield _segment(name, found, chunks) if chunks > 1 else whole
    elif isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward and record.calls == 1:
        yield from _runs(name, module, found, most)
    else:
        called = sorted(_called_in(name, module, found), key=lambda child: found[child[0]].order)
        if not called and name:
            yield whole
        for child, part in called:
            yield from _segments(child, part, found, most)


def _called_in(name: str, module: nn.Module, found: dict[str, Record]) -> Iterator[tuple[str, nn.Module]]:
    """The modules in it that are called, by name; of those that only hold others, such as `nn.ModuleList`, what they
    hold."""
    for key, child in module.named_children():
        inner = f"{name}.{key}" if name else key
        if found[inner].calls:
            yield inner, child
        else:
            yield from _called_in(inner, child, found)


def _runs(name: str, module: nn.Sequential, found: dict[str, Record], most: float) -> Iterator[Segment]:
    """Neighbours in a sequence as one segment, as long as they save no more than `most` together."""
    children = [(f"{name}.{child}" if name else child) for child in module._modules]
    run: list[int] = []

    def ended() -> Iterator[Segment]:
        if run:
            parts = [_segment(children[index], found) for index in run]
            fixed = parts[0].fixed or next(filter(None, (_once(children[index], found) for index in run)), "")
            told = children[run[0]] if len(run) == 1 else f"{children[run[0]]} to {children[run[-1]]}"
            yield Segment(
                told,
                sum(part.saved_bytes for part in parts),
                parts[0].input_bytes,
                sum(part.seconds for part in parts),
                fixed=fixed,
                place=(name, (run[0], run[-1] + 1)),
            )
            run.clear()

    for index, (child, part) in enumerate(zip(children, module, strict=True)):
        record = found[child]
        together = sum(found[children[other]].saved_bytes for other in run) + record.saved_bytes
        if record.saved_bytes > most or record.hooked or _hooked(child, found):
            yield from ended()
            yield from _segments(child, part, found, most)
            continue
        if together > most and not record.writes_input:  # it would be run again from what it has overwritten
            yield from ended()
        run.append(index)
    yield from ended()


def _hooked(name: str, found: dict[str, Record]) -> bool:
    """Whether hooks are called within a module's forward, and would be called twice if that ran again."""
    return any(one.hooked and one.calls for key, one in found.items() if key.startswith(f"{name}."))


def _segment(name: str, found: dict[str, Record], chunks: int = 1) -> Segment:
    record = found[name]
    fixed = _once(name, found) or ("it writes to its input" if record.writes_input else "")
    return Segment(name, record.saved_bytes, record.input_bytes, record.seconds, chunks, fixed, place=(name, ()))


def _once(name: str, found: dict[str, Record]) -> str:
    """Why a module cannot be run again, whatever it is run from."""
    if any(one.changes for key, one in found.items() if key == name or key.startswith(f"{name}.")):
        return "it changes its buffers or attributes"
    return "it is called more than once" if found[name].calls > 1 else ""


def _apply(model: nn.Module, segment: Segment) -> None:
    name, span = segment.place
    module = model.get_submodule(name)
    if isinstance(module, nn.Sequential) and span:
        _run_in_groups(module, span)
    elif segment.chunks > 1:
        around_forward(module, partial(_in_pieces, chunks=segment.chunks))
    else:
        around_forward(module, _whole)


def _drops(model: nn.Module, segment: Segment) -> bool:
    return bool(model.get_submodule(segment.name).dropout)


def _whole(forward: Callable) -> Callable:
    def checkpointed(self, *args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(self, *args, **kwargs)
        return _again(self, forward, self, *args, **kwargs)

    return checkpointed


def _run_in_groups(module: nn.Sequential, span: tuple[int, ...]) -> None:
    """Children `span[0]` to `span[1] - 1` as one segment, beside those that are already."""
    spans = sorted([*getattr(type(module), SPANS, ()), span])
    starts = dict(spans)

    def forward(self, input):
        layers, index = list(self), 0
        while index < len(layers):
            stop = starts.get(index, index + 1) if torch.is_grad_enabled() else index + 1
            if stop > index + 1 or (index in starts and torch.is_grad_enabled()):
                input = _again(layers[index:stop], _one_after_the_other, layers[index:stop], input)
            else:
                input = layers[index](input)
            index = stop
        return input

    derive(module, forward=forward, **{SPANS: tuple(spans)})


SPANS = "_perfkit_recomputed"


def _one_after_the_other(layers: list[nn.Module], x: Any) -> Any:
    for layer in layers:
        x = layer(x)
    return x


def _in_pieces(forward: Callable, chunks: int) -> Callable:
    """A recurrent layer over one piece of time after the other, each but the last one run again."""

    def pieces(self, input, hx=None):
        if not isinstance(input, torch.Tensor) or not torch.is_grad_enabled():
            return forward(self, input, hx)
        dim = time_dim(self, input)
        parts = input.tensor_split(chunks, dim) if input.shape[dim] >= chunks else (input,)
        outputs = []
        for part in parts[:-1]:
            output, hx = _again(self, forward, self, part, hx)
            outputs.append(output)
        output, hx = forward(self, parts[-1], hx)
        return torch.cat([*outputs, output], dim), hx

    return pieces


def _again(modules: Any, function: Callable, *args: Any, **kwargs: Any) -> Any:
    """`function`, run again in the backward pass with the same random numbers; statistics are taken once.

    Not where hooks have come in since: they would be called twice.

    Args:
        modules: the layers that the function calls, or the module whose forward it is.
    """
    if any(map(call_hooks, _called(modules))) and not torch.compiler.is_compiling():
        warnings.warn(HOOKED, PerfkitWarning, stacklevel=2)
        return function(*args, **kwargs)
    if torch.compiler.is_compiling():  # the compiler keeps what it recomputes free of side effects itself
        return run_again(function, *args, use_reentrant=False, **kwargs)

    def contexts() -> tuple[Any, Any]:
        return nullcontext(), _statistics_taken(modules)

    return run_again(function, *args, use_reentrant=False, context_fn=contexts, **kwargs)


HOOKED = (
    "checkpoint: a forward hook was added to a module that runs again in the backward pass, which would call it twice: "
    "it now runs once, and remembers what it computes. Remove the hook, or apply the recipe with the hook in place"
)


def _called(modules: nn.Module | list[nn.Module]) -> Iterator[nn.Module]:
    """The modules that are called where `modules` run again."""
    if isinstance(modules, list):
        return (part for layer in modules for part in layer.modules())
    return (part for part in modules.modules() if part is not modules)


@contextmanager
def _statistics_taken(modules: nn.Module | list[nn.Module]) -> Iterator[None]:
    """Within it batch norms write their running statistics to copies."""
    roots = modules if isinstance(modules, list) else [modules]
    norms = [
        part
        for root in roots
        for part in root.modules()
        if isinstance(part, _BatchNorm) and part.training and part.track_running_stats
    ]
    taken = [dict(norm._buffers) for norm in norms]
    try:
        for norm, buffers in zip(norms, taken, strict=True):
            norm._buffers |= {name: None if held is None else held.clone() for name, held in buffers.items()}
        yield
    finally:
        for norm, buffers in zip(norms, taken, strict=True):
            norm._buffers |= buffers
