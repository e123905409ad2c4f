"""Low precision in torch modules: autocast around `forward`, or weights cast."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.utils.stateless import _reparametrize_module

from perfkit._report import Effect, Skipped
from perfkit._workload import Workload
from perfkit.backends.torch_surgery import around_forward, cast

LOW = (torch.bfloat16, torch.float16)
_CONV = (nn.modules.conv._ConvNd,)
_AUTOCAST = (nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, *_CONV)


def convolutions(model: nn.Module) -> list[str]:
    """The names of the convolutions over images: those whose weights have four dimensions."""
    return [name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d))]


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
    """`forward` under `torch.autocast`; outputs return in float32.

    torch.autocast accumulates matrix products of low precision in float32 and keeps sensitive operations in float32.
    Recurrent layers that the device cannot run in `dtype` stay in float32.
    """
    model, device = work.model, work.device
    kept = _keep_recurrent(model, dtype, device, outputs=None)

    def wrap(forward: Callable) -> Callable:
        def low(module, *args, **kwargs):
            with torch.autocast(device, dtype):
                outputs = forward(module, *args, **kwargs)
            return cast(outputs, torch.float32, only=(dtype,))

        return low

    around_forward(model, wrap)
    touched, skipped = [], list(kept)
    for name, module in _holders(model):
        if name in {item.name for item in kept}:
            continue
        low_already = any(p.dtype in LOW for p in module.parameters(recurse=False))
        if low_already:
            skipped.append(Skipped(name, f"its parameters are {_dtypes(module)} already"))
        elif isinstance(module, _AUTOCAST):
            touched.append(name)
        else:
            skipped.append(Skipped(name, f"{type(module).__name__}: autocast leaves it in float32"))
    return work, Effect(tuple(touched), tuple(skipped))


def cast_weights(work: Workload, dtype: torch.dtype) -> tuple[Workload, Effect]:
    """Parameters, buffers and inputs in `dtype`, outputs in float32.

    In training the optimizer keeps float32 parameters, and each forward casts copies of them, so that small updates
    are not lost.
    """
    model = work.model
    kept = _keep_recurrent(model, dtype, work.device, outputs=dtype)
    if work.trains:
        kept += _statistics(model)
    alone = {item.name for item in kept}
    left = {id(part) for name, module in _named(model) if name in alone for part in module.modules()}
    touched = tuple(name for name, module in _holders(model) if id(module) not in left)
    if work.trains:
        chosen = {id(p) for module in model.modules() if id(module) not in left for p in _own(module)}
        _cast_in_forward(model, dtype, chosen)
    else:
        for module in model.modules():
            if id(module) not in left:
                _cast_own(module, dtype)
        around_forward(model, lambda forward: _at_the_boundary(forward, dtype, torch.float32))
    return work, Effect(touched, tuple(kept))


def _holders(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """The modules that have parameters of their own."""
    for name, module in _named(model):
        if next(module.parameters(recurse=False), None) is not None:
            yield name, module


def _named(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """All modules by name; the model itself is called by its class's name."""
    return ((name or type(module).__name__, module) for name, module in model.named_modules())


def _own(module: nn.Module) -> list[torch.Tensor]:
    return [p for p in module.parameters(recurse=False) if p.is_floating_point()]


def _dtypes(module: nn.Module) -> str:
    return ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in module.parameters(recurse=False)}))


def _keep_recurrent(model: nn.Module, dtype: torch.dtype, device: str, outputs: torch.dtype | None) -> list[Skipped]:
    """Wrap the recurrent layers that this device cannot run in `dtype`: they go on in float32 and return `outputs`."""
    if device != "cpu" or _cpu_runs_recurrent(dtype):
        return []
    kept = []
    for name, module in _named(model):
        if isinstance(module, nn.RNNBase):
            around_forward(module, lambda forward: _without_autocast(_at_the_boundary(forward, torch.float32, outputs)))
            label = str(dtype).removeprefix("torch.")
            kept.append(Skipped(name, f"this CPU has no {label} {type(module).__name__}: it stays in float32"))
    return kept


def _statistics(model: nn.Module) -> list[Skipped]:
    """The norms that keep running statistics: small updates to them would be lost, and their weights go with them."""
    reason = "its running statistics and weights stay in float32 while it trains"
    norms = nn.modules.batchnorm._NormBase
    return [Skipped(name, reason) for name, module in _named(model) if isinstance(module, norms)]


def _cpu_runs_recurrent(dtype: torch.dtype) -> bool:
    """oneDNN has recurrent layers in low precision only where the CPU has the instructions."""
    probe = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[dtype]
    return getattr(torch.ops.mkldnn, probe)()


def _at_the_boundary(forward: Callable, inside: torch.dtype, outside: torch.dtype | None) -> Callable:
    """Floating-point inputs arrive in `inside`, outputs leave in `outside` (None: as they are)."""

    def bounded(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = cast((args, kwargs), inside, only=(torch.float32, *LOW))
        outputs = forward(module, *args, **kwargs)
        return outputs if outside is None else cast(outputs, outside, only=(inside,))

    return bounded


def _without_autocast(forward: Callable) -> Callable:
    def plain(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return forward(module, *args, **kwargs)

    # torch.compile breaks its graph in here anyway, and then loses what is in a packed sequence
    return torch.compiler.disable(plain, reason="a recurrent layer that stays in float32")


def _cast_own(module: nn.Module, dtype: torch.dtype) -> None:
    for parameter in _own(module):
        parameter.data = parameter.data.to(dtype)
    for name, buffer in module.named_buffers(recurse=False):
        if buffer.is_floating_point():
            setattr(module, name, buffer.to(dtype))
    if isinstance(module, nn.RNNBase):
        module.flatten_parameters()


def _cast_in_forward(model: nn.Module, dtype: torch.dtype, chosen: set[int]) -> None:
    """`forward` on parameters cast to `dtype`: gradients flow back through the cast to the float32 originals."""
    names = {name for name, parameter in model.named_parameters() if id(parameter) in chosen}

    def wrap(forward: Callable) -> Callable:
        def low(module, *args, **kwargs):
            # functional_call would call the module, hooks and this wrapper included: only its inner half is wanted
            state = {name: tensor.to(dtype) for name, tensor in module.named_parameters() if name in names}
            with _reparametrize_module(module, state):
                return forward(module, *args, **kwargs)

        return _at_the_boundary(low, dtype, torch.float32)

    around_forward(model, wrap)
