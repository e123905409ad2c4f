"""What each module of a torch model takes, of the operations within it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from perfkit.profiling._time_data import Module, Op
from perfkit.profiling.torch_count import Count, within


def modules(model: nn.Module, ops: Iterable[Op], count: Count, on_device: bool) -> tuple[Module, ...]:
    """Every module that was called, or holds one that was, in the order of `named_modules`.

    Args:
        on_device: the time is that of kernels, not of the host's operations.
    """
    timed = [op for op in ops if op.kind == ("kernel" if on_device else "op")]
    called = {path for path, calls in count.modules.items() if calls}
    return tuple(
        _module(path, module, timed, count)
        for path, module in model.named_modules()
        if any(within(one, path) for one in called)
    )


def _module(path: str, module: nn.Module, timed: list[Op], count: Count) -> Module:
    inside = [op for op in timed if within(op.module, path) and (path or op.phase != "optimizer")]
    return Module(
        path=path,
        kind=type(module).__name__,
        calls=float(count.modules[path]),
        forward_ms=sum(op.self_ms for op in inside if op.phase == "forward"),
        backward_ms=sum(op.self_ms for op in inside if op.phase == "backward"),
        self_ms=sum(op.self_ms for op in inside if op.module == path and op.phase in ("forward", "backward")),
        flops=count.flops(path),
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        saved_bytes=float(sum(size for one, size in count.saved_bytes.items() if within(one, path))),
        output_bytes=float(count.output_bytes[path]),
    )
