"""Every allocation of a few steps: when, by what, for what, and when it was freed."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity

from perfkit._workload import Workload
from perfkit.backends.adapter import Finished
from perfkit.backends.torch_profiler import profiled
from perfkit.backends.torch_surgery import local, tensors_in
from perfkit.profiling.torch_count import described
from perfkit.profiling.torch_where import MODULE, PHASE, STEP, Where

BEFORE = -1
"""When what was there before the trace began was allocated."""

_EVALUATES = "autograd::engine::evaluate_function: "


@dataclass(frozen=True)
class Held:
    """What a tensor of the workload is for."""

    bytes: int
    category: str
    module: str = ""
    shape: str = ""


@dataclass(slots=True)
class Block:
    """A piece of memory.

    Args:
        born_ns, freed_ns: `BEFORE` for before the trace; None for not within it.
        op: the outermost operation during which it was allocated; "" for none, and `op_end_ns` is then 0.
    """

    address: int
    bytes: int
    born_ns: int
    freed_ns: int | None = None
    op: str = ""
    op_end_ns: int = 0
    module: str = ""
    phase: str = "other"
    category: str = "other"
    shape: str = ""

    def lives_at(self, ns: int) -> bool:
        return self.born_ns <= ns and (self.freed_ns is None or self.freed_ns > ns)


@dataclass(frozen=True)
class Trace:
    """Steps one after the other: start and end in ns, and every block that was held during one of them."""

    steps: list[tuple[int, int]]
    blocks: list[Block]


def traced(work: Workload, finished: Finished, steps: int) -> Trace:
    """Run some steps and follow their allocations on the workload's device; the state of the model is as before."""
    where = Where(work.model)
    step = where.stepping(work, finished)
    with contextlib.ExitStack() as stack:
        stack.enter_context(finished.keeping_state())
        gc.collect()
        before = held(work)
        unknown, cpu = "Memory block of unknown size", [ProfilerActivity.CPU]
        profiler = stack.enter_context(profiled(unknown, activities=cpu, profile_memory=True))
        stack.enter_context(where.following())
        after = []
        for _ in range(steps):
            step()
            after.append(held(work))
    roots = profiler.profiler.kineto_results.experimental_event_tree()
    events = sorted(_walked(roots, where, work.device), key=lambda event: event.born_ns)
    marks = sorted((root.start_time_ns, root.end_time_ns) for root in roots if root.name == STEP)
    blocks = _matched(events, before)
    _categorize(blocks, marks, after)
    return Trace(marks, blocks)


def held(work: Workload) -> dict[int, Held]:
    """The workload's own tensors on its device, by the address of their storage."""
    found: dict[int, Held] = {}

    def hold(tensors: Iterable[tuple[str, Tensor]], category: str) -> None:
        for path, tensor in ((path, part) for path, whole in tensors for part in _parts(local(whole))):
            if tensor.device.type == work.device and tensor.layout == torch.strided and not tensor.is_nested:
                storage = tensor.untyped_storage()
                found.setdefault(
                    storage.data_ptr(), Held(storage.nbytes(), category, path.rpartition(".")[0], described(tensor))
                )

    model = work.model
    hold((*model.named_parameters(), *model.named_buffers()), "parameters")
    hold(((path, p.grad) for path, p in model.named_parameters() if p.grad is not None), "gradients")
    inputs = [work.inputs.args, dict(work.inputs.kwargs)]
    if work.training is not None:
        inputs.append(work.training.targets)
        state = work.training.optimizer.state
        names = {p: path for path, p in model.named_parameters()}
        hold(
            ((names.get(p, ""), tensor) for p, values in state.items() for tensor in tensors_in(values)),
            "optimizer state",
        )
    hold((("", tensor) for tensor in tensors_in(inputs)), "inputs")
    found.pop(0, None)
    return found


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors in memory that make up one: of a quantized one its integers and scales, else itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _parts(getattr(tensor, name))


def _walked(roots: Iterable[Any], where: Where, device: str) -> Iterator[Block]:
    """Allocations, and frees as blocks of a negative size, each with its place."""
    pending = [(root, "", "other", "", 0) for root in roots]
    while pending:
        event, module, phase, op, op_end = pending.pop()
        kind, fields = event.typed
        if kind == torch._C._profiler._EventType.Allocation:
            if fields.device.type == device:
                yield Block(
                    fields.ptr,
                    fields.alloc_size,
                    event.start_time_ns,
                    op=op,
                    op_end_ns=op_end,
                    module=module,
                    phase=phase,
                )
            continue
        name = event.name
        if name.startswith(MODULE):
            module = name.removeprefix(MODULE)
        elif name.startswith(PHASE):
            phase = name.removeprefix(PHASE)
        elif name.startswith(_EVALUATES):
            module, phase = where.maker(fields.sequence_number), "backward"
        elif not op and _operates(kind, fields):
            op, op_end = name, event.end_time_ns
        pending.extend((child, module, phase, op, op_end) for child in event.children)


def _operates(kind: Any, fields: Any) -> bool:
    """Whether it is an operation, and no range that code marked."""
    return kind == torch._C._profiler._EventType.TorchOp and fields.scope != torch._C._profiler.RecordScope.USER_SCOPE


def _matched(events: Iterable[Block], before: dict[int, Held]) -> list[Block]:
    """Allocations with their frees. What was freed without being known is another's."""
    living = {address: _own(address, thing) for address, thing in before.items()}
    blocks = list(living.values())
    for event in events:
        if event.bytes > 0:
            living[event.address] = event
            blocks.append(event)
        elif freed := living.pop(event.address, None):
            freed.freed_ns = event.born_ns
    return blocks


def _own(address: int, thing: Held) -> Block:
    return Block(address, thing.bytes, BEFORE, category=thing.category, module=thing.module, shape=thing.shape)


def _categorize(blocks: Iterable[Block], steps: list[tuple[int, int]], after: list[dict[int, Held]]) -> None:
    """Say what each block is for: as what the workload holds it after a step, else by its maker and its lifetime.

    What outlives the operation of the forward pass or the loss that made it is an activation.
    """
    for block in blocks:
        if block.born_ns == BEFORE:
            continue
        block.category = _by_life(block)
        for (_, end), things in zip(steps, after, strict=False):
            if block.lives_at(end) and (thing := things.get(block.address)):
                block.category, block.module, block.shape = thing.category, thing.module, thing.shape


def _by_life(block: Block) -> str:
    if block.phase in ("forward", "loss"):
        outlives = block.freed_ns is None or block.freed_ns > block.op_end_ns
        return "activations" if outlives else "temporaries"
    return "temporaries" if block.phase in ("backward", "optimizer") else "other"
