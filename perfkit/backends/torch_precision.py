"""Low precision in torch modules: autocast around `forward`, or weights cast."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.utils.stateless import _reparametrize_module

from perfkit._errors import UnsupportedError
from perfkit._report import Effect, Skipped
from perfkit._workload import Workload
from perfkit.backends.torch_lowered import lowered
from perfkit.backends.torch_state import keeping_state
from perfkit.backends.torch_surgery import around_forward, cast, cast_attributes, leave_fast_path

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
    """`forward` under `torch.autocast`; outputs return in float32, or in float16 where that is all the model holds.

    torch.autocast accumulates matrix products of low precision in float32 and keeps sensitive operations in float32.
    Recurrent layers that the device cannot run in `dtype` stay in float32. With example inputs, the effect tells what
    one run of the model showed; without, what autocast does to layers of that kind.
    """
    model, device = work.model, work.device
    leave_fast_path(model)  # which does not look for autocast on a CPU
    recurrent = _only_in_float32(model, dtype, device)
    _keep(recurrent, outputs=None)
    kept = list(recurrent.values())
    seen = None if work.inputs is None else lowered(work, dtype)
    if work.inputs is not None and seen is None:
        return work, Effect(skipped=tuple(_not_lowered(model, kept)), notes=("autocast casts nothing in this model",))

    widest = _widest(model)
    outside = widest if widest in LOW else torch.float32

    def wrap(forward: Callable) -> Callable:
        def low(module, *args, **kwargs):
            with torch.autocast(device, dtype):
                outputs = forward(module, *args, **kwargs)
            return cast(outputs, outside, only=(dtype,))

        return low

    touched = [name for name, module in _holders(model) if (_usually(module) if seen is None else module in seen)]
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
            return f"its parameters are {_dtypes(module)}" + (" already" if dtypes & set(LOW) else "")
        if isinstance(module, _AUTOCAST):
            return "autocast found nothing to cast in it on the example inputs: it is not called, or computed elsewhere"
        return f"{type(module).__name__}: autocast leaves it in float32"

    rest = [(name, module) for name, module in _holders(model) if name not in touched]
    return [told.get(name) or Skipped(name, reason(module)) for name, module in rest]


def cast_weights(work: Workload, dtype: torch.dtype) -> tuple[Workload, Effect]:
    """Parameters, buffers and inputs in `dtype`; outputs in what the parameters were in, float32 as a rule.

    In training the optimizer keeps float32 parameters, and each forward casts copies of them and of the buffers, so
    that small updates are not lost. What a model writes to while it trains stays in float32.

    Raises:
        UnsupportedError: the model does not run so.
    """
    model = work.model
    recurrent = _only_in_float32(model, dtype, work.device)
    written = _written_buffers(work) if work.trains else {}
    updating = _updating(model, written) if work.trains else {}
    kept = [*recurrent.values(), *updating.values(), *(_statistics(model) if work.trains else ())]
    alone = {item.name for item in kept}
    left = {id(part) for name, module in _named(model) if name in alone for part in module.modules()}
    holders = {name: module for name, module in _holders(model) if id(module) not in left}
    touched = tuple(name for name, module in holders.items() if any(p.dtype != dtype for p in _own(module)))
    kept += [Skipped(name, f"its parameters are {_dtypes(m)}") for name, m in holders.items() if name not in touched]
    if not touched:
        return work, Effect((), tuple(kept), ("the model has no parameters to store in another precision",))
    _keep(recurrent, outputs=dtype)
    for module in updating:
        around_forward(module, lambda forward: _at_the_boundary(forward, torch.float32, dtype))
    held, outside = {p.dtype for p in model.parameters()}, _widest(model)
    if work.trains:
        cast_ones = [module for module in model.modules() if id(module) not in left]
        chosen = {id(tensor) for module in cast_ones for tensor in (*_own(module), *_buffers(module).values())}
        chosen -= {id(buffer) for buffers in written.values() for buffer in buffers.values()}
        _cast_in_forward(model, dtype, chosen, held, outside)
    else:
        for module in model.modules():
            if id(module) not in left:
                _cast_own(module, dtype)
        around_forward(model, lambda forward: _at_the_boundary(forward, dtype, outside, held))
    if work.inputs is not None:
        _check_runs(work, dtype)
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


def _widest(model: nn.Module) -> torch.dtype | None:
    """The dtype that holds all floating-point parameters; None where there are none."""
    dtypes = [p.dtype for p in model.parameters() if p.is_floating_point()]
    return functools.reduce(torch.promote_types, dtypes) if dtypes else None


def _dtypes(module: nn.Module) -> str:
    return ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in module.parameters(recurse=False)}))


def _only_in_float32(model: nn.Module, dtype: torch.dtype, device: str) -> dict[nn.Module, Skipped]:
    """The recurrent layers that this device cannot run in `dtype`."""
    if device != "cpu" or _cpu_runs_recurrent(dtype):
        return {}
    label = str(dtype).removeprefix("torch.")
    return {
        module: Skipped(name, f"this CPU has no {label} {type(module).__name__}: it stays in float32")
        for name, module in _named(model)
        if isinstance(module, nn.RNNBase)
    }


def _keep(recurrent: Iterable[nn.Module], outputs: torch.dtype | None) -> None:
    """They go on in float32 and return `outputs`."""
    for module in recurrent:
        around_forward(module, lambda forward: _without_autocast(_at_the_boundary(forward, torch.float32, outputs)))


def _statistics(model: nn.Module) -> list[Skipped]:
    """The norms that keep running statistics: small updates to them would be lost, and their weights go with them."""
    reason = "its running statistics and weights stay in float32 while it trains"
    norms = nn.modules.batchnorm._NormBase
    return [Skipped(name, reason) for name, module in _named(model) if isinstance(module, norms)]


def _updating(model: nn.Module, written: Mapping[nn.Module, Mapping[str, Any]]) -> dict[nn.Module, Skipped]:
    """The layers whose buffers or gradients can only be in float32 while they train.

    Of a module that has layers below, the buffers stay as they are, and the layers do not.
    """
    found = {}
    for name, module in _named(model):
        below = [part for part in module.modules() if part is not module and _own(part)]
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse:
            found[module] = Skipped(name, "its gradient is sparse, and such are not cast: it stays in float32")
        elif module in written and not below and not isinstance(module, nn.modules.batchnorm._NormBase):
            buffers = ", ".join(written[module])
            found[module] = Skipped(name, f"it writes to {buffers} while it trains: it stays in float32")
    return found


def _written_buffers(work: Workload) -> dict[nn.Module, dict[str, torch.Tensor]]:
    """The floating-point buffers that one run of the model, which is left as it is, writes to, by their module."""
    model, inputs = work.model, work.inputs
    before = {
        module: {name: (held, held._version) for name, held in _buffers(module).items()} for module in model.modules()
    }
    with torch.random.fork_rng(), torch.no_grad(), keeping_state(model):
        work.backend.seed(work.seed)
        model(*inputs.args, **inputs.kwargs)
        found = {
            module: {
                name: held
                for name, (held, version) in buffers.items()
                if module._buffers.get(name) is not held or held._version != version
            }
            for module, buffers in before.items()
        }
    return {module: buffers for module, buffers in found.items() if buffers}


def _buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """The floating-point buffers of its own."""
    return {name: held for name, held in module.named_buffers(recurse=False) if held.is_floating_point()}


def _check_unwritten(buffers: Mapping[str, torch.Tensor], copies: Mapping[str, torch.Tensor]) -> None:
    """Refuse to lose what was written to copies of buffers that nothing wrote to when the recipe was applied."""
    lost = [name for name, held in buffers.items() if name in copies and (held is not copies[name] or held._version)]
    if lost:
        raise UnsupportedError(
            f"{', '.join(lost)} was written to, and was not on the example inputs: in training 'half' gives forward "
            "copies of such buffers. Choose 'bf16' or 'fp16', which give it the buffers themselves"
        )


def _check_runs(work: Workload, dtype: torch.dtype) -> None:
    model, inputs = work.model, work.inputs
    with torch.random.fork_rng(), torch.no_grad(), keeping_state(model):
        try:
            model(*inputs.args, **inputs.kwargs)
        except Exception as error:  # whatever an operation raises that was given two precisions
            label = str(dtype).removeprefix("torch.")
            raise UnsupportedError(
                f"weights in {label} do not fit the rest of {type(model).__name__}, which has an operation that does "
                f"not take {label}, or numbers that stay in float32 (made in forward, or written to while it trains): "
                f"{type(error).__name__}: {error}. 'bf16' and 'fp16' cast at each operation instead"
            ) from error


def _cpu_runs_recurrent(dtype: torch.dtype) -> bool:
    """oneDNN has recurrent layers in low precision only where the CPU has the instructions."""
    probe = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[dtype]
    return getattr(torch.ops.mkldnn, probe)()


def _at_the_boundary(
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


def _cast_own(module: nn.Module, dtype: torch.dtype) -> None:
    for parameter in _own(module):
        parameter.data = parameter.data.to(dtype)
    for name, buffer in module.named_buffers(recurse=False):
        if buffer.is_floating_point():
            setattr(module, name, buffer.to(dtype))
    cast_attributes(module, dtype)
    if isinstance(module, nn.RNNBase):
        module.flatten_parameters()


def _cast_in_forward(
    model: nn.Module, dtype: torch.dtype, chosen: set[int], held: Iterable[torch.dtype], outside: torch.dtype
) -> None:
    """`forward` on parameters cast to `dtype`: gradients flow back through the cast to the float32 originals."""
    held_ones = (*model.named_parameters(), *model.named_buffers())
    names = {name for name, tensor in held_ones if id(tensor) in chosen}  # of tied ones the first

    def wrap(forward: Callable) -> Callable:
        def low(module, *args, **kwargs):
            # functional_call would call the module, hooks and this wrapper included: only its inner half is wanted
            tensors = (*module.named_parameters(), *module.named_buffers())
            state = {name: tensor.to(dtype) for name, tensor in tensors if name in names}
            with _reparametrize_module(module, state, tie_weights=True):
                outputs = forward(module, *args, **kwargs)
                if not torch.compiler.is_compiling():
                    _check_unwritten(dict(module.named_buffers()), state)
            return outputs

        return _at_the_boundary(low, dtype, outside, held)

    around_forward(model, wrap)
