"""Low precision in torch modules: autocast around `forward`, and what it shares with casting the weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from perfkit._report import Effect, Skipped
from perfkit._workload import Workload
from perfkit.backends.torch_encoder import leave_fast_path
from perfkit.backends.torch_lowered import lowered
from perfkit.backends.torch_state import keeping_state
from perfkit.backends.torch_surgery import around_forward, cast, tensors_in

LOW = (torch.bfloat16, torch.float16)
_CONV = (nn.modules.conv._ConvNd,)
_AUTOCAST = (nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, *_CONV)


@contextmanager
def tf32_allowed() -> Iterator[None]:
    """Within it float32 matrix products and convolutions on CUDA may round their operands to TF32."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def autocast(work: Workload, dtype: torch.dtype) -> tuple[Workload, Effect]:
    """`forward` under `torch.autocast`; outputs return in float32, or in 16 bits where the model's are in those.

    torch.autocast accumulates matrix products of low precision in float32 and keeps sensitive operations in float32.
    Recurrent layers that the device cannot run in `dtype` stay in float32. With example inputs, the effect tells what
    one run of the model showed; without, what autocast does to layers of that kind.
    """
    model, device = work.model, work.device
    outputs = outputs_dtype(work)
    leave_fast_path(model)  # which does not look for autocast on a CPU
    recurrent = only_in_float32(model, dtype, device)
    keep_in_float32(recurrent, outputs=None)
    kept = list(recurrent.values())
    seen = None if work.inputs is None else lowered(work, dtype)
    if work.inputs is not None and seen is None:
        return work, Effect(skipped=tuple(_not_lowered(model, kept)), notes=("autocast casts nothing in this model",))

    outside = outputs if outputs in LOW else torch.float32

    def wrap(forward: Callable) -> Callable:
        def low(module, *args, **kwargs):
            with torch.autocast(device, dtype):
                outputs = forward(module, *args, **kwargs)
            return cast(outputs, outside, only=(dtype,))

        return low

    touched = [name for name, module in holders_of(model) if (_usually(module) if seen is None else module in seen)]
    skipped = _not_lowered(model, kept, touched)
    around_forward(model, wrap)
    return work, Effect(tuple(touched) or (type(model).__name__,), tuple(skipped))


def _usually(module: nn.Module) -> bool:
    return isinstance(module, _AUTOCAST) and not any(p.dtype in LOW for p in module.parameters(recurse=False))


def _not_lowered(model: nn.Module, kept: list[Skipped], touched: Iterable[str] = ()) -> list[Skipped]:
    """Why the layers that are not touched are not."""
    told = {item.name: item for item in kept}

    def reason(module: nn.Module) -> str:
        dtypes = {p.dtype for p in module.parameters(recurse=False)}
        if not dtypes <= {torch.float32}:
            return f"its parameters are {dtypes_of(module)}" + (" already" if dtypes & set(LOW) else "")
        if isinstance(module, _AUTOCAST):
            return "autocast found nothing to cast in it on the example inputs: it is not called, or computed elsewhere"
        return f"{type(module).__name__}: autocast leaves it in float32"

    rest = [(name, module) for name, module in holders_of(model) if name not in touched]
    return [told.get(name) or Skipped(name, reason(module)) for name, module in rest]


def holders_of(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """The modules that have parameters of their own."""
    for name, module in named(model):
        if next(module.parameters(recurse=False), None) is not None:
            yield name, module


def named(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """All modules by name; the model itself is called by its class's name."""
    return ((name or type(module).__name__, module) for name, module in model.named_modules())


def outputs_dtype(work: Workload) -> torch.dtype | None:
    """What outputs return in: the one dtype of the example's, else the one that holds all parameters; None of none.

    The model is run only where it has parameters in several.
    """
    dtypes = {p.dtype for p in work.model.parameters() if p.is_floating_point()}
    if len(dtypes) > 1 and work.inputs is not None:
        with torch.random.fork_rng(), torch.no_grad(), keeping_state(work.model):
            work.backend.seed(work.seed)
            outputs = work.model(*work.inputs.args, **work.inputs.kwargs)
        found = {tensor.dtype for tensor in tensors_in(outputs) if tensor.is_floating_point()}
        dtypes = found if len(found) == 1 else dtypes
    return functools.reduce(torch.promote_types, dtypes) if dtypes else None


def dtypes_of(module: nn.Module) -> str:
    """The dtypes of its own parameters, in words."""
    return ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in module.parameters(recurse=False)}))


def only_in_float32(model: nn.Module, dtype: torch.dtype, device: str) -> dict[nn.Module, Skipped]:
    """The recurrent layers that this device cannot run in `dtype`."""
    if device != "cpu" or _cpu_runs_recurrent(dtype):
        return {}
    label = str(dtype).removeprefix("torch.")
    return {
        module: Skipped(name, f"this CPU has no {label} {type(module).__name__}: it stays in float32")
        for name, module in named(model)
        if isinstance(module, nn.RNNBase)
    }


def keep_in_float32(recurrent: Iterable[nn.Module], outputs: torch.dtype | None) -> None:
    """They go on in float32 and return `outputs`."""
    for module in recurrent:
        around_forward(module, lambda forward: _without_autocast(at_the_boundary(forward, torch.float32, outputs)))


def _cpu_runs_recurrent(dtype: torch.dtype) -> bool:
    """oneDNN has recurrent layers in low precision only where the CPU has the instructions."""
    probe = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[dtype]
    return getattr(torch.ops.mkldnn, probe)()


def at_the_boundary(
    forward: Callable, inside: torch.dtype, outside: torch.dtype | None, held: Iterable[torch.dtype] = ()
) -> Callable:
    """Floating-point inputs arrive in `inside`, outputs leave in `outside` (None: as they are).

    Args:
        held: the dtypes of the parameters: inputs in other ones than float32, these and lower ones stay as they are.
    """
    expected = (torch.float32, *LOW, *held)

    def bounded(module: nn.Module, *given: Any, **named: Any) -> Any:
        # each by itself: a small model takes microseconds, and a tree of all of them takes some
        args = [cast(value, inside, only=expected) for value in given]
        kwargs = {name: cast(value, inside, only=expected) for name, value in named.items()}
        outputs = forward(module, *args, **kwargs)
        return outputs if outside is None else cast(outputs, outside, only=(inside,))

    return bounded


def _without_autocast(forward: Callable) -> Callable:
    def plain(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return forward(module, *args, **kwargs)

    # torch.compile breaks its graph in here anyway, and then loses what is in a packed sequence
    return torch.compiler.disable(plain, reason="a recurrent layer that stays in float32")
